"""Sampling of a batch of images: every token passes every layer once, because the blocks' states are carried.

From tensors to tensors: nothing waits for the device, and no value decides what is done, so that a CUDA graph can
hold all of it (graphs.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mvar_kernels as mk
from mvar.layers import State
from mvar.model import Model
from mvar.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingParams:
    """How to sample: see :func:`mvar.generate`."""

    cfg: float
    top_k: int
    top_p: float
    more_smooth: bool
    return_scales: bool
    backend: str


@torch.no_grad()
def sample_batch(
    model: Model, tokenizer: Tokenizer, how: SamplingParams, labels: Tensor, image_index: Tensor, seed: Tensor
) -> tuple[Tensor, ...]:
    """Sample one image a row.

    Args:
        model, tokenizer: as mvar.engine prepares them.
        labels, image_index: (B,) int64. seed: () int64. On the model's device; read there and never here.

    Returns:
        tokens (B, L) int64; whether images and logits, but for codes at −∞, are finite, () bool; images (B, 3, R, R)
        in [0, 1] float32, with `how.return_scales` one such tensor for each scale.
    """
    config = model.config
    B, last = len(labels), len(config.scales) - 1
    rows = _Rows(B, guided=how.cfg > 0)
    cond = model.class_emb(F.pad(labels, (0, int(rows.guided)), value=config.num_classes))
    modulation = model.modulation(cond, rows.expand)
    positions = model.positions().split(config.scales, 1)
    x = rows.expand(model.start(cond)) + positions[0]

    codebook = tokenizer.quantize.embedding.weight
    f_hat = codebook.new_zeros(B, config.code_dim, *2 * config.patch_nums[-1:], dtype=torch.float32)
    states: Sequence[State | None] = model.empty_states(len(x))
    tokens, pictures = [], []
    finite = torch.ones((), dtype=torch.bool, device=labels.device)
    for k, length in enumerate(config.scales):
        hidden, states = model.hidden(x, modulation, (length,), states, backend=how.backend)
        progress = k / last if last else 0.0
        logits = model.head(rows.guide(hidden, how.cfg * progress)).float()  # (B, l, V)
        finite = finite & logits.amax(-1).isfinite().all()  # a code at −∞ is ruled out, all of them are an error
        draw: dict[str, Any] = {
            "top_k": how.top_k,
            "top_p": how.top_p,
            "seed": seed,
            "image_index": image_index,
            "scale_index": k,
            "backend": how.backend,
        }
        tokens.append(mk.sample_tokens(logits, **draw))
        if how.more_smooth:
            temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
            embedded = mk.soft_embedding(
                logits, None, codebook, sharpness=1 + progress, temperature=temperature, **draw
            )
        else:
            embedded = tokenizer.embed(tokens[-1])
        f_hat = f_hat + tokenizer.scale_features(k, embedded)
        if how.return_scales or k == last:
            pictures.append((tokenizer.decode_features(f_hat) + 1) * 0.5)
        if k < last:
            step = model.word_embed(tokenizer.next_input(k + 1, f_hat).to(x.dtype)) + positions[k + 1]
            x = rows.repeat(step)
    finite = finite & pictures[-1].isfinite().all()
    return torch.cat(tokens, 1), finite, *pictures


class _Rows(NamedTuple):
    """Rows of the batch: B conditional ones and, when guided, the same B images without a class."""

    batch: int
    guided: bool

    def expand(self, t: Tensor) -> Tensor:
        """B rows and one unconditional row → 2B rows; the unconditional one was computed once."""
        return torch.cat([t[:-1], t[-1:].expand(self.batch, *t.shape[1:])]) if self.guided else t

    def repeat(self, t: Tensor) -> Tensor:
        return t.repeat(2, 1, 1) if self.guided else t

    def guide(self, hidden: Tensor, c: float) -> Tensor:
        """(1+c)·cond − c·uncond on the head's input: the head is affine, so this equals guidance of its logits."""
        return (1 + c) * hidden[: self.batch] - c * hidden[self.batch :] if self.guided else hidden
