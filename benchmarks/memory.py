"""Peak memory of a generation, ours and the public algorithm's: `python -m benchmarks.memory`. Linux."""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.generate import ours, random_model, theirs
from benchmarks.measure import DEVICE, write
from mvar.bench import ALLOCATOR

SIDES = {"mvar": ours, "public algorithm": theirs}


def peak_gib(run: Callable[[], Any]) -> float:
    """The most that this process, or the GPU where there is one, holds while it runs; what was there before counts."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    run()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


@torch.no_grad()
def of_a_generation(side: str, depth: int, batch: int, dtype: torch.dtype) -> float:
    """While one batch is drawn: model and tokenizer in float32, and all that the side adds to them."""
    model, tokenizer = random_model(depth)
    torch.set_float32_matmul_precision("medium")
    return peak_gib(lambda: SIDES[side](model, tokenizer, torch.arange(batch), dtype))


def in_a_process_of_its_own(module: str, *arguments: str) -> float:
    """What `python -m module` prints."""
    command = [sys.executable, "-m", module, *arguments]
    # Without the settings for timing, under which what is freed is kept.
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of:
        print(of_a_generation(options.of, options.depth, options.batches[0], getattr(torch, options.dtype)))
        return
    rows: list[dict[str, Any]] = []
    for batch, dtype in product(options.batches, (torch.float32, torch.bfloat16)):
        sizes = ("--dtype", str(dtype)[6:], "--depth", str(options.depth), "--batches", str(batch))
        peaks = {side: in_a_process_of_its_own("benchmarks.memory", "--of", side, *sizes) for side in SIDES}
        rows.append({"batch": batch, "dtype": str(dtype)[6:], "peak_gib": peaks})
        print(rows[-1])
    print(write(f"memory_d{options.depth}", rows))


if __name__ == "__main__":
    main()
