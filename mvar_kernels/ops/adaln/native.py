"""adaLN in C++ and CUDA (csrc/adaln): inputs are read in place wherever their last dimension is contiguous."""

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel, extension
from mvar_kernels.binding import dtype_objection, empty, pointers, view, where, with_aligned_rows

CUDA_MAX_CHANNELS = 4096  # of a row in the registers of a block
CUDA_MAX_BATCH = 65535  # of a grid's second dimension


# The other inputs share the first one's dtype and device: the public function has checked.
def _why_not_cpu(first: Tensor, *others: Tensor | float) -> str | None:
    if first.device.type != "cpu":
        return f"inputs are on {first.device.type}"
    return dtype_objection(first, (torch.float32, torch.bfloat16))


def _why_not_cuda(first: Tensor, *others: Tensor | float) -> str | None:
    B, _, C = first.shape
    if C > CUDA_MAX_CHANNELS or C * first.itemsize % 16:
        return f"rows of {C} channels are wider than {CUDA_MAX_CHANNELS}, or not multiples of 16 bytes"
    if B > CUDA_MAX_BATCH:
        return f"a batch of {B} is larger than {CUDA_MAX_BATCH}"
    return dtype_objection(first, (torch.float32, torch.float16, torch.bfloat16))


def _adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    x, scale, shift, out = view(x), view(scale), view(shift), empty(x)
    extension(x).adaln_forward(where(x), x.shape, eps, pointers(x, scale, shift), pointers(out))
    return out


def _gated_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, branch, gate, scale, shift = view(x), view(branch), view(gate), view(scale), view(shift)
    x_new, out = empty(x), empty(x)
    inputs = pointers(x, branch, gate, scale, shift)
    extension(x).gated_adaln_forward(where(x), x.shape, eps, inputs, pointers(x_new, out))
    return x_new, out


def _workspace(x: Tensor) -> Tensor:
    return torch.empty(extension(x).adaln_backward_workspace(x.shape), dtype=torch.float32, device=x.device)


def _adaln_backward(grad_out: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, x, scale = view(grad_out), view(x), view(scale)
    dx, dscale, dshift, workspace = empty(x), empty(scale), empty(scale), _workspace(x)
    inputs, outputs = pointers(grad_out, x, scale), pointers(dx, dscale, dshift, workspace)
    extension(x).adaln_backward(where(x), x.shape, eps, inputs, outputs)
    return dx, dscale, dshift


def _gated_adaln_backward(
    grad_x_new: Tensor, grad_out: Tensor, x_new: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x_new, grad_out, x_new, branch = view(grad_x_new), view(grad_out), view(x_new), view(branch)
    gate, scale = view(gate), view(scale)
    dx, dbranch = empty(x_new), empty(x_new)
    dgate, dscale, dshift, workspace = empty(scale), empty(scale), empty(scale), _workspace(x_new)
    inputs = pointers(grad_x_new, grad_out, x_new, branch, gate, scale)
    outputs = pointers(dx, dbranch, dgate, dscale, dshift, workspace)
    extension(x_new).gated_adaln_backward(where(x_new), x_new.shape, eps, inputs, outputs)
    return dx, dbranch, dgate, dscale, dshift


adaln_cpu = Kernel(_why_not_cpu, _adaln, _adaln_backward)
gated_adaln_cpu = Kernel(_why_not_cpu, _gated_adaln, _gated_adaln_backward)
adaln_cuda = Kernel(_why_not_cuda, with_aligned_rows(_adaln), with_aligned_rows(_adaln_backward))
gated_adaln_cuda = Kernel(_why_not_cuda, with_aligned_rows(_gated_adaln), with_aligned_rows(_gated_adaln_backward))
