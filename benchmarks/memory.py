"""Peak memory: of this process or its GPU, or of a process of its own. Linux."""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import DEVICE
from mvar.bench import ALLOCATOR


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


def in_a_process_of_its_own(module: str, *arguments: str) -> float:
    """What `python -m module` prints in its last line.

    Raises RuntimeError with the last line of its complaint where it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    # Without the settings for timing, under which what is freed is kept.
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]  # none where it was killed
        raise RuntimeError(f"{module}: {said[-1]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def touch(gib: int) -> None:
    """Take so much memory and free it: under the settings for timing it stays here, and no side has to wait for it."""
    blocks = [torch.ones(2**28) for _ in range(gib)]  # of 1 GiB, below the size that goes back to the system
    del blocks


def give_back() -> None:
    """Return what is free here to the system, whatever the settings for timing say: other processes need it."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
