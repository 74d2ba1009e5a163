"""adaLN in C++ (csrc/adaln): inputs are read in place wherever their last dimension is contiguous."""

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel
from mvar_kernels.binding import empty, extension, view


def _why_not(first: Tensor, *others: Tensor | float) -> str | None:
    # The others share its dtype and device: the public function has checked.
    if first.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {str(first.dtype).removeprefix('torch.')} is not float32 or bfloat16"
    return None if first.device.type == "cpu" else f"inputs are on {first.device.type}"


def _adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    x, scale, shift = view(x), view(scale), view(shift)
    out = empty(x)
    extension().adaln_forward(
        x.dtype is torch.bfloat16,
        x.shape,
        eps,
        *(x.data_ptr(), x.stride()),
        *(scale.data_ptr(), scale.stride()),
        *(shift.data_ptr(), shift.stride()),
        out.data_ptr(),
    )
    return out


def _gated_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, branch, gate, scale, shift = view(x), view(branch), view(gate), view(scale), view(shift)
    x_new, out = empty(x), empty(x)
    extension().gated_adaln_forward(
        x.dtype is torch.bfloat16,
        x.shape,
        eps,
        *(x.data_ptr(), x.stride()),
        *(branch.data_ptr(), branch.stride()),
        *(gate.data_ptr(), gate.stride()),
        *(scale.data_ptr(), scale.stride()),
        *(shift.data_ptr(), shift.stride()),
        x_new.data_ptr(),
        out.data_ptr(),
    )
    return x_new, out


def _adaln_backward(grad_out: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, x, scale = view(grad_out), view(x), view(scale)
    dx, dscale, dshift = empty(x), empty(scale), empty(scale)
    extension().adaln_backward(
        x.dtype is torch.bfloat16,
        x.shape,
        eps,
        *(grad_out.data_ptr(), grad_out.stride()),
        *(x.data_ptr(), x.stride()),
        *(scale.data_ptr(), scale.stride()),
        dx.data_ptr(),
        dscale.data_ptr(),
        dshift.data_ptr(),
    )
    return dx, dscale, dshift


def _gated_adaln_backward(
    grad_x_new: Tensor, grad_out: Tensor, x_new: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x_new, grad_out, x_new, branch = view(grad_x_new), view(grad_out), view(x_new), view(branch)
    gate, scale = view(gate), view(scale)
    dx, dbranch = empty(x_new), empty(x_new)
    dgate, dscale, dshift = empty(scale), empty(scale), empty(scale)
    extension().gated_adaln_backward(
        x_new.dtype is torch.bfloat16,
        x_new.shape,
        eps,
        *(grad_x_new.data_ptr(), grad_x_new.stride()),
        *(grad_out.data_ptr(), grad_out.stride()),
        *(x_new.data_ptr(), x_new.stride()),
        *(branch.data_ptr(), branch.stride()),
        *(gate.data_ptr(), gate.stride()),
        *(scale.data_ptr(), scale.stride()),
        dx.data_ptr(),
        dbranch.data_ptr(),
        dgate.data_ptr(),
        dscale.data_ptr(),
        dshift.data_ptr(),
    )
    return dx, dbranch, dgate, dscale, dshift


adaln_cpu = Kernel(_why_not, _adaln, _adaln_backward)
gated_adaln_cpu = Kernel(_why_not, _gated_adaln, _gated_adaln_backward)
