"""M-VAR in training as people write it in PyTorch, in its best form: the baseline of the training benchmarks.

No kernel of ours: what `Model.features` and the loss compute, with the same weights, on the same draws.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.public import convolve, mamba, norm
from mvar.blocks import MVARBlock
from mvar.layers import Attention
from mvar.model import Model

RunBlock = Callable[[MVARBlock, Tensor, Tensor, tuple[int, ...], Tensor | None], Tensor]


class Features(NamedTuple):
    """x: (B, L, C), what the last block gives. cond: (B, C), the class embedding."""

    x: Tensor
    cond: Tensor


def block(layers: MVARBlock, x: Tensor, cond: Tensor, scales: tuple[int, ...], kept: Tensor | None) -> Tensor:
    """kept: (B, 3), what stochastic depth multiplies the branches of each image by; None for no drops."""
    g1, g2, g3, s1, s2, s3, t1, t2, t3 = (v[:, None].to(x.dtype) for v in layers.modulation(cond))
    if kept is not None:
        g1, g2, g3 = (g * k[:, None, None] for g, k in zip((g1, g2, g3), kept.to(x.dtype).unbind(1), strict=True))
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
    for layers, kept in zip(model.typed_blocks(), branches, strict=True):
        assert isinstance(layers, MVARBlock)
        x = run_block(layers, x, cond, config.scales, kept)
    return Features(x, cond)


def logits(model: Model, x: Tensor, cond: Tensor) -> Tensor:
    """(B, L, V) float32"""
    scale, shift = model.head_nm.ada_lin(cond)[:, None].chunk(2, -1)
    return model.head(norm(x) * (1 + scale) + shift).float()


def loss(model: Model, x: Tensor, cond: Tensor, tokens: Tensor) -> Tensor:
    """The mean over all tokens."""
    return F.cross_entropy(logits(model, x, cond).flatten(0, 1), tokens.flatten())


def attention_by_scale(attn: Attention, x: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Of the forms in rivals.py the fastest on each device: products by scale on a CPU, SDPA by scale on a GPU."""
    q, k, v = attn.qkv(x).permute(2, 0, 3, 1, 4)  # (B, H, L, D)
    scale = 0.25 * q.shape[-1] ** -0.5

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if x.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        return ((q * scale) @ k.mT).softmax(-1).to(v.dtype) @ v

    outs = [one(*parts) for parts in zip(*(t.split(scales, 2) for t in (q, k, v)), strict=True)]
    return attn.proj(torch.cat(outs, 2).transpose(1, 2).flatten(2))


def convolve_by_taps(xbc: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As :func:`convolve`. On a CPU, forward and backward are faster than conv1d's: a mixer of 64 digits in 0.8 of the
    time, one of 680 tokens in 0.92 to 0.99."""
    L, taps = xbc.shape[1], weight.shape[-1]
    padded, out = F.pad(xbc, (0, 0, taps - 1, 0)), bias.to(xbc.dtype)
    for tap in range(taps):
        out = torch.addcmul(out, padded[:, tap : tap + L], weight[:, 0, tap].to(xbc.dtype))
    return out
