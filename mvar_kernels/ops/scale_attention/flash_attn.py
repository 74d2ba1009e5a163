"""The flash-attn package, for comparison: the diagonal and full patterns, each scale of each sample a sequence.

Forward: one call of its varlen kernel, after the norms and the rotation of q and k in plain PyTorch.
Backward: autograd through that same function, computed again. So a backward here costs the forward as well: to time the
package's own backward, call it on leaves.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.ffi import unsupported_dtype
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.reference import MAX_LOG_TEMPERATURE, NORM_EPS, rotated


def _unsupported(call: Attention) -> str | None:
    q = call.q
    if q.device.type != "cuda":
        return f"inputs are on {q.device.type}"
    if (reason := unsupported_dtype(q, (torch.float16, torch.bfloat16))) is not None:
        return reason
    if call.causal:
        return "the causal pattern is not among its masks"
    if call.key_lengths is not None:
        return "key_lengths is not None"
    return f"head dimension D={q.shape[-1]} is more than 256" if q.shape[-1] > 256 else None


@cache
def boundaries(scales: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """Where each scale of each image starts in the batch's tokens in a row, and the end: int32."""
    return torch.tensor([0, *accumulate(scales * batch)], dtype=torch.int32, device=device)


def _forward(call: Attention) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_varlen_func

    q, k, v, log_temperature, scales, _, scale, cos, sin, interleaved, _ = call
    B, Lq, H, _ = q.shape
    if scales:
        own = seen = next(scales[i:] for i in range(len(scales)) if sum(scales[i:]) == Lq)
        k, v = k[:, -Lq:], v[:, -Lq:]
    else:
        own, seen = (Lq,), (k.shape[1],)
    if log_temperature is not None:
        temperature = log_temperature.float().clamp_max(MAX_LOG_TEMPERATURE).exp()
        q = torch.nn.functional.normalize(q.float(), dim=-1, eps=NORM_EPS) * temperature[:, None]
        k = torch.nn.functional.normalize(k.float(), dim=-1, eps=NORM_EPS)
    if cos is not None and sin is not None:
        q, k = (rotated(t.float(), cos[-Lq:].float(), sin[-Lq:].float(), interleaved) for t in (q, k))
    q, k = q.to(v.dtype), k.to(v.dtype)
    out, lse, _ = flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)),
        *(boundaries(own, B, q.device), boundaries(seen, B, q.device), max(own), max(seen)),
        softmax_scale=scale,
        return_attn_probs=True,
    )
    return out.view(B, Lq, H, -1), lse.view(H, B, Lq).transpose(0, 1).contiguous()


def _backward(grads: Sequence[Tensor], call: Attention) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in call[:4] if t is not None]
    with torch.enable_grad():
        q, k, v, log_temperature = (*leaves, None)[:4]
        again, _ = _forward(Attention(q, k, v, log_temperature, *call[4:]))  # type: ignore[arg-type]
    return list(torch.autograd.grad(again, leaves, grads[0]))


scale_attention_flash_attn = Implementation(_unsupported, _forward, _backward)
