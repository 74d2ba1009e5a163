"""A block: branches around a residual stream, each behind an adaLN and a gate.

M-VAR's (arXiv 2411.10433), on x (B, L, C), with nine vectors a sample from the class embedding:

    x = x + g1 · Attention(LN(x)·(1+s1) + t1)      bidirectional, inside each scale
    x = x + g2 · Mamba2(LN(x)·(1+s2) + t2)         over the whole sequence, coarse to fine
    x = x + g3 · FFN(LN(x)·(1+s3) + t3)

VAR's (arXiv 2404.02905), with six:

    x = x + g1 · Attention(LN(x)·(1+s1) + t1)      over the own scale and all coarser ones
    x = x + g2 · FFN(LN(x)·(1+s2) + t2)

computed as a chain: each gated_adaln adds a branch to x and prepares the next branch's input. So a block takes x and
its first branch's input h, and gives x and the input of whatever comes next.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import mvar_kernels as mk
from mvar.config import ModelConfig
from mvar.layers import Attention, CausalAttention, FeedForward, IntraScaleAttention, KeyValues, Mamba2, State
from mvar.modulation import modulation_layer
from mvar.sharding import gathers_itself, is_sharded

LN_EPS = 1e-6


class AfterBranch(NamedTuple):
    """What follows a branch, vectors (B, C): its gate, and the scale and shift before the next branch or the head."""

    gate: Tensor
    scale: Tensor
    shift: Tensor


class Block(nn.Module):
    """What M-VAR's and VAR's blocks share: the chain of branches, and their modulation.

    ada_lin: a layer of its own; with `config.shared_adaln` instead ada_gss, what this block adds to the output of
    the model's shared layer.
    """

    branches: ClassVar[int]
    attn: Attention
    ffn: FeedForward

    def add_modulation(self, config: ModelConfig) -> None:
        vectors, C = 3 * self.branches, config.channels
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, vectors, C, dtype=torch.float32))
        else:
            self.ada_lin = modulation_layer(C, vectors)

    def modulation(self, cond: Tensor) -> tuple[Tensor, ...]:
        """Gates, then scales, then shifts of all branches, each (B, C), from the class embedding (B, C) or what the
        shared layer made of it (B, vectors·C)."""
        shared = hasattr(self, "ada_gss")
        if not shared and not gathers_itself(self.ada_lin) and any(map(is_sharded, self.ada_lin.parameters())):
            raise RuntimeError(
                "ada_lin: its weights are sharded, for it is called before its block: shard it by itself, "
                "fully_shard(block.ada_lin), before fully_shard(block); got DTensor"
            )
        return (cond + self.ada_gss.flatten() if shared else self.ada_lin(cond)).chunk(3 * self.branches, -1)

    def empty_state(self, batch: int) -> State:
        """What the block remembers before the first scale."""
        raise NotImplementedError

    def mixers(self) -> Sequence[nn.Module]:
        """The branches before the feed-forward one: called as mixer(h, scales, state, backend) → (B, L, C), state."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        after: Sequence[AfterBranch],
        scales: tuple[int, ...],
        state: State | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, State | None]:
        """All branches over the new tokens of `scales`, whole scales. `state` None: nothing came before."""
        *after_mixers, after_ffn = after
        for mixer, follows in zip(self.mixers(), after_mixers, strict=True):
            mixed, state = mixer(h, scales, state, backend)
            x, h = _add(x, mixed, follows, backend)
        x, h = _add(x, self.ffn(h), after_ffn, backend)
        return x, h, state


class MVARBlock(Block):
    branches = 3
    attn: IntraScaleAttention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = IntraScaleAttention(config)
        self.mamba = Mamba2(config)
        self.ffn = FeedForward(config)
        self.add_modulation(config)

    def empty_state(self, batch: int) -> mk.Mamba2State:
        return self.mamba.empty_state(batch)

    def mixers(self) -> tuple[IntraScaleAttention, Mamba2]:
        return self.attn, self.mamba


class VARBlock(Block):
    branches = 2
    attn: CausalAttention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = CausalAttention(config)
        self.ffn = FeedForward(config)
        self.add_modulation(config)

    def empty_state(self, batch: int) -> KeyValues:
        return self.attn.empty_state(batch)

    def mixers(self) -> tuple[CausalAttention]:
        return (self.attn,)


def _add(x: Tensor, branch: Tensor, after: AfterBranch, backend: str) -> tuple[Tensor, Tensor]:
    # Under autocast layers answer in 16 bits; x and what is added to it stay in x's dtype.
    return mk.gated_adaln(x, branch.to(x.dtype), *after, eps=LN_EPS, backend=backend)


class HeadNorm(nn.Module):
    """The modulation of the last layer norm, before the head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ada_lin = modulation_layer(channels, 2)
