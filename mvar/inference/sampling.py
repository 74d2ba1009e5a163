"""Sampling of a batch of images. Every token passes every layer once, as blocks carry states.

Nothing synchronizes with the device and control flow does not depend on tensor values, so that a CUDA graph
(cuda_graphs.py) can capture all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

import mvar_kernels as mk
from mvar.models.layers import State, first_rows
from mvar.models.modulation import Modulation
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
    guidance_until: int | None = None
    """number of coarsest scales with guidance; None for all"""
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
    models: Mapping[int, ScaleTransformer],
    tokenizer: Tokenizer,
    params: SamplingParams,
    labels: Tensor,
    image_index: Tensor,
    seed: Tensor,
    *source: Tensor,
) -> tuple[Tensor, ...]:
    """Sample one image per row, or edit one.

    Args:
        models: each by the index of the first scale that it generates; one of them by 0.
        tokenizer: it and the models are from :mod:`mvar.inference.prepare`.
        labels, image_index: (B,) int64, on the models' device. seed: () int64, on the models' device.
        source: to edit images, the tensors of :class:`SourceImages`.

    Returns:
        tokens (B, L) int64; () bool, whether images and logits (except for codes at −∞) are finite; images
        (B, 3, R, R) in [0, 1] float32, with `params.return_scales` one such tensor for each scale.
    """
    config = models[0].config
    B, last = len(labels), len(config.scales) - 1
    guided_scales = _guided_scales(params, last + 1)
    codebook = tokenizer.quantize.embedding.weight
    f_hat = codebook.new_zeros(B, config.code_dim, *2 * config.patch_nums[-1:], dtype=torch.float32)
    inputs: list[Tensor] = []  # one per scale after the first
    tokens: list[Tensor] = []
    images: list[Tensor] = []
    finite = torch.ones((), dtype=torch.bool, device=labels.device)
    if source:
        residual, generated = SourceImages(*source)
        finite = residual.isfinite().all()
        generated_of_scale = generated.split(config.scales, 1)
    for k, length in enumerate(config.scales):
        progress = k / last if last else 0.0
        if k in models:
            transformer = _Transformer(models[k], labels, params.backend, guided=k < guided_scales)
        elif k == guided_scales:
            transformer.drop_unconditional()
        hidden = transformer.hidden(inputs)[:, -length:]
        logits = transformer.logits(hidden, params.cfg * progress)  # (B, l, V)
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
            inputs.append(tokenizer.next_input(k + 1, f_hat))
    finite = finite & images[-1].isfinite().all()
    return torch.cat(tokens, 1), finite, *images


def _guided_scales(params: SamplingParams, scales: int) -> int:
    """Number of first scales with unconditional rows; the first scale's guidance is 0, so that it alone needs none."""
    guided = scales if params.guidance_until is None else params.guidance_until
    return guided if params.cfg > 0 and guided > 1 else 0


class _Transformer:
    """A model with the embeddings, modulation and states of a batch: B conditional rows and, with guidance, B
    unconditional ones."""

    def __init__(self, model: ScaleTransformer, labels: Tensor, backend: str, *, guided: bool) -> None:
        self.model, self.batch, self.guided, self.backend = model, len(labels), guided, backend
        rows = F.pad(labels, (0, int(guided)), value=model.config.num_classes)
        cond = model.class_emb(rows)
        self.modulation = model.modulation(rows, cond, self._expand)
        self.start = self._expand(model.start(cond))
        self.positions = model.positions()
        self.scales_done = 0
        self.states: Sequence[State | None] = model.empty_states(len(self.start))

    def hidden(self, inputs: Sequence[Tensor]) -> Tensor:
        """The head's input for all scales up to the last input that the states do not include yet: (rows, tokens, C).

        A model that takes over at a scale thus computes the states of all coarser ones in the same pass.

        Args:
            inputs: (B, tokens, code_dim) float32 of each scale so far; the first scale has none.
        """
        all_scales, first = self.model.config.scales, self.scales_done
        self.scales_done = len(inputs) + 1
        parts = [] if first else [self.start]
        if missing := inputs[max(first - 1, 0) :]:
            joined = torch.cat([*missing], 1) if len(missing) > 1 else missing[0]
            embedded = self.model.word_embed(joined.to(self.start.dtype))
            parts.append(embedded.repeat(2, 1, 1) if self.guided else embedded)
        x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        start, scales = sum(all_scales[:first]), all_scales[first : self.scales_done]
        x = x + self.positions[:, start : start + x.shape[1]]
        hidden, self.states = self.model.hidden(x, self.modulation, scales, self.states, backend=self.backend)
        return hidden

    def logits(self, hidden: Tensor, c: float) -> Tensor:
        """Logits (B, l, V) with guidance, (1+c)·cond − c·uncond, of the head's input: the head is affine."""
        if self.guided:
            hidden = (1 + c) * hidden[: self.batch] - c * hidden[self.batch :]
        logits: Tensor = self.model.head(hidden)
        return logits

    def drop_unconditional(self) -> None:
        """Go on without guidance, with the states of the conditional rows."""
        self.guided = False
        self.modulation = Modulation(*([rows[: self.batch] for rows in vectors] for vectors in self.modulation))
        self.states = [state and first_rows(state, self.batch) for state in self.states]

    def _expand(self, t: Tensor) -> Tensor:
        """B conditional rows and one unconditional row → 2B rows; without guidance unchanged."""
        return torch.cat([t[:-1], t[-1:].expand(self.batch, *t.shape[1:])]) if self.guided else t
