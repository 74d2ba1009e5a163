"""ssd_scan by mamba_ssm's combined chunk scan: for comparison, chosen by name only. Forward direction only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel

CHUNK = 256  # mamba_ssm's own default


def _why_not(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> str | None:
    if x.device.type != "cuda":
        return f"inputs are on {x.device.type}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {str(x.dtype).removeprefix('torch.')} is not float32, float16 or bfloat16"
    return "A: has two directions, mamba_ssm scans forward only" if A.dim() == 2 else None


def _ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, scales: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, last = mamba_chunk_scan_combined(
        x,
        dt,
        A.float(),
        B[:, :, None],
        C[:, :, None],
        CHUNK,
        D=D.float(),
        initial_states=state,
        return_final_states=True,
    )
    return y.to(x.dtype).contiguous(), last.to(state.dtype).contiguous()


def _ssd_scan_backward(grads: Sequence[Tensor], tensors: Sequence[Tensor], scales: tuple[int, ...]) -> list[Tensor]:
    """Through mamba_ssm's own autograd; its forward runs again, as nothing of it is kept."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in tensors]
        x, dt, A, B, C, D, state = leaves
        outputs = _ssd_scan(x, dt, A, B, C, D, state, scales)
        found = torch.autograd.grad(outputs, leaves, list(grads))
    return [g.to(t.dtype).contiguous() for g, t in zip(found, tensors, strict=True)]


ssd_scan_mamba_ssm = Kernel(_why_not, _ssd_scan, _ssd_scan_backward)
