"""`mvar bench`: the benchmarks of the repository, each suite in a process of its own."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# glibc returns large blocks to the system at once and takes them back page by page, which moves eager timings by
# several times; with these every side keeps its memory. They have to be set before a process starts.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}


def bench(options: argparse.Namespace) -> None:
    """Run the suites asked for, then the report if asked for.

    Raises FileNotFoundError where mvar was installed without its repository, RuntimeError where a suite fails.
    """
    if not (options.suite or options.report):
        raise ValueError("nothing to do: give --suite or --report")
    if not (ROOT / "benchmarks" / "__init__.py").is_file():
        raise FileNotFoundError(
            f"{ROOT / 'benchmarks'} is missing: the benchmarks are in mvar's repository, not in the installed package; "
            "clone it and install it with pip install -e ."
        )
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    readable = {"PYTHONIOENCODING": f"{encoding}:backslashreplace"}  # the suites print more than a log's ASCII has
    for suite in [*(options.suite or []), *(["report"] if options.report else [])]:
        command = [sys.executable, "-m", f"benchmarks.{suite}", *(options.arguments if suite != "report" else [])]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | ALLOCATOR | readable).returncode
        if code:
            raise RuntimeError(f"suite {suite} ended with exit code {code}")
