"""M-VAR's training computation in eager PyTorch and under torch.compile: the baselines of the training benchmarks.

It computes what `Model.features` and the loss do, with the same weights and the same random drops, without mvar's
kernels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.eager_generation import convolve, mamba, norm
from mvar.models.blocks import MVARBlock
from mvar.models.layers import Attention
from mvar.models.transformer import Model
from mvar.train.objective import Objective, TokenLosses

RunBlock = Callable[[MVARBlock, Tensor, Tensor, tuple[int, ...], Tensor | None], Tensor]


class Features(NamedTuple):
    """x: (B, L, C), the output of the last block. cond: (B, C), the class embedding."""

    x: Tensor
    cond: Tensor


def block(layers: MVARBlock, x: Tensor, cond: Tensor, scales: tuple[int, ...], keep: Tensor | None) -> Tensor:
    """keep: (B, 3), stochastic depth's factors on the branches of each image; None for no drops."""
    g1, g2, g3, s1, s2, s3, t1, t2, t3 = (v[:, None].to(x.dtype) for v in layers.modulation(cond).chunk(9, -1))
    if keep is not None:
        g1, g2, g3 = (g * k[:, None, None] for g, k in zip((g1, g2, g3), keep.to(x.dtype).unbind(1), strict=True))
    x = x + g1 * attention_by_scale(layers.attn, norm(x) * (1 + s1) + t1, scales)
    x = x + g2 * mamba(layers.mamba, norm(x) * (1 + s2) + t2, convolve if x.is_cuda else convolve_by_taps)
    return x + g3 * layers.ffn(norm(x) * (1 + s3) + t3)


def features(
    model: Model, labels: Tensor, inputs: Tensor, draws: Tensor | None = None, run_block: RunBlock = block
) -> Features:
    """draws: as of :meth:`Model.features`; None for no drops. run_block: :func:`block`, compiled."""
    config = model.config
    branches: list[Tensor | None] = [None] * config.depth
    if draws is not None:
        labels = torch.where(draws[:, 0] < config.label_drop, config.num_classes, labels)
        assert config.drop_path is not None
        keep = 1 - torch.linspace(0, config.drop_path, config.depth, device=draws.device)[:, None]
        branches[:] = ((draws[:, 1:].unflatten(1, (config.depth, -1)) < keep) / keep).unbind(1)
    cond = model.class_emb(labels)
    x = torch.cat([model.start(cond), model.word_embed(inputs)], 1) + model.positions()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for layers, of_block in zip(model.typed_blocks(), branches, strict=True):
        assert isinstance(layers, MVARBlock)
        x = run_block(layers, x, cond, config.scales, of_block)
    return Features(x, cond)


def attention_by_scale(attn: Attention, x: Tensor, scales: tuple[int, ...]) -> Tensor:
    """The fastest baseline of ops.py on each device: matmuls by scale on a CPU, SDPA by scale on a GPU."""
    q, k, v = attn.qkv(x).permute(2, 0, 3, 1, 4)  # (B, H, L, D)
    scale = 0.25 * q.shape[-1] ** -0.5

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if x.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        return ((q * scale) @ k.mT).softmax(-1).to(v.dtype) @ v

    outs = [one(*parts) for parts in zip(*(t.split(scales, 2) for t in (q, k, v)), strict=True)]
    return attn.proj(torch.cat(outs, 2).transpose(1, 2).flatten(2))


def convolve_by_taps(xbc: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Equal to :func:`convolve`. On a CPU its forward and backward are faster than conv1d's: a mixer of 64 digits takes
    0.8 times as long, one of 680 tokens 0.92 to 0.99 times."""
    L, taps = xbc.shape[1], weight.shape[-1]
    padded, out = F.pad(xbc, (0, 0, taps - 1, 0)), bias.to(xbc.dtype)
    for tap in range(taps):
        out = torch.addcmul(out, padded[:, tap : tap + L], weight[:, 0, tap].to(xbc.dtype))
    return out


class EagerObjective(Objective):
    """The losses of :class:`Objective`, from the eager model; without label smoothing and progressive training."""

    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        tokens: Tensor,
        draws: Tensor | None = None,
        *,
        newest_weight: float = 1.0,
        share: float = 1.0,
    ) -> TokenLosses:
        if (self.smoothing, newest_weight, share) != (0, 1, 1):
            raise ValueError("--ls, --pg, --ac: expected their defaults")
        x, cond = self.features(labels, inputs, draws)
        return TokenLosses(*self.losses(self.model, x, cond, tokens))

    def features(self, labels: Tensor, inputs: Tensor, draws: Tensor | None) -> Features:
        return features(self.model, labels, inputs, draws)

    def losses(self, model: Model, x: Tensor, cond: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, shift = model.head_nm.ada_lin(cond)[:, None].chunk(2, -1)
        values = model.head(norm(x) * (1 + scale) + shift).float()  # (B, L, V)
        nll = F.cross_entropy(values.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        return nll.mean(), nll.detach(), values.detach().argmax(-1)


class CompiledObjective(EagerObjective):
    """One graph for all blocks and one for head and loss. Validation, of other shapes, is not compiled."""

    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **options)
        self.compiled_block, self.compiled_losses = torch.compile(block), torch.compile(super().losses)

    def features(self, labels: Tensor, inputs: Tensor, draws: Tensor | None) -> Features:
        return features(self.model, labels, inputs, draws, self.compiled_block if self.training else block)

    def losses(self, model: Model, x: Tensor, cond: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        compute = self.compiled_losses if self.training else super().losses
        found: tuple[Tensor, Tensor, Tensor] = compute(model, x, cond, tokens)
        return found


OURS, EAGER, COMPILED, EXACT = "mvar", "eager PyTorch", "torch.compile", "reference in float64"
OBJECTIVES: dict[str, type[Objective]] = {
    OURS: Objective,
    EAGER: EagerObjective,
    COMPILED: CompiledObjective,
    EXACT: Objective,
}
"""By implementation."""
