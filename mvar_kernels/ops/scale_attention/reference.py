"""Scale attention in plain PyTorch: the specification. Arithmetic in float32, or float64 for float64."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.validation import accumulator

MAX_LOG_TEMPERATURE = math.log(100)  # VAR's bound on the learned temperature
NORM_EPS = 1e-12


def spans(scales: tuple[int, ...], queries: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """(query rows, key rows) of each scale that has queries; the queries are the last ones of the sequence."""
    start = 0
    first = sum(scales) - queries
    for length in scales:
        if start >= first:
            yield (
                slice(start - first, start - first + length),
                slice(0 if causal else start, start + length),
            )
        start += length


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding of x (B, L, H, D), as in op.py; cos and sin: (L, D/2) or (L, D), or one per sample."""
    if interleaved and 2 * cos.shape[-1] == x.shape[-1] and x.dtype == cos.dtype and not torch.compiler.is_compiling():
        # Neighbours as complex numbers: one pass over memory, 7 times as fast as below (AMD EPYC, Zen 4, one thread).
        # torch.compile fuses what is below, and has no complex numbers.
        numbers = torch.view_as_complex(x.clone(memory_format=torch.contiguous_format).unflatten(-1, (-1, 2)))
        return torch.view_as_real(numbers * torch.complex(cos, sin).unsqueeze(-2)).flatten(-2)

    def members(t: Tensor) -> tuple[Tensor, ...]:
        return (t[..., ::2], t[..., 1::2]) if interleaved else t.chunk(2, -1)

    x1, x2 = members(x)
    (c1, c2), (s1, s2) = (
        members(t) if t.shape[-1] == x.shape[-1] else (t, t) for t in (cos.unsqueeze(-2), sin.unsqueeze(-2))
    )
    pairs = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    return torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)


def scale_attention(call: Attention) -> tuple[Tensor, Tensor]:
    """The output (B, Lq, H, D) and the log of each row's sum of exponentials (B, H, Lq)."""
    q, k, v, log_temperature, scales, causal, scale, cos, sin, interleaved, key_lengths = call
    acc = accumulator(q.dtype)
    q, k, v_acc = q.to(acc), k.to(acc), v.to(acc)
    if key_lengths is not None:  # before the norm, whose derivative would be 0·NaN
        padding = torch.arange(k.shape[1], dtype=torch.int64, device=k.device) >= key_lengths[:, None]  # (B, L)
        k, v_acc = (t.masked_fill(padding[..., None, None], 0.0) for t in (k, v_acc))
    if log_temperature is not None:
        q, k = (torch.nn.functional.normalize(t, dim=-1, eps=NORM_EPS) for t in (q, k))
    if cos is not None and sin is not None:
        # Rounded to the dtype of the inputs, as models round them; the temperature goes before a rotation or after it.
        cos, sin, Lq = cos.to(acc), sin.to(acc), q.shape[1]
        q = rotated(q, cos[-Lq:], sin[-Lq:], interleaved).to(v.dtype).to(acc)
        k = rotated(k, cos, sin, interleaved).to(v.dtype).to(acc)
    if log_temperature is not None:
        q = q * log_temperature.to(acc).clamp_max(MAX_LOG_TEMPERATURE).exp()[:, None]
    if k.shape[2] != q.shape[2]:
        k, v_acc = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v_acc))
    outs, lses = [], []
    for rows, keys in spans(scales, q.shape[1], causal) if scales else [(slice(None), slice(None))]:
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q[:, rows], k[:, keys])
        if key_lengths is not None:
            scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        weights, lse = scores.softmax(-1), scores.logsumexp(-1)
        if key_lengths is not None:
            # −∞ everywhere: no number, and no derivative either.
            weights = torch.where((key_lengths <= 0)[:, None, None, None], 0.0, weights)
        outs.append(torch.einsum("bhqk,bkhd->bqhd", weights, v_acc[:, keys]))
        lses.append(lse)
    return torch.cat(outs, 1).to(v.dtype), torch.cat(lses, -1)


def scale_attention_backward(grads: Sequence[Tensor], call: Attention) -> list[Tensor]:
    """Gradients of q, k, v and, where given, log_temperature: the forward's own derivative."""
    tensors = [t for t in call[:4] if t is not None]

    def forward(q: Tensor, k: Tensor, v: Tensor, log_temperature: Tensor | None = None) -> Tensor:
        return scale_attention(Attention(q, k, v, log_temperature, *call[4:]))[0]

    return list(torch.func.vjp(forward, *tensors)[1](grads[0]))


scale_attention_reference = Implementation(lambda call: None, scale_attention, scale_attention_backward)
