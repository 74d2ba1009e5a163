"""Kernels for scale-wise autoregressive image models, usable without the rest of mvar.

Importing this package imports torch, and never Triton until a Triton kernel is used.
"""

from typing import TYPE_CHECKING, Any

from mvar_kernels.dispatch import BackendError, backends
from mvar_kernels.ops.adaln.op import adaln, gated_adaln
from mvar_kernels.ops.group_norm_silu.op import group_norm_silu
from mvar_kernels.ops.mamba2.mixer import Mamba2State, mamba2_mixer
from mvar_kernels.ops.mamba2.scan import ssd_scan
from mvar_kernels.ops.sample_tokens.op import sample_tokens, soft_embedding
from mvar_kernels.ops.scale_attention.op import scale_attention

if TYPE_CHECKING:
    from mvar_kernels.patching import Report, accelerate, restore

__all__ = [
    "BackendError",
    "Mamba2State",
    "Report",
    "accelerate",
    "adaln",
    "backends",
    "gated_adaln",
    "group_norm_silu",
    "mamba2_mixer",
    "restore",
    "sample_tokens",
    "scale_attention",
    "soft_embedding",
    "ssd_scan",
]


def __getattr__(name: str) -> Any:
    """What needs torch.compiler.disable, at its first use: it imports torch._dynamo, and that sympy and Triton, which
    made up 1.9 of the 4.3 s of `import mvar_kernels` (AMD EPYC, Zen 3)."""
    if name in ("Report", "accelerate", "restore"):
        from mvar_kernels import patching

        return getattr(patching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
