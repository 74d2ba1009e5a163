"""Sampling of a batch of images. Every token passes every layer once, as blocks carry states.

Nothing synchronizes with the device and control flow does not depend on tensor values, so that a CUDA graph
(cuda_graphs.py) can capture all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

import mvar_kernels as mk
from mvar.models.layers import State
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import ScaleTransformer


@dataclass(frozen=True)
class SamplingParams:
    """Arguments of :func:`mvar.generate` that determine the computation, besides the labels and random numbers."""

    cfg: float
    top_k: int
    top_p: float
    more_smooth: bool
    return_scales: bool
    backend: str
    decode: bool = True
    """False: return feature maps (B, code_dim, h, w) instead of images, for benchmarks"""
    reencode: bool = True
    """for editing, see :func:`mvar.edit`"""


class SourceImages(NamedTuple):
    """Images to edit.

    features: (B, code_dim, h, w) float32, `tokenizer.features` of the images. generated: (B, L) bool, tokens to sample;
    the others encode the features.
    """

    features: Tensor
    generated: Tensor


@torch.no_grad()
def sample_batch(
    model: ScaleTransformer,
    tokenizer: Tokenizer,
    params: SamplingParams,
    labels: Tensor,
    image_index: Tensor,
    seed: Tensor,
    *source: Tensor,
) -> tuple[Tensor, ...]:
    """Sample one image per row, or edit one.

    Args:
        model, tokenizer: from :mod:`mvar.inference.prepare`.
        labels, image_index: (B,) int64, on the model's device. seed: () int64, on the model's device.
        source: to edit images, the tensors of :class:`SourceImages`.

    Returns:
        tokens (B, L) int64; () bool, whether images and logits (except for codes at −∞) are finite; images
        (B, 3, R, R) in [0, 1] float32, with `params.return_scales` one such tensor for each scale.
    """
    config = model.config
    B, last = len(labels), len(config.scales) - 1
    rows = _Rows(B, guided=params.cfg > 0)
    cond = model.class_emb(F.pad(labels, (0, int(rows.guided)), value=config.num_classes))
    modulation = model.modulation(cond, rows.expand)
    positions = model.positions().split(config.scales, 1)
    x = rows.expand(model.start(cond)) + positions[0]

    codebook = tokenizer.quantize.embedding.weight
    f_hat = codebook.new_zeros(B, config.code_dim, *2 * config.patch_nums[-1:], dtype=torch.float32)
    states: Sequence[State | None] = model.empty_states(len(x))
    tokens, images = [], []
    finite = torch.ones((), dtype=torch.bool, device=labels.device)
    if source:
        residual, generated = SourceImages(*source)
        finite = residual.isfinite().all()
        generated_of_scale = generated.split(config.scales, 1)
    for k, length in enumerate(config.scales):
        hidden, states = model.hidden(x, modulation, (length,), states, backend=params.backend)
        progress = k / last if last else 0.0
        logits = model.head(rows.guide(hidden, params.cfg * progress))  # (B, l, V)
        finite = finite & logits.amax(-1).isfinite().all()  # −∞ excludes a code; all codes at −∞ are an error
        options: dict[str, Any] = {
            "top_k": params.top_k,
            "top_p": params.top_p,
            "seed": seed,
            "image_index": image_index,
            "scale_index": k,
            "backend": params.backend,
        }
        tokens.append(mk.sample_tokens(logits, **options))
        if params.more_smooth:
            temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
            embedded = mk.soft_embedding(
                logits, None, codebook, sharpness=1 + progress, temperature=temperature, **options
            )
        else:
            embedded = tokenizer.embed(tokens[-1])
        if source:
            own = tokenizer.quantize.nearest(tokenizer.next_input(k, residual))
            is_new = generated_of_scale[k]
            tokens[-1] = torch.where(is_new, tokens[-1], own)
            embedded = torch.where(is_new[..., None], embedded, tokenizer.embed(own))
        added = tokenizer.scale_features(k, embedded)
        f_hat = f_hat + added
        if source:
            residual = residual - (added if params.reencode else tokenizer.scale_features(k, tokenizer.embed(own)))
        if params.return_scales or k == last:
            with record_function("decoder"):  # a range in profiles
                images.append((tokenizer.decode_features(f_hat) + 1) * 0.5 if params.decode else f_hat)
        if k < last:
            step = model.word_embed(tokenizer.next_input(k + 1, f_hat).to(x.dtype)) + positions[k + 1]
            x = rows.repeat(step)
    finite = finite & images[-1].isfinite().all()
    return torch.cat(tokens, 1), finite, *images


class _Rows(NamedTuple):
    """Rows of the batch: B conditional ones and, with guidance, B unconditional ones."""

    batch: int
    guided: bool

    def expand(self, t: Tensor) -> Tensor:
        """B conditional rows and one unconditional row → 2B rows; without guidance unchanged."""
        return torch.cat([t[:-1], t[-1:].expand(self.batch, *t.shape[1:])]) if self.guided else t

    def repeat(self, t: Tensor) -> Tensor:
        return t.repeat(2, 1, 1) if self.guided else t

    def guide(self, hidden: Tensor, c: float) -> Tensor:
        """(1+c)·cond − c·uncond on the head's input: the head is affine, so this equals guidance of its logits."""
        return (1 + c) * hidden[: self.batch] - c * hidden[self.batch :] if self.guided else hidden
