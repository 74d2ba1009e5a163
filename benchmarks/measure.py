"""Timing side by side, and results as files."""

import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import mvar
from mvar.bench import ALLOCATOR
from mvar.files import make_folder, write_json
from mvar.machine import cpu_model, cpuinfo, version
from mvar_kernels.dispatch import architecture, interpreted, native

RESULTS = Path(__file__).parent / "results"

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REHEARSAL = "MVAR_REHEARSAL" in os.environ
"""A GPU's stages on a CPU, with small cases in Triton's interpreter: for their course, not for their times."""
TURN_MS = {"cpu": 20.0, "cuda": 5.0}[DEVICE.type]
CALLS = 10  # in one CUDA graph, so that the gap between two launches weighs a tenth


def require_allocator() -> None:
    """Refuse to time on the CPU without the allocator settings that every side is given."""
    wrong = [name for name, value in ALLOCATOR.items() if os.environ.get(name) != value]
    if wrong and DEVICE.type == "cpu" and not REHEARSAL:
        raise SystemExit(f"set {', '.join(f'{n}={ALLOCATOR[n]}' for n in wrong)} (`mvar bench` does)")


def interleaved(
    sides: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float, warm_up: bool = True
) -> dict[str, float]:
    """Median milliseconds of each side, measured as :func:`latencies`."""
    found = latencies(sides, rounds=rounds, seconds=seconds, warm_up=warm_up)
    return {name: statistics.median(times) for name, times in found.items()}


def latencies(
    sides: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float, warm_up: bool = True
) -> dict[str, list[float]]:
    """Milliseconds of each side in every round; the sides take turns, so that a slow moment of the machine meets all.

    At least `rounds` rounds after one to warm up, and more of them until `seconds` have passed. A turn is as many
    calls as fill `TURN_MS`, so that every side finds the caches as it leaves them, and not as another has; without a
    warm-up it is one call.
    """
    calls = dict.fromkeys(sides, 1)
    for name, run in sides.items() if warm_up else ():
        run()
        calls[name] = max(1, round(TURN_MS / max(_ms(run, 1), 1e-4)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < rounds or time.perf_counter() < end:
        for name, run in sides.items():
            times[name].append(_ms(run, calls[name]))
    return times


def _ms(run: Callable[[], Any], calls: int) -> float:
    """Of one of so many calls in a row.

    Before several of them a GPU is given one more, so that it never waits for the host to queue the first.
    """
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e3 * (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if calls > 1:
        run()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def use_own_stream() -> None:
    """Work on a stream that can be captured from here on: a backward runs on the stream of its forward."""
    if DEVICE.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """Replays of a CUDA graph of `CALLS` calls, on the current stream. RuntimeError where they cannot be captured."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS):
            run()
    return graph.replay


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, commit."""
    extension = native()
    return {
        "processor": cpuinfo().get("model name", platform.processor()),
        "cpu_model": cpu_model(),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "architecture": architecture(DEVICE),
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mvar": mvar.__version__,
        "instruction_set": extension.instruction_set() if extension else None,
        "compiler": extension.build_info()["compiler"] if extension else None,
        "commit": _commit(),
        "sources": _sources(),
    }


def _commit() -> str:
    """Also where there is no git, or a copy of the files alone."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=RESULTS.parent.parent, capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    # Results and docs are what a run changes: they do not make a commit's code another one.
    changed = git("status", "--porcelain", "--", "csrc", "mvar", "mvar_kernels", "benchmarks/*.py")
    commit = git("rev-parse", "--short", "HEAD")
    return commit + (" with changes" if changed else "") if commit else "unknown, maybe with changes"


def _sources() -> str:
    """A hash of what a run depends on, also where there is no git: results of other code are never gone on with."""
    found = hashlib.sha256()
    for folder, pattern in (("csrc", "**/*"), ("mvar", "**/*.py"), ("mvar_kernels", "**/*.py"), ("benchmarks", "*.py")):
        for path in sorted((RESULTS.parent.parent / folder).glob(pattern)):
            if path.is_file():
                found.update(path.read_bytes())
    return found.hexdigest()[:12]


def folder() -> str:
    """Of the results of this GPU, or this model of CPU: "nvidia_h200", "amd_epyc_family_26_avx512"."""
    here = machine()
    name: str = here["cpu_model"] if here["device"] == "cpu" else here["device"]
    return slug(name)


def slug(name: str) -> str:
    """ "AMD EPYC, family 26, avx512" → "amd_epyc_family_26_avx512" """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def results() -> Path:
    """The folder of this machine's results; a rehearsal's are below the working directory."""
    return Path("build") / "rehearsal" if REHEARSAL else RESULTS / folder()


def require_gpu() -> None:
    """End the program where there is neither a GPU nor a rehearsal of what it would do there."""
    if DEVICE.type != "cuda" and not (REHEARSAL and interpreted()):
        raise SystemExit("no CUDA device; MVAR_REHEARSAL=1 TRITON_INTERPRET=1 rehearses on the CPU")


def kept(name: str) -> Any:
    """The rows of results/<device or CPU>/<name>.json if this machine made them at this commit, else None."""
    path = results() / f"{name}.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # there is none, or it was damaged
        return None
    return content["rows"] if content.get("machine") == machine() else None


def write(name: str, rows: Any) -> Path:
    """Write results/<device or CPU>/<name>.json with the machine beside the rows."""
    path = results() / f"{name}.json"
    make_folder(path.parent)
    write_json(path, {"machine": machine(), "rows": rows})
    return path
