"""GroupNorm and SiLU in PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.group_norm_silu.inputs import GroupNormSiLU


def group_norm_silu(call: GroupNormSiLU) -> tuple[Tensor]:
    """In the parameters' dtype, which may be wider than x's, rounded to x's."""
    x, weight, bias, groups, eps, channels_last = call
    if channels_last:
        x = x.transpose(1, 2)[:, :, None]  # (B, C, 1, L), in a memory format that PyTorch reads in place on a CPU
    normed = torch.group_norm(x.to(weight.dtype), groups, weight, bias, eps)
    out = F.silu(normed, inplace=True).to(x.dtype)
    return (out[:, :, 0].transpose(1, 2) if channels_last else out,)


group_norm_silu_reference = Implementation(lambda call: None, group_norm_silu, None)
