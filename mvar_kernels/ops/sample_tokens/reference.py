"""Token sampling in plain PyTorch: the specification."""

import torch
from torch import Tensor

from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.sample_tokens import noise
from mvar_kernels.ops.sample_tokens.inputs import Sampling, SoftSampling
from mvar_kernels.validation import accumulator

# Softmax weights as integers: their sums are exact in any order, so every backend cuts at the same code.
WEIGHT_ONE = 2**30


def guided_logits(cond: Tensor, uncond: Tensor | None, guidance: float | Tensor) -> Tensor:
    """cond + c·(cond − uncond) in float32 (float64 for float64), but for a number that a row's logits share.

    Each row is taken relative to its largest logit first: that difference is rounded once, whatever was added to all.
    Where c is 0, cond. This and the other parameters: a number, or one for each image, (B, 1, 1).
    """
    acc = accumulator(cond.dtype)
    largest = torch.finfo(acc).max
    cond = cond.to(acc).clamp(max=largest)
    if uncond is None or _is(guidance, 0):
        return cond
    c = torch.as_tensor(guidance, dtype=acc, device=cond.device)
    of_cond, of_uncond = relative_logits(cond), relative_logits(uncond.to(acc).clamp(max=largest))
    push = (of_cond - of_uncond).masked_fill(of_cond.isneginf() | of_uncond.isneginf(), 0)
    guided = (of_cond + c * push).clamp(max=largest)
    return torch.where(c == 0, cond, guided) if isinstance(guidance, Tensor) else guided


def relative_logits(logits: Tensor) -> Tensor:
    """Logits, of which none is +∞, minus the largest of their row: 0 at most, and −∞ where they are."""
    return logits - logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)


def tempered_logits(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits over a temperature other than 1: relative to the largest of their row, or an offset would be divided."""
    if _is(temperature, 1):
        return logits
    # A number instead of a tensor, and a GPU multiplies by its inverse.
    divisor = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    return torch.where(divisor == 1, logits, relative_logits(logits) / divisor)


def filtered_logits(logits: Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    """Logits with everything that top-k, then top-p, drops set to −inf. A new tensor.

    A top_k for each image is 1 to V, a top_p for each image 0 to 1.
    """
    kept = logits
    if isinstance(top_k, Tensor):
        places = (top_k.to(torch.int64) - 1).expand(*logits.shape[:-1], 1)
        kth = logits.sort(dim=-1, descending=True).values.gather(-1, places)
        kept = logits.masked_fill(logits < kth, -torch.inf)
    elif 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        kept = logits.masked_fill(logits < kth, -torch.inf)  # ties with the k-th stay
    if isinstance(top_p, Tensor) or top_p < 1:
        ascending, order = kept.sort(dim=-1, stable=True)
        weights = noise.exp_negative(relative_logits(ascending).float()) * WEIGHT_ONE
        cumulative = weights.to(torch.int64).cumsum(-1)
        limit = (cumulative[..., -1:].double() * (1 - top_p)).floor().to(torch.int64)
        drop = cumulative <= limit
        drop[..., -1] = False  # never the largest
        if isinstance(top_p, Tensor):
            drop &= top_p < 1
        kept = kept.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return kept


def _is(parameter: float | Tensor, value: float) -> bool:
    return not isinstance(parameter, Tensor) and parameter == value


def _kept(call: Sampling) -> Tensor:
    guidance, top_k, top_p, temperature = (
        (call.guidance, call.top_k, call.top_p, call.temperature)
        if call.per_image is None
        else call.per_image[:, :, None, None].unbind(1)
    )
    logits = tempered_logits(guided_logits(call.cond, call.uncond, guidance), temperature)
    return relative_logits(filtered_logits(logits, top_k, top_p))


def _noise(call: Sampling) -> Tensor:
    return noise.gumbel(call.image_index, call.cond.shape, call.scale_index, call.seed)


def sample_tokens(call: Sampling) -> tuple[Tensor]:
    """The Gumbel-max sample of what is left: int64 (B, l), or samples (B, l, n)."""
    B, positions, codes = call.cond.shape
    n = call.num_samples
    noises = noise.gumbel(call.image_index, (B, n * positions, codes), call.scale_index, call.seed)
    tokens = (_kept(call)[:, None] + noises.unflatten(1, (n, positions))).argmax(-1)  # (B, n, l)
    return (tokens[:, 0] if n == 1 else tokens.transpose(1, 2),)


def soft_embedding(call: SoftSampling) -> tuple[Tensor]:
    """The codebook averaged with Gumbel-softmax weights: (B, l, width) in the codebook's dtype."""
    noisy = _kept(call.sampling) * call.sharpness + _noise(call.sampling)
    return (((noisy / call.temperature).softmax(-1) @ call.codebook.to(noisy.dtype)).to(call.codebook.dtype),)


sample_tokens_reference = Implementation(lambda call: None, sample_tokens, None)
soft_embedding_reference = Implementation(lambda call: None, soft_embedding, None)
