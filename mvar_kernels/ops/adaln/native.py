"""adaLN in C++ and CUDA (csrc/adaln): inputs are read in place wherever their last dimension is contiguous."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation, extension
from mvar_kernels.ffi import (
    dtype_and_stream,
    empty_contiguous,
    last_dim_contiguous,
    pointers,
    unsupported_dtype,
    with_aligned_rows,
)
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN

CUDA_MAX_CHANNELS = 4096  # of a row in the registers of a block
CUDA_MAX_BATCH = 65535  # of a grid's second dimension


# The other inputs share the first one's dtype and device: the public function has checked.
def _unsupported_cpu(call: AdaLN | GatedAdaLN) -> str | None:
    if call.x.device.type != "cpu":
        return f"inputs are on {call.x.device.type}"
    return unsupported_dtype(call.x, (torch.float32, torch.bfloat16))


def _unsupported_cuda(call: AdaLN | GatedAdaLN) -> str | None:
    B, _, C = call.x.shape
    if C > CUDA_MAX_CHANNELS or C * call.x.itemsize % 16:
        return f"rows of {C} channels are wider than {CUDA_MAX_CHANNELS}, or not multiples of 16 bytes"
    if B > CUDA_MAX_BATCH:
        return f"a batch of {B} is larger than {CUDA_MAX_BATCH}"
    return unsupported_dtype(call.x, (torch.float32, torch.float16, torch.bfloat16))


def _adaln(call: AdaLN) -> tuple[Tensor]:
    x, scale, shift, eps = call.readable()
    out = empty_contiguous(x)
    extension(x).adaln_forward(dtype_and_stream(x), x.shape, eps, pointers(x, scale, shift), pointers(out))
    return (out,)


def _gated_adaln(call: GatedAdaLN) -> tuple[Tensor, Tensor]:
    x, branch, gate, scale, shift, eps = call.readable()
    x_new, out = empty_contiguous(x), empty_contiguous(x)
    inputs = pointers(x, branch, gate, scale, shift)
    extension(x).gated_adaln_forward(dtype_and_stream(x), x.shape, eps, inputs, pointers(x_new, out))
    return x_new, out


def _workspace(x: Tensor) -> Tensor:
    return torch.empty(extension(x).adaln_backward_workspace(x.shape), dtype=torch.float32, device=x.device)


def _adaln_backward(grads: Sequence[Tensor], call: AdaLN) -> tuple[Tensor, ...]:
    x, scale, _, eps = call.readable()
    grad_out = last_dim_contiguous(grads[0])
    dx, dscale, dshift, workspace = empty_contiguous(x), empty_contiguous(scale), empty_contiguous(scale), _workspace(x)
    inputs, outputs = pointers(x, scale), pointers(dx, dscale, dshift, workspace)
    extension(x).adaln_backward(dtype_and_stream(x), x.shape, eps, pointers(grad_out), inputs, outputs)
    return dx, dscale, dshift


def _gated_adaln_backward(grads: Sequence[Tensor], call: GatedAdaLN) -> tuple[Tensor, ...]:
    x_new, branch, gate, scale, _, eps = call.readable()
    grad_x_new, grad_out = map(last_dim_contiguous, grads)
    dx, dbranch = empty_contiguous(x_new), empty_contiguous(x_new)
    dgate, dscale, dshift, workspace = (
        empty_contiguous(scale),
        empty_contiguous(scale),
        empty_contiguous(scale),
        _workspace(x_new),
    )
    inputs = pointers(x_new, branch, gate, scale)
    outputs = pointers(dx, dbranch, dgate, dscale, dshift, workspace)
    extension(x_new).gated_adaln_backward(
        dtype_and_stream(x_new), x_new.shape, eps, pointers(grad_x_new, grad_out), inputs, outputs
    )
    return dx, dbranch, dgate, dscale, dshift


adaln_cpu = Implementation(_unsupported_cpu, _adaln, _adaln_backward, own_arithmetic=True)
gated_adaln_cpu = Implementation(_unsupported_cpu, _gated_adaln, _gated_adaln_backward, own_arithmetic=True)
adaln_cuda = Implementation(
    _unsupported_cuda,
    with_aligned_rows(_adaln),
    with_aligned_rows(_adaln_backward),
    own_arithmetic=True,
)
gated_adaln_cuda = Implementation(
    _unsupported_cuda,
    with_aligned_rows(_gated_adaln),
    with_aligned_rows(_gated_adaln_backward),
    own_arithmetic=True,
)
