"""The rate of a large matrix product here, by dtype: `python -m benchmarks.products`, and after every run of the ops.

The horizontal roofs of the roofline plot; the others are the copies that each op's result file has.
"""

import torch

from benchmarks.measure import DEVICE, write
from benchmarks.parts import peak_gflops
from benchmarks.timeline import product_tflops

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


@torch.no_grad()
def main() -> None:
    rows = [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "gflops": peak_gflops(dtype) if DEVICE.type == "cpu" else 1e3 * product_tflops(dtype),
        }
        for dtype in DTYPES[DEVICE.type]
    ]
    print(rows, write("products", rows))


if __name__ == "__main__":
    main()
