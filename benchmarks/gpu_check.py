"""Which kernels are correct on this GPU, within 100 s: `python -m benchmarks.gpu_check` (`make gpu-check`).

Without a build; precompiled kernels (precompile.py) are used. In order, each with its share of the time:

1. every case of every op, 16-bit dtypes first, as `mvar check` does, a process for each op, backend and dtype;
2. of what failed, one case of each process again: without wgmma, with one pipeline stage, with blocking launches, and
   under compute-sanitizer, all at once, to find whether the kernel or Triton is at fault, and where;
3. the shapes that are timed, at batch 2: 200 runs with the same bits, and a replay from a CUDA graph;
4. one d16 generation with a CUDA graph and without: equal tokens, and the time of each.

Rows are written as they come, to results/<GPU>/check.jsonl and timed.jsonl, so a run that is cut leaves what it found.
Exits with 1 if anything was wrong or not done. `--only-failed FILE` runs only what was wrong in such a file. Without a
GPU, MVAR_REHEARSAL=1 TRITON_INTERPRET=1 rehearses it: the kernels on the CPU, as many as the time allows.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import mvar
from benchmarks.common import kernel_cache
from benchmarks.common.environment import DEVICE, REHEARSAL, argument_parser, require_gpu
from benchmarks.common.op_calls import benchmark_cases
from benchmarks.common.processes import Step, run_step
from benchmarks.common.results import folder
from benchmarks.common.timing import interleaved
from benchmarks.generation.methods import random_pair
from mvar.check.jobs import Job, run
from mvar.check.plan import key, plan_jobs, record_rows, table
from mvar.cli import info
from mvar.utils.files import make_folder
from mvar_kernels.testing.check import Result
from mvar_kernels.testing.registry import SPECS

SECONDS = 100.0
# The share of it after which each part ends at the latest.
CASES_END, DIAGNOSIS_END, TIMED_END = 0.55, 0.7, 0.85
CASE_SECONDS = 40.0
MAX_DIAGNOSED = 6
WORKER = (sys.executable, "-m", "mvar_kernels.testing.check")
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "7")
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a tensor ends where its allocation does
BATCH = 25


def variants_of(job: Job, case: str) -> Mapping[str, Job]:
    """The variants in which a failed case runs again, each of which rules out one cause."""
    one = replace(job, cases=[case])
    variants = {
        "without wgmma": replace(one, environment={**job.environment, "DISABLE_MMA_V3": "1"}),
        "with one stage": replace(one, command=(*WORKER, "--stages", "1")),
        "launch by launch": replace(one, environment={**job.environment, "CUDA_LAUNCH_BLOCKING": "1"}),
    }
    if shutil.which(SANITIZER[0]) is not None:
        command = (*SANITIZER, *WORKER, "--reruns", "0")
        variants["under memcheck"] = replace(one, command=command, environment={**job.environment, **UNCACHED})
    return variants


def diagnose(failed: Sequence[tuple[Job, Result]], until: float) -> Iterator[str]:
    """A line for each variant of the first failed case of each process."""
    first = {key(row)[:3]: (job, row) for job, row in reversed(failed)}
    variants = [
        each for job, row in list(first.values())[:MAX_DIAGNOSED] for each in variants_of(job, row.case).items()
    ]
    names = {id(job): name for name, job in variants}
    for job, row in run([job for _, job in variants], processes=len(variants) or 1, seconds=20, until=until):
        yield f"{' '.join(key(row))}, {names[id(job)]}: {finding(row)}"


def finding(row: Result) -> str:
    return row.fault or (row.refused and f"refused: {row.refused}") or f"error / tolerance {row.worst:.3g}"


def timed_jobs(ops: Sequence[str], runs: int) -> list[Job]:
    """The shapes of the GPU's benchmarks, on the backend that "auto" selects."""
    if REHEARSAL:
        return [Job(op, "triton", "float32", [case.name for case in benchmark_cases(SPECS[op])]) for op in ops]
    command = (*WORKER, "--benchmark-cases", "--reruns", str(runs), "--cuda-graph")
    return [Job(op, "triton", "bfloat16", [case.name for case in SPECS[op].bench_cuda], command=command) for op in ops]


