"""The rate of a large matrix product, by dtype: what shares and floors are of, and the roofline's horizontal roofs.

`python -m benchmarks.products` measures the roofs, as does a run of the ops that finds none of this machine and commit.
The other roofs are the copies that each op's result file has.
"""

from functools import cache

import torch

from benchmarks.measure import DEVICE, write
from benchmarks.parts import peak_gflops
from benchmarks.timeline import product_tflops
from mvar.train.metrics import peak_flops

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
NAME = "products"


def measured_tflops(dtype: torch.dtype) -> float:
    return peak_gflops(dtype) / 1e3 if DEVICE.type == "cpu" else product_tflops(dtype)


@cache
def best_tflops(dtype: torch.dtype) -> tuple[float, str]:
    """The rate of products that shares are of, and whose it is: of a known GPU in 16 bits its data sheet's."""
    known = peak_flops(DEVICE) if dtype.itemsize == 2 else None
    return (known / 1e12, "data sheet") if known else (measured_tflops(dtype), "measured")


@torch.no_grad()
def main() -> None:
    rows = [{"dtype": str(d).removeprefix("torch."), "gflops": 1e3 * measured_tflops(d)} for d in DTYPES[DEVICE.type]]
    print(rows, write(NAME, rows))


if __name__ == "__main__":
    main()
