"""ssd_scan by mamba_ssm's combined chunk scan: for comparison, chosen by name only. Forward direction only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.ffi import last_dim_contiguous, unsupported_dtype
from mvar_kernels.ops.mamba2.inputs import Scan

CHUNK = 256  # mamba_ssm's own default


def _unsupported(call: Scan) -> str | None:
    x, A = call.x, call.A
    if x.device.type != "cuda":
        return f"inputs are on {x.device.type}"
    if A.dim() == 2:
        return "A: has two directions, mamba_ssm scans forward only"
    return unsupported_dtype(x, (torch.float32, torch.float16, torch.bfloat16))


def _ssd_scan(call: Scan) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C, D, state, _ = call
    x, dt, B, C, state = map(last_dim_contiguous, (x, dt, B, C, state))  # its backward asserts it
    y, last = mamba_chunk_scan_combined(
        x,
        dt,
        A.float(),
        B.unflatten(-1, (call.groups, -1)),
        C.unflatten(-1, (call.groups, -1)),
        CHUNK,
        D=D.float(),
        initial_states=state,
        return_final_states=True,
    )
    return y.to(x.dtype).contiguous(), last.to(state.dtype).contiguous()


def _ssd_scan_backward(grads: Sequence[Tensor], call: Scan) -> list[Tensor]:
    """Through mamba_ssm's own autograd; its forward runs again, as nothing of it is kept."""
    with torch.enable_grad():
        x, dt, A, B, C, D, state = leaves = [t.detach().requires_grad_() for t in call[:-1]]
        outputs = _ssd_scan(Scan(x, dt, A, B, C, D, state, call.scales))
        found = torch.autograd.grad(outputs, leaves, list(grads))
    return [g.to(t.dtype).contiguous() for g, t in zip(found, leaves, strict=True)]


ssd_scan_mamba_ssm = Implementation(_unsupported, _ssd_scan, _ssd_scan_backward)
