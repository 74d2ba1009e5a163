"""GroupNorm and SiLU in PyTorch: the specification."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.group_norm_silu.inputs import GroupNormSiLU
from mvar_kernels.validation import accumulator


def group_norm_silu(call: GroupNormSiLU) -> tuple[Tensor]:
    """In the parameters' dtype, which may be wider than x's, rounded to x's."""
    x, weight, bias, groups, eps, channels_last = call
    if channels_last:
        x = x.transpose(1, 2)[:, :, None]  # (B, C, 1, L), in a memory format that PyTorch reads in place on a CPU
    normed = torch.group_norm(x.to(weight.dtype), groups, weight, bias, eps)
    out = F.silu(normed, inplace=True).to(x.dtype)
    return (out[:, :, 0].transpose(1, 2) if channels_last else out,)


def group_norm_silu_backward(grads: Sequence[Tensor], call: GroupNormSiLU) -> tuple[Tensor, ...]:
    """With y = norm(x), r = 1/σ and w the gradient at y: dx = r·(w − mean(w) − y·mean(w·y))."""
    acc = accumulator(call.x.dtype)

    def grouped(t: Tensor) -> Tensor:
        """(B, groups, C/groups, L)"""
        t = (t.transpose(1, 2) if call.channels_last else t).to(acc).contiguous()
        return t.view(t.shape[0], call.groups, t.shape[1] // call.groups, t.shape[2])

    x, grad = grouped(call.x), grouped(grads[0])
    weight, bias = (t.to(acc).view(call.groups, -1, 1) for t in (call.weight, call.bias))
    centred = x - x.mean((2, 3), keepdim=True)
    centred = centred - centred.mean((2, 3), keepdim=True)  # what the mean's rounding left
    rstd = (centred.square().mean((2, 3), keepdim=True) + call.eps).rsqrt()
    y = centred * rstd
    v = y * weight + bias
    s = v.sigmoid()
    dv = grad * (s + v * s * (1 - s))
    w = dv * weight
    dx = rstd * (w - w.mean((2, 3), keepdim=True) - y * (w * y).mean((2, 3), keepdim=True))
    dx = dx.view(x.shape[0], call.weight.shape[0], x.shape[3])
    return (
        (dx.transpose(1, 2) if call.channels_last else dx).to(call.x.dtype),
        (dv * y).sum((0, 3)).view(call.weight.shape).to(call.weight.dtype),
        dv.sum((0, 3)).view(call.weight.shape).to(call.bias.dtype),
    )


group_norm_silu_reference = Implementation(lambda call: None, group_norm_silu, group_norm_silu_backward)
