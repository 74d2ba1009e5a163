"""Token drawing in plain PyTorch: the specification."""

import torch
from torch import Tensor

from mvar_kernels.backends import Kernel
from mvar_kernels.checks import accumulator
from mvar_kernels.ops.sample_tokens import noise

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


def sample_tokens(
    cond: Tensor,
    uncond: Tensor | None,
    image_index: Tensor,
    guidance: float,
    top_k: int,
    top_p: float,
    seed: int | Tensor,
    scale_index: int,
) -> Tensor:
    """The Gumbel-max draw from what is left: int64 (B, l)."""
    kept = filtered_logits(guided_logits(cond, uncond, guidance), top_k, top_p)
    return (kept + noise.gumbel(image_index, kept.shape, scale_index, seed)).argmax(-1)


def soft_embedding(
    cond: Tensor,
    uncond: Tensor | None,
    codebook: Tensor,
    image_index: Tensor,
    guidance: float,
    top_k: int,
    top_p: float,
    sharpness: float,
    temperature: float,
    seed: int | Tensor,
    scale_index: int,
) -> Tensor:
    """The codebook averaged with Gumbel-softmax weights: (B, l, width) in the codebook's dtype."""
    kept = filtered_logits(guided_logits(cond, uncond, guidance), top_k, top_p)
    noisy = kept * sharpness + noise.gumbel(image_index, kept.shape, scale_index, seed)
    return ((noisy / temperature).softmax(-1) @ codebook.to(kept.dtype)).to(codebook.dtype)


sample_tokens_reference = Kernel(lambda *inputs: None, sample_tokens, None)
soft_embedding_reference = Kernel(lambda *inputs: None, soft_embedding, None)
