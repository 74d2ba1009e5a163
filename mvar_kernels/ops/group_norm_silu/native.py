"""group_norm_silu in C++ (csrc/group_norm_silu): both memory formats are read in place.

The backward computes the statistics again, which takes a twentieth of its time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation, extension
from mvar_kernels.ffi import dtype_and_stream, empty_contiguous, last_dim_contiguous, pointers, unsupported_dtype
from mvar_kernels.ops.group_norm_silu.inputs import GroupNormSiLU


def _unsupported(call: GroupNormSiLU) -> str | None:
    return unsupported_dtype(call.x, (torch.float32, torch.bfloat16))


def _prepared(call: GroupNormSiLU) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor, Tensor]:
    """Sizes as the kernels take them, x, weight and bias in float32, and a workspace."""
    x = last_dim_contiguous(call.x)
    B, rows, columns = x.shape
    C, L = (columns, rows) if call.channels_last else (rows, columns)
    sizes = (B, C, L, call.groups, call.channels_last)
    floats = extension(x).group_norm_silu_workspace(sizes)
    workspace = torch.empty(floats, dtype=torch.float32, device=x.device)
    return sizes, x, call.weight.float().contiguous(), call.bias.float().contiguous(), workspace


def _forward(call: GroupNormSiLU) -> tuple[Tensor]:
    sizes, x, weight, bias, workspace = _prepared(call)
    out = empty_contiguous(x)
    inputs, outputs = pointers(x, weight, bias), pointers(out, workspace)
    extension(x).group_norm_silu_forward(dtype_and_stream(x), sizes, call.eps, inputs, outputs)
    return (out,)


def _backward(grads: Sequence[Tensor], call: GroupNormSiLU) -> tuple[Tensor, ...]:
    sizes, x, weight, bias, workspace = _prepared(call)
    grad_out, dx = last_dim_contiguous(grads[0]), empty_contiguous(x)
    of_samples = torch.empty((2, x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    inputs, outputs = pointers(x, weight, bias), pointers(dx, *of_samples, workspace)
    extension(x).group_norm_silu_backward(dtype_and_stream(x), sizes, call.eps, pointers(grad_out), inputs, outputs)
    dweight, dbias = of_samples.sum(1).to(call.weight.dtype)
    return dx, dweight, dbias


group_norm_silu_cpu = Implementation(_unsupported, _forward, _backward, own_arithmetic=True)
