"""The device that is measured, and what a benchmark needs of its process."""

import argparse
import os
import sys

import torch

from mvar_kernels.dispatch import interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REHEARSAL = "MVAR_REHEARSAL" in os.environ
"""Run the GPU stages on a CPU, with small cases in Triton's interpreter, to test them without a GPU."""
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc settings that keep freed memory in the process; with its defaults eager timings vary by a factor of several."""


def set_allocator() -> None:
    """On a CPU, restart this command once with `ALLOCATOR` in its environment: malloc reads it only at start-up."""
    if DEVICE.type == "cpu" and not REHEARSAL and not os.environ.items() >= ALLOCATOR.items():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ALLOCATOR)


def require_gpu() -> None:
    """End the program where there is neither a GPU nor a rehearsal."""
    if DEVICE.type != "cuda" and not (REHEARSAL and interpreted()):
        raise SystemExit("no CUDA device; MVAR_REHEARSAL=1 TRITON_INTERPRET=1 rehearses on the CPU")


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Of a command, whose module docstring is its help."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
