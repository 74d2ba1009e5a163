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


def scale_attention(call: Attention) -> tuple[Tensor, Tensor]:
    """The output (B, Lq, H, D) and the log of each row's sum of exponentials (B, H, Lq)."""
    q, k, v, log_temperature, scales, causal, scale = call
    acc = accumulator(q.dtype)
    q, k, v_acc = q.to(acc), k.to(acc), v.to(acc)
    if log_temperature is not None:
        temperature = log_temperature.to(acc).clamp_max(MAX_LOG_TEMPERATURE).exp()  # (H)
        q = torch.nn.functional.normalize(q, dim=-1, eps=NORM_EPS) * temperature[:, None]
        k = torch.nn.functional.normalize(k, dim=-1, eps=NORM_EPS)
    outs, lses = [], []
    for rows, keys in spans(scales, q.shape[1], causal):
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q[:, rows], k[:, keys])
        outs.append(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_acc[:, keys]))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs, 1).to(v.dtype), torch.cat(lses, -1)


def scale_attention_backward(grads: Sequence[Tensor], call: Attention) -> list[Tensor]:
    """Gradients of q, k, v and, where given, log_temperature: the forward's own derivative."""
    tensors = [t for t in call[:4] if t is not None]

    def forward(q: Tensor, k: Tensor, v: Tensor, log_temperature: Tensor | None = None) -> Tensor:
        return scale_attention(Attention(q, k, v, log_temperature, *call[4:]))[0]

    return list(torch.func.vjp(forward, *tensors)[1](grads[0]))


scale_attention_reference = Implementation(lambda call: None, scale_attention, scale_attention_backward)
