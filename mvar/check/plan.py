"""Jobs of `mvar check`, their result file, and the table of results for bug reports."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mvar.check.jobs import Job
from mvar.utils.files import atomic_write
from mvar_kernels.dispatch import OPS, THIRD_PARTY, backends
from mvar_kernels.testing.check import Result
from mvar_kernels.testing.registry import SPECS

DTYPES = ("bfloat16", "float16", "float32")  # the most common ones first
PROCESS_BYTES = 2**31  # GPU memory per process: CUDA context, kernels and cases


def processes() -> int:
    """Number of parallel processes: one per core, on a GPU limited by its free memory."""
    cores = os.cpu_count() or 1
    if not torch.cuda.is_available():
        return cores
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(cores, free // PROCESS_BYTES))


def record_rows(
    jobs: Sequence[Job], results: Iterable[tuple[Job, Result]], path: Path | None
) -> Iterator[tuple[Job, Result]]:
    """Yield the results, and write each row to the file at `path` immediately.

    A row replaces the row of the same case in an existing file; rows of cases outside `jobs` are kept. Cases without a
    row, because the run is interrupted, are written as "not run".
    """
    if path is None:
        yield from results
        return
    rows = {key(row): row for row in (read(path) if path.is_file() else ())}
    not_run = (job.fault(case, "not run") for job in jobs for case in job.cases)
    rows |= {key(row): row for row in not_run}
    _write(path, rows.values())
    for job, row in results:
        rows[key(row)] = row
        _write(path, rows.values())
        yield job, row


def _write(path: Path, rows: Iterable[Result]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))


def plan_jobs(ops: Sequence[str], backend: str | None, only_failed: Path | None) -> list[Job]:
    """One job per op, available backend and dtype.

    Args:
        backend: None for all available backends except the reference and third-party ones.
        only_failed: file of an earlier run, to include only its failed cases.

    Raises:
        ValueError: unknown op, unavailable backend, or no kernel for them.
    """
    if unknown := sorted(set(ops) - set(SPECS)):
        raise ValueError(f"op: expected any of {', '.join(SPECS)}, got {unknown[0]!r}")
    unchecked = ("reference", *THIRD_PARTY)
    available = [name for name, reason in backends().items() if reason is None and name not in unchecked]
    if backend is not None and backend not in available:
        raise ValueError(f"--backend: expected one of {', '.join(available) or '(none available)'}, got {backend!r}")
    failed = None if only_failed is None else {key(row) for row in read(only_failed) if not row.right}
    jobs = []
    for dtype in DTYPES:
        for name in [backend] if backend is not None else available:
            for op in ops:
                if name not in OPS[op].modules:
                    continue
                cases = [case.name for case in SPECS[op].cases]
                if failed is not None:
                    cases = [case for case in cases if (op, name, dtype, case) in failed]
                if cases:
                    jobs.append(Job(op, name, dtype, cases, {"OMP_NUM_THREADS": "1"}))
    if not jobs and failed is None:
        raise ValueError("nothing to check: none of these kernels is available on this machine")
    return jobs


def key(row: Result) -> tuple[str, str, str, str]:
    return row.op, row.backend, row.dtype, row.case


def read(path: Path) -> list[Result]:
    """Read the rows of a file that `mvar check --out` wrote. Raises ValueError if it is not such a file."""
    try:
        return [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a file of `mvar check --out`: {error}") from error


def verdict(worst: float) -> str:
    """Likely cause of an error, given as a multiple of its tolerance: rounding ("arithmetic") or a bug ("fault")."""
    if worst <= 1:
        return "right"
    return "arithmetic" if worst <= 5 else "fault" if worst >= 30 else "unclear"


def table(rows: Iterable[Result]) -> list[str]:
    """One line per op, backend and dtype, and one per failed case."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for row in rows:
        groups.setdefault((row.op, row.backend, row.dtype), []).append(row)
    lines = [f"{'op':16s} {'backend':8s} {'dtype':9s} {'right':>7s}  worst error / tolerance", ""]
    wrong = []
    for group, found in sorted(groups.items()):
        supported = [row for row in found if row.refused is None]
        prefix = " ".join(f"{text:{width}s}" for text, width in zip(group, (16, 8, 9), strict=True))
        if not supported:
            reason = (found[0].refused or "").rpartition(", but: ")[2]
            lines.append(f"{prefix}       –  not supported: {reason}")
            continue
        worst = max(supported, key=lambda row: row.worst)
        right = sum(row.right for row in supported)
        lines.append(
            f"{prefix} {right:3d}/{len(supported):<3d}  {worst.worst:8.3g}  {verdict(worst.worst)}: {worst.case}"
        )
        wrong += [row for row in supported if not row.right]
    for row in wrong:
        exceeded = [f"{name} {share:.3g}" for name, share in row.shares.items() if not share <= 1]
        details = ([row.fault] if row.fault else []) + exceeded
        lines.append(f"WRONG {' '.join(key(row))}: {'; '.join(details)}")
    return lines
