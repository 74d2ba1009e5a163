"""Download the third-party kernels that are timed as baselines: `python -m benchmarks.fetch_third_party`.

Wheels of flash-linear-attention and Liger, and the Triton kernels of mamba_ssm's source archive, whose wheels need a
build. Nothing is built or installed, and nothing of them is part of this project.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from benchmarks.baselines.third_party import FOLDER
from mvar.utils.files import make_folder

WHEELS = ("fla-core==0.6.0", "liger-kernel==0.8.5")
ARCHIVE = "mamba-ssm==2.3.2.post1"
FROM_ARCHIVE = ("mamba_ssm/ops/triton/", "mamba_ssm/utils/torch.py", "mamba_ssm/utils/determinism.py")


def fetch(folder: Path) -> None:
    """Download from pip's index and unpack into `folder`, which is replaced."""
    make_folder(folder.parent)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as downloads:
        unpacked = Path(downloads) / "unpacked"
        subprocess.run([*pip, "--only-binary", ":all:", "--dest", downloads, *WHEELS], check=True)
        # pip runs the archive's setup.py for its metadata, which then asks for no CUDA compiler.
        environment = os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE"}
        source = [*pip, "--no-binary", ":all:", "--no-build-isolation", "--dest", downloads, ARCHIVE]
        subprocess.run(source, check=True, env=environment)
        for wheel in Path(downloads).glob("*.whl"):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(unpacked)
        for archive in Path(downloads).glob("*.tar.gz"):
            unpack_kernels(archive, unpacked)
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)


def unpack_kernels(archive: Path, folder: Path) -> None:
    """Without the package's __init__, which imports a CUDA extension: the folder is then a namespace package."""
    with tarfile.open(archive) as content:
        for member in content.getmembers():
            member.name = member.name.partition("/")[2]
            if member.isfile() and member.name.endswith(".py") and member.name.startswith(FROM_ARCHIVE):
                content.extract(member, folder, filter="data")


def main() -> None:
    fetch(FOLDER)
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{', '.join((*WHEELS, ARCHIVE))}: {size / 2**20:.1f} MiB in {FOLDER}")


if __name__ == "__main__":
    main()
