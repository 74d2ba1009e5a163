"""Commands with time limits, each a process that is killed with all its children when its time is over."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.results import ROOT
from mvar.check.jobs import GROUP, kill
from mvar_kernels.testing.check import end_with_parent

LOGS = ROOT / "build" / "gpu"
FAILED_LINES = 15


@dataclass(frozen=True)
class Step:
    """A command and its limit in seconds."""

    name: str
    command: Sequence[str]
    seconds: float


def run_step(step: Step, end: float) -> bool:
    """Run a command until its limit, or until `end` (of time.monotonic); whether it was done.

    Prints the last line that it printed; if it failed, the lines before it as well.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    log, start = LOGS / f"{step.name.replace(' ', '_')}.txt", time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,  # this process has one thread
            **GROUP,
        )
    try:
        code = process.wait(max(0.0, min(step.seconds, end - start)))
        result = "done" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        kill(process)
        process.wait()
        result = "cut"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:120] if lines else ""
    print(f"{step.name:40s} {result:12s} {time.monotonic() - start:5.0f} s  {last}".rstrip(), flush=True)
    for line in lines[-FAILED_LINES:-1] if result != "done" else ():
        print(f"  | {line[:200]}", flush=True)
    return result == "done"


def run_steps(steps: Sequence[Step], seconds: float, min_seconds: float) -> list[str]:
    """Run the steps one after the other within so many seconds; returns the names of those that were not done.

    A step is started only with `min_seconds` left.
    """
    end, missing = time.monotonic() + seconds, []
    for step in steps:
        if end - time.monotonic() < min_seconds:
            print(f"{step.name:40s} no time left", flush=True)
            missing.append(step.name)
        elif not run_step(step, end):
            missing.append(step.name)
    return missing
