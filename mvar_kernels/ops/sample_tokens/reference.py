"""Token drawing in plain PyTorch: the specification."""

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel
from mvar_kernels.checks import accumulator
from mvar_kernels.ops.sample_tokens import noise
from mvar_kernels.ops.sample_tokens.inputs import Draw

# Softmax weights as whole numbers: their sums are exact in any order, so every backend cuts at the same code.
WEIGHT_ONE = 2**30


def guided_logits(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """(1+c)·cond − c·uncond in float32 (float64 for float64)."""
    acc = accumulator(cond.dtype)
    if uncond is None:
        return cond.to(acc)
    c = torch.tensor(guidance, dtype=acc, device=cond.device)
    return (1 + c) * cond.to(acc) - c * uncond.to(acc)


def filtered_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with everything that top-k, then top-p, drops set to −inf. A new tensor."""
    kept = logits
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        kept = logits.masked_fill(logits < kth, -torch.inf)  # ties with the k-th stay
    if top_p < 1:
        ascending, order = kept.sort(dim=-1, stable=True)
        weights = noise.exp_negative((ascending - ascending[..., -1:]).float()) * WEIGHT_ONE
        cumulative = weights.to(torch.int64).cumsum(-1)
        limit = (cumulative[..., -1:].double() * (1 - top_p)).floor().to(torch.int64)
        drop = cumulative <= limit
        drop[..., -1] = False  # never the largest
        kept = kept.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return kept


def _kept(call: Draw) -> Tensor:
    return filtered_logits(guided_logits(call.cond, call.uncond, call.guidance), call.top_k, call.top_p)


def _noise(call: Draw) -> Tensor:
    return noise.gumbel(call.image_index, call.cond.shape, call.scale_index, call.seed)


def sample_tokens(call: Draw) -> Tensor:
    """The Gumbel-max draw from what is left: int64 (B, l)."""
    return (_kept(call) + _noise(call)).argmax(-1)


def soft_embedding(call: Draw, codebook: Tensor, sharpness: float, temperature: float) -> Tensor:
    """The codebook averaged with Gumbel-softmax weights: (B, l, width) in the codebook's dtype."""
    noisy = _kept(call) * sharpness + _noise(call)
    return ((noisy / temperature).softmax(-1) @ codebook.to(noisy.dtype)).to(codebook.dtype)


sample_tokens_reference = Kernel(lambda *inputs: None, sample_tokens, None)
soft_embedding_reference = Kernel(lambda *inputs: None, soft_embedding, None)
