"""`mvar check`: every kernel that runs on this machine against float64, as a table that a bug report should carry."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from mvar import machine
from mvar.check.jobs import Job, run
from mvar.files import check_writable, replacing
from mvar_kernels.dispatch import OPS, THIRD_PARTY, backends
from mvar_kernels.testing.check import Result
from mvar_kernels.testing.registry import SPECS

DTYPES = ("bfloat16", "float16", "float32")  # what is used most goes first
PROCESS_BYTES = 2**31
SECONDS = 120.0  # of one case, in which a GPU's kernels may have to be compiled


def check(options: argparse.Namespace) -> None:
    """Check, print the table, and exit with 1 if anything is wrong."""
    if options.out is not None:
        check_writable(options.out)
    jobs = planned(options.ops or tuple(SPECS), options.backend, options.only_failed)
    if not jobs:
        print(f"nothing was wrong in {options.only_failed}")
        return
    cases = sum(len(job.cases) for job in jobs)
    print(*machine.lines(), "", sep="\n")
    print(f"{cases} cases of {len({job.op for job in jobs})} ops: a minute or two", flush=True)
    found = recorded(jobs, run(jobs, processes=processes(), seconds=SECONDS), options.out)
    rows = [row for _, row in tqdm(found, total=cases, unit="case", disable=None)]
    print(*table(rows), sep="\n")
    wrong = [row for row in rows if not row.right]
    print(f"{len(wrong)} of {len(rows)} cases are wrong" if wrong else "all right")
    if wrong:
        sys.exit(1)


def processes() -> int:
    """One for each core; on a GPU no more than its free memory has room for, context, kernels and cases of each."""
    cores = os.cpu_count() or 1
    if not torch.cuda.is_available():
        return cores
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(cores, free // PROCESS_BYTES))


def recorded(
    jobs: Sequence[Job], found: Iterable[tuple[Job, Result]], path: Path | None
) -> Iterator[tuple[Job, Result]]:
    """What is found, and each row in the file as soon as it comes, in the place of one of the same case.

    A case that no row comes of, for the run is cut, is in the file as one that was not tried; rows of others stay.
    """
    if path is None:
        yield from found
        return
    rows = {key(row): row for row in (read(path) if path.is_file() else ())}
    untried = (job.fault(case, "not tried") for job in jobs for case in job.cases)
    rows |= {key(row): row for row in untried}
    _write(path, rows.values())
    for job, row in found:
        rows[key(row)] = row
        _write(path, rows.values())
        yield job, row


def _write(path: Path, rows: Iterable[Result]) -> None:
    with replacing(path) as aside:
        aside.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))


def planned(ops: Sequence[str], backend: str | None, only_failed: Path | None) -> list[Job]:
    """A job for each op, backend that is available here and dtype; of an earlier run's file what was wrong there.

    No job where nothing was wrong there. Raises ValueError for an unknown op or backend, and where there is no kernel.
    """
    if unknown := sorted(set(ops) - set(SPECS)):
        raise ValueError(f"op: expected any of {', '.join(SPECS)}, got {unknown[0]!r}")
    found = [name for name, reason in backends().items() if reason is None and name not in ("reference", *THIRD_PARTY)]
    if backend is not None and backend not in found:
        raise ValueError(f"--backend: expected one of {', '.join(found) or 'none that is available'}, got {backend!r}")
    failed = None if only_failed is None else {key(row) for row in read(only_failed) if not row.right}
    jobs = []
    for dtype in DTYPES:
        for name in [backend] if backend is not None else found:
            for op in ops:
                if name not in OPS[op].modules:
                    continue
                cases = [case.name for case in SPECS[op].cases]
                if failed is not None:
                    cases = [case for case in cases if (op, name, dtype, case) in failed]
                if cases:
                    jobs.append(Job(op, name, dtype, cases, {"OMP_NUM_THREADS": "1"}))
    if not jobs and failed is None:
        raise ValueError("nothing to check: no such kernel is available here")
    return jobs


def key(row: Result) -> tuple[str, str, str, str]:
    return row.op, row.backend, row.dtype, row.case


def read(path: Path) -> list[Result]:
    """The rows of a file that was written before. Raises ValueError where it is none."""
    try:
        return [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: no rows of `mvar check --out`: {error}") from error


def verdict(worst: float) -> str:
    """What an error over its tolerance is likely to be."""
    if worst <= 1:
        return "right"
    return "arithmetic" if worst <= 5 else "fault" if worst >= 30 else "unclear"


def table(rows: Iterable[Result]) -> list[str]:
    """A line for each op, backend and dtype, and one for each case that is wrong."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for row in rows:
        groups.setdefault((row.op, row.backend, row.dtype), []).append(row)
    lines = [f"{'op':16s} {'backend':8s} {'dtype':9s} {'right':>7s}  worst error / tolerance", ""]
    wrong = []
    for group, found in sorted(groups.items()):
        offered = [row for row in found if row.refused is None]
        begin = " ".join(f"{text:{width}s}" for text, width in zip(group, (16, 8, 9), strict=True))
        if not offered:
            why = (found[0].refused or "").rpartition("asked for, but: ")[2]
            lines.append(f"{begin}       –  not offered: {why}")
            continue
        worst = max(offered, key=lambda row: row.worst)
        right = sum(row.right for row in offered)
        lines.append(f"{begin} {right:3d}/{len(offered):<3d}  {worst.worst:8.3g}  {verdict(worst.worst)}: {worst.case}")
        wrong += [row for row in offered if not row.right]
    for row in wrong:
        beyond = {name: share for name, share in row.shares.items() if not share <= 1}
        said = ([row.fault] if row.fault else []) + [f"{name} {share:.3g}" for name, share in beyond.items()]
        lines.append(f"WRONG {' '.join(key(row))}: {'; '.join(said)}")
    return lines
