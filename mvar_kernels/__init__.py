"""Kernels for scale-wise autoregressive image models, usable without the rest of mvar.

Importing this package imports torch, and never Triton until a Triton kernel is asked for.
"""

from mvar_kernels.backends import BackendError, backends
from mvar_kernels.ops.adaln.op import adaln, gated_adaln
from mvar_kernels.ops.mamba2.mixer import Mamba2State, mamba2_mixer
from mvar_kernels.ops.mamba2.scan import ssd_scan
from mvar_kernels.ops.sample_tokens.op import sample_tokens, soft_embedding
from mvar_kernels.ops.scale_attention.op import scale_attention
from mvar_kernels.plug_in import Report, accelerate, restore

__all__ = [
    "BackendError",
    "Mamba2State",
    "Report",
    "accelerate",
    "adaln",
    "backends",
    "gated_adaln",
    "mamba2_mixer",
    "restore",
    "sample_tokens",
    "scale_attention",
    "soft_embedding",
    "ssd_scan",
]
