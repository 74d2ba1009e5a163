"""The archive of compiled kernels that carry.py makes, and how the stages on a GPU machine use it.

They unpack it into `CACHE`, a path that is the same everywhere, for Triton's index files hold it; the rows of the check
count how many kernels were found there and how many had to be compiled.
"""

import lzma
import os
import tarfile
from pathlib import Path

from benchmarks.steps import ROOT
from mvar.files import make_folder, replacing

CACHE = Path("/tmp/mvar_triton_cache")
ARCHIVE = ROOT / "build" / "carry" / "triton_cache.tar.xz"
KEPT = (".cubin", ".json", ".so")  # what a launch reads


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
        members = content.getmembers()
        there = {member for member in members if (cache / member.name).is_file()}  # maybe in use
        content.extractall(cache, [member for member in members if member not in there], filter="data")
        return sum(member.name.endswith(".cubin") for member in members)


def use() -> None:
    """Let this process and those that it starts find what was carried, if anything was."""
    if not ARCHIVE.exists():
        return
    try:
        print(f"{unpack(ARCHIVE, CACHE)} compiled kernels unpacked into {CACHE}", flush=True)
        os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        print(f"{ARCHIVE}: kernels are compiled here, for it cannot be unpacked: {error}", flush=True)
