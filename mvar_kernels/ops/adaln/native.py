"""adaLN in C++ and CUDA (csrc/adaln): inputs are read in place wherever their last dimension is contiguous."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel, extension
from mvar_kernels.binding import dtype_objection, empty, pointers, view, where, with_aligned_rows
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN

CUDA_MAX_CHANNELS = 4096  # of a row in the registers of a block
CUDA_MAX_BATCH = 65535  # of a grid's second dimension


# The other inputs share the first one's dtype and device: the public function has checked.
def _why_not_cpu(call: AdaLN | GatedAdaLN) -> str | None:
    if call.x.device.type != "cpu":
        return f"inputs are on {call.x.device.type}"
    return dtype_objection(call.x, (torch.float32, torch.bfloat16))


def _why_not_cuda(call: AdaLN | GatedAdaLN) -> str | None:
    B, _, C = call.x.shape
    if C > CUDA_MAX_CHANNELS or C * call.x.itemsize % 16:
        return f"rows of {C} channels are wider than {CUDA_MAX_CHANNELS}, or not multiples of 16 bytes"
    if B > CUDA_MAX_BATCH:
        return f"a batch of {B} is larger than {CUDA_MAX_BATCH}"
    return dtype_objection(call.x, (torch.float32, torch.float16, torch.bfloat16))


def _adaln(call: AdaLN) -> tuple[Tensor]:
    x, scale, shift, eps = call.readable()
    out = empty(x)
    extension(x).adaln_forward(where(x), x.shape, eps, pointers(x, scale, shift), pointers(out))
    return (out,)


def _gated_adaln(call: GatedAdaLN) -> tuple[Tensor, Tensor]:
    x, branch, gate, scale, shift, eps = call.readable()
    x_new, out = empty(x), empty(x)
    inputs = pointers(x, branch, gate, scale, shift)
    extension(x).gated_adaln_forward(where(x), x.shape, eps, inputs, pointers(x_new, out))
    return x_new, out


def _workspace(x: Tensor) -> Tensor:
    return torch.empty(extension(x).adaln_backward_workspace(x.shape), dtype=torch.float32, device=x.device)


def _adaln_backward(grads: Sequence[Tensor], call: AdaLN) -> tuple[Tensor, ...]:
    x, scale, _, eps = call.readable()
    grad_out = view(grads[0])
    dx, dscale, dshift, workspace = empty(x), empty(scale), empty(scale), _workspace(x)
    inputs, outputs = pointers(grad_out, x, scale), pointers(dx, dscale, dshift, workspace)
    extension(x).adaln_backward(where(x), x.shape, eps, inputs, outputs)
    return dx, dscale, dshift


def _gated_adaln_backward(grads: Sequence[Tensor], call: GatedAdaLN) -> tuple[Tensor, ...]:
    x_new, branch, gate, scale, _, eps = call.readable()
    grad_x_new, grad_out = map(view, grads)
    dx, dbranch = empty(x_new), empty(x_new)
    dgate, dscale, dshift, workspace = empty(scale), empty(scale), empty(scale), _workspace(x_new)
    inputs = pointers(grad_x_new, grad_out, x_new, branch, gate, scale)
    outputs = pointers(dx, dbranch, dgate, dscale, dshift, workspace)
    extension(x_new).gated_adaln_backward(where(x_new), x_new.shape, eps, inputs, outputs)
    return dx, dbranch, dgate, dscale, dshift


adaln_cpu = Kernel(_why_not_cpu, _adaln, _adaln_backward, own_arithmetic=True)
gated_adaln_cpu = Kernel(_why_not_cpu, _gated_adaln, _gated_adaln_backward, own_arithmetic=True)
adaln_cuda = Kernel(
    _why_not_cuda,
    with_aligned_rows(_adaln),
    with_aligned_rows(_adaln_backward),
    own_arithmetic=True,
)
gated_adaln_cuda = Kernel(
    _why_not_cuda,
    with_aligned_rows(_gated_adaln),
    with_aligned_rows(_gated_adaln_backward),
    own_arithmetic=True,
)
