"""Triton's cache for a GPU machine whose minutes are not for compiling: `python -m benchmarks.carry --python PYTHON`.

PYTHON: an interpreter of the GPU machine's version, with its version of Triton and any torch, numpy and mvar's other
dependencies; Triton's keys follow from these, the kernels' sources and the architecture, not from a GPU. All kernels of
the contract (three dtypes, three layouts) and of the benchmarks (every tile in bfloat16) are compiled there ahead, into
`CACHE`: a path that is the same everywhere, for Triton's index files hold it. Their machine code goes into `ARCHIVE`,
to be carried along with the tree, of the same commit; `python -m benchmarks.gpu_check` unpacks it, and its rows count
how many kernels were found.
"""

import argparse
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

from benchmarks.steps import ROOT
from mvar.check.command import DTYPES
from mvar.files import make_folder, replacing

CACHE = Path("/tmp/mvar_triton_cache")
ARCHIVE = ROOT / "build" / "carry" / "triton_cache.tar.xz"
KEPT = (".cubin", ".json")  # what a launch reads


def pack(cache: Path, archive: Path) -> int:
    """Write what a launch reads of a cache; returns how many kernels that is."""
    files = sorted(path for path in cache.rglob("*") if path.suffix in KEPT)
    make_folder(archive.parent)
    with replacing(archive) as aside, tarfile.open(aside, "w:xz") as content:
        for path in files:
            content.add(path, path.relative_to(cache))
    return sum(path.suffix == ".cubin" for path in files)


def unpack(archive: Path, cache: Path) -> int:
    """Put the kernels of an archive into a cache, beside those that are there; returns how many they are."""
    with tarfile.open(archive) as content:
        content.extractall(cache, filter="data")
        return sum(name.endswith(".cubin") for name in content.getnames())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="with the GPU machine's Triton")
    parser.add_argument("--arch", default="sm_90", help="(default: sm_90)")
    parser.add_argument("ops", nargs="*", metavar="op", help="(default: all)")
    options = parser.parse_args()
    shutil.rmtree(CACHE, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(CACHE), "PYTHONPATH": str(ROOT)}
    compiling = [options.python, "tests/compile_ahead.py", *options.ops, "--arch", options.arch]
    start = time.monotonic()
    for more in (["--all", "--tiles", "first", "--dtypes", *DTYPES], ["--tiles", "every"]):
        done = subprocess.run([*compiling, *more], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        if not done.stdout:  # a kernel's fault is told, and does not keep it from being carried
            raise SystemExit(f"{' '.join([*compiling, *more])}: exit status {done.returncode}")
        print(*(line for line in done.stdout.splitlines() if "FAULT" in line), sep="\n")
    kernels = pack(CACHE, ARCHIVE)
    size = ARCHIVE.stat().st_size / 2**20
    print(f"{kernels} kernels, {size:.1f} MiB in {ARCHIVE}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
