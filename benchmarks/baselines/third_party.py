"""Third-party kernels as baselines: mamba_ssm's Triton kernels, the causal convolution of flash-linear-attention in
Triton, and Liger's layer norm. fetch_third_party.py downloads them into `FOLDER`; nothing is installed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.results import ROOT
from mvar_kernels.ops.adaln.spec import EPS as ADALN_EPS
from mvar_kernels.ops.mamba2.spec import EPS
from mvar_kernels.testing.spec import Case, Inputs

FOLDER = ROOT / "build" / "precompiled" / "third_party"
CHUNK = 256  # mamba_ssm's default
AUTOTUNING_MS = (2, 10)  # warm-up and timing of each of their configurations; Triton's defaults are 25 and 100


def add_to_path() -> None:
    """Put `FOLDER` at the end of the import path: installed packages go first."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def load() -> None:
    """Import them all."""
    for name in ("fla.modules", "mamba_ssm.ops.triton.ssd_combined", "liger_kernel.ops.layer_norm"):
        import_module(name)


def has_mamba_ssm() -> bool:
    return _can_import("mamba_ssm.ops.triton") and _can_import("fla.modules")


def has_liger() -> bool:
    return _can_import("liger_kernel.ops")


def _can_import(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # of a parent package
        return False


@contextmanager
def short_autotuning() -> Iterator[None]:
    """Autotune with shorter measurements: some 150 configurations would take a quarter of a minute."""
    import triton.testing
    from triton.runtime.driver import driver

    warmup, rep = AUTOTUNING_MS
    default = driver.active.get_benchmarker
    driver.active.get_benchmarker = lambda: partial(triton.testing.do_bench, warmup=warmup, rep=rep)
    try:
        yield
    finally:
        driver.active.get_benchmarker = default


def mamba2_mixer(t: Inputs, case: Case) -> tuple[Tensor, ...]:
    """The mixer of mamba_ssm's Mamba2 module with state in and out: its scan and gated norm, and fla's convolution,
    since mamba_ssm's is a CUDA extension that is built from source."""
    from fla.modules.causal_conv1d import causal_conv1d
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    H, P, N = (case.sizes[d] for d in "HPN")
    z, xBC = t["zxbcdt"].split([H * P, H * P + 2 * N], -1)
    before = F.pad(t["conv"].transpose(1, 2), (1, 0))  # its state is four tokens, of which three are used
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


def supports_mixer(t: Inputs, case: Case) -> bool:
    """Several tokens in one direction, with dt as an input of its own."""
    one_direction = case.options["scales"] is None and case.sizes["L"] > 1
    return one_direction and "dt" in t and has_mamba_ssm()


def layer_norm(x: Tensor) -> Tensor:
    """Liger's, over the last dimension, with weight 1 and bias 0."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    weight, bias = (x.new_full(x.shape[-1:], value) for value in (1.0, 0.0))
    normed: Tensor = LigerLayerNormFunction.apply(x, weight, bias, ADALN_EPS)
    return normed


def supports_adaln(t: Inputs, case: Case) -> bool:
    return has_liger()
