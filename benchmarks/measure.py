"""Timing side by side, and results as files."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import mvar
from mvar.files import replacing
from mvar_kernels.backends import native

RESULTS = Path(__file__).parent / "results"

# glibc returns large blocks to the system at once and takes them back page by page, which moves eager timings by
# several times; with these every side keeps its memory (set by `make bench`, before the process starts).
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}


def require_allocator() -> None:
    """Refuse to time without the allocator settings that every side is given."""
    wrong = [name for name, value in ALLOCATOR.items() if os.environ.get(name) != value]
    if wrong:
        raise SystemExit(f"set {', '.join(f'{n}={ALLOCATOR[n]}' for n in wrong)} (`make bench` does)")


def interleaved(
    sides: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float, warm_up: bool = True
) -> dict[str, float]:
    """Median milliseconds of each side; the sides take turns, so that a slow moment of the machine meets all.

    At least `rounds` rounds after one to warm up, and more of them until `seconds` have passed.
    """
    for run in sides.values() if warm_up else ():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < rounds or time.perf_counter() < end:
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            _finish()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, commit."""
    extension = native()
    return {
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mvar": mvar.__version__,
        "instruction_set": extension.instruction_set() if extension else None,
        "compiler": extension.build_info()["compiler"] if extension else None,
        "commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True)
        return done.stdout.strip()

    # Results and README are what a run changes: they do not make a commit's code another one.
    changed = git("status", "--porcelain", "--", "csrc", "mvar", "mvar_kernels", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def write(name: str, rows: Any) -> Path:
    """Write results/<name>.json with the machine beside the rows."""
    path = RESULTS / f"{name}.json"
    with replacing(path) as aside:
        aside.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path
