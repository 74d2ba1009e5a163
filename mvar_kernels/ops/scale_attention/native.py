"""Scale attention in C++ (csrc/scale_attention): q, k, v are read in place wherever D is contiguous."""

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel, extension
from mvar_kernels.binding import dtype_objection, empty, view


def _why_not(q: Tensor, *others: object) -> str | None:
    # k and v share its dtype and device: the public function has checked.
    if q.device.type != "cpu":
        return f"inputs are on {q.device.type}"
    return dtype_objection(q, (torch.float32, torch.bfloat16))


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _forward(
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


def _backward(
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


scale_attention_cpu = Kernel(_why_not, _forward, _backward)
