"""All that needs a GPU, within nine minutes and without network: `python -m benchmarks.gpu` (`make gpu`).

Builds; holds every kernel against float64 in every dtype, a process for each op, while others compile what will be
timed; times generation, op after op and a training step alone on the GPU; makes tables. Every step is a process of its
own with a limit, after which it is killed with all that it started: what fails, hangs or breaks the device takes no
other step with it, and what was measured before stays, as results are written row by row. Exits with 1 if any step was
not done.

Estimated, not measured, on 16 cores: the contract compiles about 640 kernels, half a second to a second each (the
ahead-of-time test takes 0.46 s a kernel on one core), in 5 processes, the largest with a third of them: 110 to 210 s.
Beside it torch.compile takes the rivals of 40 rows, the unrolled scans up to a minute each, of which the limit may cut
some: they are compiled again, or not, when they are timed. Timing ops is 40 rows of 3 s and 7 starts of 8 s: 180 s;
generation takes the seconds it is given. With 60 s for the build that is more than nine minutes where all of it is
slow: what matters most goes first, and what is left of nine when a step starts bounds it in any case.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvar.files import replacing

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "build" / "gpu"
SUMMARY = Path(__file__).parent / "results" / "gpu.txt"
ALL_SECONDS, REPORT_SECONDS = 530.0, 25.0
# The contract's share of each process, as pytest selects it; a test holds that no op is forgotten.
CONTRACT = ("adaln", "scale_attention", "ssd_scan", "mamba2_mixer", "sample_tokens or soft_embedding")
GENERATION_SECONDS = 140
OPS = ("scale_attention", "mamba2_mixer", "gated_adaln", "sample_tokens", "ssd_scan", "adaln", "soft_embedding")


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
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{self.name:40s} {self.result:12s} {self.seconds:5.0f} s  {said[-1][:120] if said else ''}".rstrip()


def together(steps: Sequence[Step], end: float) -> Iterator[Outcome]:
    """Start all steps at once; each is killed, with what it started, at its limit or at `end` (of time.monotonic)."""
    LOGS.mkdir(parents=True, exist_ok=True)
    start, running = time.monotonic(), []
    for step in steps:
        log = LOGS / f"{step.name.replace(' ', '_')}.txt"
        with log.open("wb") as out:
            process = subprocess.Popen(step.command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        running.append((step, process, log))
    while running:
        for entry in list(running):
            step, process, log = entry
            code, taken = process.poll(), time.monotonic() - start
            if code is None and (taken > step.seconds or time.monotonic() > end):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                result = "cut"
            elif code is not None:
                result = "done" if code == 0 else f"failed ({code})"
            else:
                continue
            running.remove(entry)
            yield Outcome(step.name, result, taken, log)
        time.sleep(0.05)


def stages() -> Iterator[list[Step]]:
    """What runs together, in order."""
    python = sys.executable
    training = [python, "-m", "benchmarks.train", "--dtypes", "bfloat16"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    yield [Step("build", [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."], 120)]
    built = "from mvar_kernels.backends import unavailable; raise SystemExit(unavailable('cuda'))"
    yield [Step("CUDA kernels are there", [python, "-c", built], 30)]
    rooms = sorted(path for kind in ("triton", "cuda") for path in (ROOT / "tests").glob(f"test_*_{kind}.py"))
    yield [
        *(Step(f"contract {ops}", [*pytest, "tests/test_contract.py", "-k", f"(triton or cuda) and ({ops})"], 220)
          for ops in CONTRACT),
        *(Step(f"tests {path.stem}", [*pytest, str(path)], 220) for path in rooms),
        *(Step(f"compile {op}", [python, "-m", "benchmarks.ops", op, "--untimed"], 220) for op in OPS),
        Step("compile generation", [python, "-m", "benchmarks.throughput", "--untimed"], 220),
        Step("compile training", [*training, "--untimed"], 220),
    ]  # fmt: skip
    timed = [[Step(f"time {op}", [python, "-m", "benchmarks.ops", op, "--seconds", "0.3"], 60)] for op in OPS]
    generation = [python, "-m", "benchmarks.throughput", "--seconds", str(GENERATION_SECONDS)]
    yield from (
        [Step("generation", generation, GENERATION_SECONDS + 30)],
        *timed,
        [Step("training step", training, 90)],
    )


def run(plan: Iterator[list[Step]], last: Step, summary: Path, seconds: float = ALL_SECONDS) -> bool:
    """Every stage of the plan and, for which time is kept, the last step; True if all was done."""
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []

    def take(steps: Sequence[Step], until: float) -> None:
        for outcome in together(steps, until):
            print(outcome.line(), flush=True)
            outcomes.append(outcome)
            with replacing(summary) as aside:
                aside.write_text("".join(f"{o.line()}\n" for o in outcomes))

    for steps in plan:
        take(steps, end - last.seconds)
    take([last], end)
    return all(outcome.result == "done" for outcome in outcomes)


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the tests ask torch for deterministic algorithms
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"  # of each process; there are as many processes as cores
    report = Step("report", [sys.executable, "-m", "benchmarks.report"], REPORT_SECONDS)
    raise SystemExit(0 if run(stages(), report, SUMMARY) else 1)


if __name__ == "__main__":
    main()
