"""Scale attention in C++ and CUDA (csrc/scale_attention): q, k, v are read in place wherever D is contiguous."""

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel, extension
from mvar_kernels.binding import dtype_objection, empty, view, where, with_aligned_rows
from mvar_kernels.ops.scale_attention.plan import plan

CUDA_BLOCK = 64  # queries of a tile, and keys of a block of them: kTile in cuda.cu
CUDA_HEAD_DIMS = (64, 128)


def _why_not_cpu(q: Tensor, *others: object) -> str | None:
    # k and v share its dtype and device: the public function has checked.
    if q.device.type != "cpu":
        return f"inputs are on {q.device.type}"
    return dtype_objection(q, (torch.float32, torch.bfloat16))


def _why_not_cuda(
    q: Tensor, k: Tensor, v: Tensor, log_temperature: Tensor | None, scales: tuple[int, ...], causal: bool, scale: float
) -> str | None:
    B, _, H, D = q.shape
    if causal:
        return "pattern 'causal' is not 'diagonal'"
    if D not in CUDA_HEAD_DIMS:
        return f"head dimension D={D} is not {' or '.join(map(str, CUDA_HEAD_DIMS))}"
    if max(B, H) > 65535:
        return f"batch B={B} or heads H={H} is more than the 65535 that a launch may have"
    return dtype_objection(q, (torch.float16, torch.bfloat16))


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_temperature: Tensor | None,
    scales: tuple[int, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    temperature = _floats(log_temperature)
    B, Lq, H, _ = q.shape
    made = plan(scales, Lq, causal, False, CUDA_BLOCK, CUDA_BLOCK, q.device)
    out, lse = empty(q), torch.empty((B, H, Lq), dtype=torch.float32, device=q.device)
    extension(q).scale_attention_forward(
        where(q),
        q.shape,
        scale,
        *(q.data_ptr(), q.stride()),
        *(k.data_ptr(), k.stride()),
        *(v.data_ptr(), v.stride()),
        _pointer(temperature),
        *(made.tiles.data_ptr(), len(made.tiles), made.spans.data_ptr()),
        out.data_ptr(),
        lse.data_ptr(),
    )
    return out, lse


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_temperature: Tensor | None,
    scales: tuple[int, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v, temperature = view(q), view(k), view(v), _floats(log_temperature)
    B, Lq, H, D = q.shape
    out, lse = empty(q), torch.empty((B, H, Lq))
    extension(q).scale_attention_forward(
        q.dtype is torch.bfloat16,
        (B, Lq, k.shape[1], H, D),
        scales,
        causal,
        scale,
        *(q.data_ptr(), q.stride()),
        *(k.data_ptr(), k.stride()),
        *(v.data_ptr(), v.stride()),
        _pointer(temperature),
        out.data_ptr(),
        lse.data_ptr(),
    )
    return out, lse


def _backward_cpu(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_temperature: Tensor | None,
    scales: tuple[int, ...],
    causal: bool,
    scale: float,
) -> list[Tensor]:
    # out and lse are not used: the kernel computes the weights anew, see csrc/scale_attention/backward.h.
    grad_out = view(grad_out)
    q, k, v, temperature = view(q), view(k), view(v), _floats(log_temperature)
    B, Lq, H, D = q.shape
    grads = [empty(q), empty(k), empty(v)]
    dtemperature = None if temperature is None else torch.empty_like(temperature)
    extension(q).scale_attention_backward(
        q.dtype is torch.bfloat16,
        (B, Lq, k.shape[1], H, D),
        scales,
        causal,
        scale,
        *(grad_out.data_ptr(), grad_out.stride()),
        *(q.data_ptr(), q.stride()),
        *(k.data_ptr(), k.stride()),
        *(v.data_ptr(), v.stride()),
        _pointer(temperature),
        *(grad.data_ptr() for grad in grads),
        _pointer(dtemperature),
    )
    if log_temperature is not None and dtemperature is not None:
        grads.append(dtemperature.to(log_temperature.dtype))
    return grads


scale_attention_cpu = Kernel(_why_not_cpu, _forward_cpu, _backward_cpu)
scale_attention_cuda = Kernel(_why_not_cuda, with_aligned_rows(_forward_cuda), None)