def generation(seconds: float) -> Step:
    code = "from benchmarks import gpu_check; gpu_check.compare_cuda_graph()"
    return Step("generation", [sys.executable, "-c", code], seconds)


def compare_cuda_graph() -> None:
    """One d16 generation in bfloat16 with a CUDA graph and without: exits with 1 where tokens or images differ.

    Without a GPU: a small model, no graph.
    """
    on_gpu = DEVICE.type == "cuda"
    model, tokenizer = random_pair(16, 256, "mvar") if on_gpu else mvar.build(1, patch_nums=(1, 2))
    dtype = torch.bfloat16 if on_gpu else torch.float32
    generate = partial(mvar.generate, model, tokenizer, list(range(BATCH)), dtype=dtype)
    runs = {"eager": partial(generate, graph=False), "graph": partial(generate, graph=True if on_gpu else None)}
    for _ in range(2):
        eager, replayed = (run() for run in runs.values())
    ms = interleaved(runs, rounds=1, seconds=0, warm_up=False)
    same = torch.equal(eager.tokens, replayed.tokens) and torch.equal(eager.images, replayed.images)
    told = "the same tokens and images" if same else "DIFFERENT tokens or images"
    print(f"batch {BATCH}: {ms['eager']:.0f} ms, {ms['graph']:.0f} ms from a CUDA graph; {told}")
    sys.exit(0 if same else 1)


def printed(found: Iterable[tuple[Job, Result]]) -> Iterator[tuple[Job, Result]]:
    """The same; a line for each is printed at once."""
    for job, row in found:
        print(f"{' '.join(key(row))}: {finding(row)}, {row.seconds:.1f} s", flush=True)
        yield job, row


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(SPECS)}; default: all")
    parser.add_argument("--only-failed", type=Path, metavar="FILE", help="the cases that were wrong in such a file")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS:.0f})")
    options = parser.parse_args()
    require_gpu()
    start = time.monotonic()
    kernel_cache.use_precompiled()
    into = folder()
    make_folder(into)
    ops = options.ops or list(SPECS)
    try:
        jobs = plan_jobs(ops, None, options.only_failed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not jobs:
        print(f"no failed cases in {options.only_failed}")
        return
    cases = sum(len(job.cases) for job in jobs)

    def until(share: float) -> float:
        return start + share * options.seconds

    print(*info.lines(), "", sep="\n")
    print(
        f"{options.seconds:.0f} s at most: {cases} cases by {len(jobs)} processes, then diagnosis, shapes, generation"
    )
    print(*sorted(f"{name}={value}" for name, value in os.environ.items() if "TRITON" in name), flush=True)

    checked = run(jobs, processes=os.cpu_count() or 1, seconds=CASE_SECONDS, until=until(CASES_END))
    found = list(printed(record_rows(jobs, checked, into / "check.jsonl")))
    rows = [row for _, row in found]
    compiled, cached = sum(row.compiled for row in rows), sum(row.cached for row in rows)
    print(*table(rows), sep="\n")
    print(f"{len(rows)} of {cases} cases in {time.monotonic() - start:.0f} s", end="; ")
    print(f"kernels: {compiled} compiled, {cached} from Triton's cache", flush=True)
    failed = [(job, row) for job, row in found if not row.right]
    for line in diagnose(failed, until(DIAGNOSIS_END)) if failed else ():
        print(line, flush=True)
    shapes = timed_jobs(ops, 200 if DEVICE.type == "cuda" else 1)
    checked = run(shapes, processes=4, seconds=CASE_SECONDS, until=until(TIMED_END))
    timed = [row for _, row in printed(record_rows(shapes, checked, into / "timed.jsonl"))]
    print("timed shapes at batch 2:", *table(timed), sep="\n", flush=True)
    generated = run_step(generation(until(1) - time.monotonic()), until(1))
    # On these "auto" selects Triton: a refusal is a fault.
    wrong = len(failed) + sum(not row.right or row.refused is not None for row in timed) + (not generated)
    left = cases - len(rows) + sum(len(job.cases) for job in shapes) - len(timed)
    print(f"{wrong} wrong, {left} not done, {time.monotonic() - start:.0f} s")
    raise SystemExit(1 if wrong or left else 0)


if __name__ == "__main__":
    main()
