"""`mvar check`: every kernel that runs on this machine against a float64 reference."""

import argparse
import sys

from mvar.cli.options import path

HELP = "compare every kernel that runs on this machine with a float64 reference, forward and backward"
EXAMPLES = """\
mvar check
mvar check scale_attention --backend triton --out check.jsonl
mvar check --only-failed check.jsonl"""
CASE_SECONDS = 120.0  # time limit of one case, which may include compilation for a GPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="op", help="such as scale_attention (default: all)")
    parser.add_argument("--backend", default=None, help="check only this backend (default: all but the reference)")
    parser.add_argument("--out", type=path, help="JSON Lines file for the results, one line per case")
    parser.add_argument(
        "--only-failed", type=path, metavar="FILE", help="check only the cases that failed in such a file"
    )


def run(options: argparse.Namespace) -> None:
    """Run the cases and print a table. Exits with 1 if a case failed."""
    from tqdm import tqdm

    from mvar.check.jobs import run as run_jobs
    from mvar.check.plan import plan_jobs, processes, record_rows, table
    from mvar.cli import info
    from mvar.utils.files import check_writable
    from mvar_kernels.testing.registry import SPECS

    if options.out is not None:
        check_writable(options.out)
    jobs = plan_jobs(options.ops or tuple(SPECS), options.backend, options.only_failed)
    if not jobs:
        print(f"no failed cases in {options.only_failed}")
        return
    cases = sum(len(job.cases) for job in jobs)
    print(*info.lines(), "", sep="\n")
    print(f"{cases} cases of {len({job.op for job in jobs})} ops: a minute or two", flush=True)
    results = record_rows(jobs, run_jobs(jobs, processes=processes(), seconds=CASE_SECONDS), options.out)
    rows = [row for _, row in tqdm(results, total=cases, unit="case", disable=None)]
    print(*table(rows), sep="\n")
    wrong = [row for row in rows if not row.right]
    print(f"{len(wrong)} of {len(rows)} cases failed" if wrong else "all cases passed")
    if wrong:
        sys.exit(1)
