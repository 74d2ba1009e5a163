"""Kernels of other projects to be timed beside ours: `python -m benchmarks.peers` fetches them into `FOLDER`.

mamba_ssm's Triton kernels (out of its source archive, for there are no wheels that need no build), the causal
convolution of flash-linear-attention in Triton, and Liger's layer norm. Nothing is built or installed, and nothing of
them is part of this project; `python -m benchmarks.carry` compiles them for a GPU machine beside our own.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch.nn.functional as F
from torch import Tensor

from benchmarks.steps import ROOT
from mvar.files import make_folder
from mvar_kernels.ops.adaln.spec import EPS as ADALN_EPS
from mvar_kernels.ops.mamba2.spec import EPS
from mvar_kernels.testing.spec import Case, Inputs

FOLDER = ROOT / "build" / "carry" / "peers"
WHEELS = ("fla-core==0.6.0", "liger-kernel==0.8.5")
ARCHIVE = "mamba-ssm==2.3.2.post1"
FROM_ARCHIVE = ("mamba_ssm/ops/triton/", "mamba_ssm/utils/torch.py", "mamba_ssm/utils/determinism.py")
CHUNK = 256  # mamba_ssm's default
TUNING_MS = (2, 10)  # to warm up and to time each tile of theirs; Triton takes 25 and 100


def importable() -> None:
    """Let what was fetched be imported, after what is installed."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def load() -> None:
    """Import them all."""
    for name in ("fla.modules", "mamba_ssm.ops.triton.ssd_combined", "liger_kernel.ops.layer_norm"):
        import_module(name)


def has_mamba_ssm() -> bool:
    return _is_there("mamba_ssm.ops.triton") and _is_there("fla.modules")


def has_liger() -> bool:
    return _is_there("liger_kernel.ops")


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # of a package around it
        return False


@contextmanager
def short_autotuning() -> Iterator[None]:
    """Their tiles are chosen by shorter measurements: some 150 of them are a quarter of a minute else."""
    import triton.testing
    from triton.runtime.driver import driver

    warmup, rep = TUNING_MS
    benchmark = partial(triton.testing.do_bench, warmup=warmup, rep=rep)
    with mock.patch.object(type(driver.active), "get_benchmarker", lambda self: benchmark):
        yield


def mamba2_mixer(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    """The mixer of mamba_ssm's Mamba2 module with state in and out: fla's convolution, its scan and gated norm.

    mamba_ssm's own convolution is a CUDA extension that is built from source.
    """
    from fla.modules.causal_conv1d import causal_conv1d
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    H, P, N = (case.sizes[d] for d in "HPN")
    z, xBC = t["zxbcdt"].split([H * P, H * P + 2 * N], -1)
    before = F.pad(t["conv"].transpose(1, 2), (1, 0))  # it takes and gives four tokens, of which three are used
    xBC, after = causal_conv1d(
        xBC,
        t["conv_weight"],
        t["conv_bias"],
        initial_state=before,
        output_final_state=True,
        activation="silu",
    )
    x, B, C = xBC.split([H * P, N, N], -1)
    y, state = mamba_chunk_scan_combined(
        x.unflatten(-1, (H, P)),
        t["dt"],
        -t["A_log"].exp(),
        B[:, :, None],
        C[:, :, None],
        CHUNK,
        D=t["D"],
        dt_bias=t["dt_bias"],
        initial_states=t["ssm"],
        dt_softplus=True,
        return_final_states=True,
    )
    y = rmsnorm_fn(y.flatten(2), t["norm_weight"], None, z=z, eps=EPS, norm_before_gate=False)
    return y, after[:, :, 1:].transpose(1, 2), state


def takes_mixer(t: Inputs, case: Case) -> bool:
    """Several tokens in one direction, with dt beside the rest."""
    one_direction = case.options["scales"] is None and case.sizes["L"] > 1
    return one_direction and "dt" in t and has_mamba_ssm()


def layer_norm(x: Tensor) -> Tensor:
    """Liger's, over the last dimension, without weight and bias."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    weight, bias = (x.new_full(x.shape[-1:], value) for value in (1.0, 0.0))
    normed: Tensor = LigerLayerNormFunction.apply(x, weight, bias, ADALN_EPS)
    return normed


def takes_adaln(t: Inputs, case: Case) -> bool:
    return has_liger()


def fetch(folder: Path) -> None:
    """Download from pip's index, unpack, and put in the place of what is there."""
    make_folder(folder.parent)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / "unpacked"
        into = ["--dest", scratch]
        subprocess.run([*pip, "--only-binary", ":all:", *into, *WHEELS], check=True)
        # pip runs the archive's setup.py for its name and version; told so, it asks for no CUDA compiler.
        environment = os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE"}
        sources = ["--no-binary", ":all:", "--no-build-isolation", *into, ARCHIVE]
        subprocess.run([*pip, *sources], check=True, env=environment)
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(whole)
        for archive in Path(scratch).glob("*.tar.gz"):
            unpack_some(archive, whole)
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)


def unpack_some(archive: Path, folder: Path) -> None:
    """The kernels alone: the package's own __init__ imports a CUDA extension, without one it is a plain folder."""
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
