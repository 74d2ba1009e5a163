"""Commands with limits: each is a process of its own, killed with all that it started when its time is over."""

import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvar.check.jobs import GROUP, kill
from mvar_kernels.testing.check import end_with_parent

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "build" / "gpu"
FAILED_LINES = 15


@dataclass(frozen=True)
class Step:
    """A command and the seconds that it may take."""

    name: str
    command: Sequence[str]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    seconds: float
    log: Path

    def line(self) -> str:
        """The end of what it printed: of what failed some lines of it."""
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = said[-1][:120] if said else ""
        more = [] if self.result == "done" else [f"  | {line[:200]}" for line in said[-FAILED_LINES:-1]]
        return "\n".join([f"{self.name:40s} {self.result:12s} {self.seconds:5.0f} s  {last}".rstrip(), *more])


def together(steps: Sequence[Step], end: float) -> Iterator[Outcome]:
    """Start all steps at once; each is killed, with what it started, at its limit or at `end` (of time.monotonic)."""
    LOGS.mkdir(parents=True, exist_ok=True)
    start, running = time.monotonic(), []
    for step in steps:
        log = LOGS / f"{step.name.replace(' ', '_')}.txt"
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
        running.append((step, process, log))
    while running:
        for entry in list(running):
            step, process, log = entry
            code, taken = process.poll(), time.monotonic() - start
            if code is None and (taken > step.seconds or time.monotonic() > end):
                kill(process)
                process.wait()
                result = "cut"
            elif code is not None:
                result = "done" if code == 0 else f"failed ({code})"
            else:
                continue
            running.remove(entry)
            yield Outcome(step.name, result, taken, log)
        time.sleep(0.05)
