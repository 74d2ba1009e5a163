"""The archive of compiled Triton kernels that precompile.py makes, and its use by the GPU stages.

They unpack it into `CACHE`, the same absolute path on both machines because Triton's index files contain it.
"""

import lzma
import os
import tarfile
from pathlib import Path

from benchmarks.common.results import ROOT
from mvar.utils.files import atomic_write, make_folder

CACHE = Path("/tmp/mvar_triton_cache")
ARCHIVE = ROOT / "build" / "precompiled" / "triton_cache.tar.xz"
SUFFIXES = (".cubin", ".json", ".so")  # what a launch reads


def pack(cache: Path, archive: Path) -> int:
    """Write what a launch reads of a cache into an archive; returns the number of kernels."""
    files = sorted(path for path in cache.rglob("*") if path.suffix in SUFFIXES)
    make_folder(archive.parent)
    with atomic_write(archive) as temporary, tarfile.open(temporary, "w:xz") as content:
        for path in files:
            content.add(path, path.relative_to(cache))
    return sum(path.suffix == ".cubin" for path in files)


def unpack(archive: Path, cache: Path) -> int:
    """Add the kernels of an archive to a cache; returns their number. Files that exist may be in use and stay."""
    with tarfile.open(archive) as content:
        members = content.getmembers()
        new = [member for member in members if not (cache / member.name).is_file()]
        content.extractall(cache, new, filter="data")
        return sum(member.name.endswith(".cubin") for member in members)


def use_precompiled() -> None:
    """Let this process and its children find the precompiled kernels, if there are any."""
    if not ARCHIVE.exists():
        return
    try:
        print(f"{unpack(ARCHIVE, CACHE)} compiled kernels unpacked into {CACHE}", flush=True)
        os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        print(f"{ARCHIVE} cannot be unpacked, kernels are compiled here: {error}", flush=True)
