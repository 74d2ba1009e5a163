"""Which kernels are right on this GPU, within 100 s: `python -m benchmarks.gpu_check` (`make gpu-check`).

From the tree, nothing is built; kernels that were carried (carried.py) are not compiled. In order, each with its share
of the time:

1. every case of every op, in 16 bits first, as `mvar check` does, a process for each op, backend and dtype;
2. of what failed, one case of each process again: without wgmma, with one pipeline stage, launch by launch, and under
   compute-sanitizer, all at once: whether it is our fault or Triton's, and where;
3. the shapes that are timed, at batch 2: 200 runs of the same bits, and a replay from a CUDA graph;
4. one d16 generation with a CUDA graph and without: the same tokens, and how long each takes.

Rows are written as they come, to results/<GPU>/check.jsonl and timed.jsonl, so that what a cut leaves stands. Exits
with 1 if anything was wrong or not done. `--only-failed FILE` tries again what was wrong there. Without a GPU,
MVAR_REHEARSAL=1 TRITON_INTERPRET=1 rehearses it: the kernels on the CPU, however far the time goes.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import carried
from benchmarks.measure import DEVICE, REHEARSAL, require_gpu, results
from benchmarks.ops import benchmarked
from benchmarks.steps import Step, together
from mvar import machine
from mvar.check.command import key, planned, recorded, table
from mvar.check.jobs import Job, run
from mvar.files import make_folder
from mvar_kernels.testing.check import Result
from mvar_kernels.testing.registry import SPECS

SECONDS = 100.0
# Shares of it: at what time each part ends at the latest.
CASES_END, DIAGNOSIS_END, TIMED_END = 0.55, 0.7, 0.85
CASE_SECONDS = 40.0
MAX_DIAGNOSED = 6
WORKER = (sys.executable, "-m", "mvar_kernels.testing.check")
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "7")
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a tensor's end is an allocation's
BATCH = 25


def again(job: Job, case: str) -> Mapping[str, Job]:
    """The ways to try a failed case again, each of which rules something out."""
    one = replace(job, cases=[case])
    ways = {
        "without wgmma": replace(one, environment={**job.environment, "DISABLE_MMA_V3": "1"}),
        "with one stage": replace(one, command=(*WORKER, "--stages", "1")),
        "launch by launch": replace(one, environment={**job.environment, "CUDA_LAUNCH_BLOCKING": "1"}),
    }
    if shutil.which(SANITIZER[0]) is not None:
        command = (*SANITIZER, *WORKER, "--reruns", "0")
        ways["under memcheck"] = replace(one, command=command, environment={**job.environment, **UNCACHED})
    return ways


def diagnosed(failed: Sequence[tuple[Job, Result]], until: float) -> Iterator[str]:
    """A line for each way in which a failed case was tried again; one case of each process."""
    first = {key(row)[:3]: (job, row) for job, row in reversed(failed)}
    ways = [way for job, row in list(first.values())[:MAX_DIAGNOSED] for way in again(job, row.case).items()]
    names = {id(job): name for name, job in ways}
    for job, row in run([job for _, job in ways], processes=len(ways) or 1, seconds=20, until=until):
        said = row.fault or row.refused or f"error / tolerance {row.worst:.3g}"
        yield f"{' '.join(key(row))}, {names[id(job)]}: {said}"


def timed_jobs(ops: Sequence[str], runs: int) -> list[Job]:
    """The shapes of the GPU's benchmarks, on the backend that `auto` takes."""
    if REHEARSAL:
        return [Job(op, "triton", "float32", [case.name for case in benchmarked(SPECS[op])]) for op in ops]
    command = (*WORKER, "--benchmark-cases", "--reruns", str(runs), "--cuda-graph")
    return [Job(op, "triton", "bfloat16", [case.name for case in SPECS[op].bench_cuda], command=command) for op in ops]


def generation(seconds: float) -> Step:
    return Step("generation", [sys.executable, "-m", "benchmarks.graph_check", "--batch", str(BATCH)], seconds)


def said(found: Iterable[tuple[Job, Result]]) -> Iterator[tuple[Job, Result]]:
    """The same, a line for each that is printed at once."""
    for job, row in found:
        what = row.fault or (row.refused and f"refused: {row.refused}") or f"error / tolerance {row.worst:.3g}"
        print(f"{' '.join(key(row))}: {what}, {row.seconds:.1f} s", flush=True)
        yield job, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(SPECS)}; default: all")
    parser.add_argument("--only-failed", type=Path, metavar="FILE", help="the cases that were wrong in such a file")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it (default: {SECONDS:.0f})")
    options = parser.parse_args()
    require_gpu()
    start = time.monotonic()
    carried.use()
    into = results()
    make_folder(into)
    ops = options.ops or list(SPECS)
    try:
        jobs = planned(ops, None, options.only_failed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not jobs:
        print(f"nothing was wrong in {options.only_failed}")
        return
    cases = sum(len(job.cases) for job in jobs)

    def until(share: float) -> float:
        return start + share * options.seconds

    print(*machine.lines(), "", sep="\n")
    print(
        f"{options.seconds:.0f} s at most: {cases} cases by {len(jobs)} processes, then diagnosis, shapes, generation"
    )
    print(*sorted(f"{name}={value}" for name, value in os.environ.items() if "TRITON" in name), flush=True)

    checked = run(jobs, processes=os.cpu_count() or 1, seconds=CASE_SECONDS, until=until(CASES_END))
    found = list(said(recorded(jobs, checked, into / "check.jsonl")))
    rows = [row for _, row in found]
    compiled, cached = sum(row.compiled for row in rows), sum(row.cached for row in rows)
    print(*table(rows), sep="\n")
    print(f"{len(rows)} of {cases} cases in {time.monotonic() - start:.0f} s", end="; ")
    print(f"kernels: {compiled} compiled, {cached} from Triton's cache", flush=True)
    failed = [(job, row) for job, row in found if not row.right]
    for line in diagnosed(failed, until(DIAGNOSIS_END)) if failed else ():
        print(line, flush=True)
    shapes = timed_jobs(ops, 200 if DEVICE.type == "cuda" else 1)
    checked = run(shapes, processes=4, seconds=CASE_SECONDS, until=until(TIMED_END))
    timed = [row for _, row in said(recorded(shapes, checked, into / "timed.jsonl"))]
    print("timed shapes at batch 2:", *table(timed), sep="\n", flush=True)
    (outcome,) = together([generation(until(1) - time.monotonic())], until(1))
    print(outcome.line())
    # On these `auto` takes Triton: a refusal is a fault.
    wrong = len(failed) + sum(not row.right or row.refused is not None for row in timed) + (outcome.result != "done")
    left = cases - len(rows) + sum(len(job.cases) for job in shapes) - len(timed)
    print(f"{wrong} wrong, {left} not done, {time.monotonic() - start:.0f} s")
    raise SystemExit(1 if wrong or left else 0)


if __name__ == "__main__":
    main()
