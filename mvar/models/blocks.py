"""Transformer blocks: residual branches with adaLN modulation and gates.

M-VAR's block (arXiv 2411.10433) on x (B, L, C), with nine modulation vectors per sample from the class embedding:

    x = x + g1 · Attention(LN(x)·(1+s1) + t1)      bidirectional, within each scale
    x = x + g2 · Mamba2(LN(x)·(1+s2) + t2)         over the complete sequence, coarse to fine
    x = x + g3 · FFN(LN(x)·(1+s3) + t3)

VAR's block (arXiv 2404.02905), with six vectors:

    x = x + g1 · Attention(LN(x)·(1+s1) + t1)      over the same scale and all coarser ones
    x = x + g2 · FFN(LN(x)·(1+s2) + t2)

Residual addition and the following adaLN are fused: each gated_adaln adds a branch to x and normalizes and modulates
the sum for the next branch. A block therefore takes x and the input h of its first branch, and returns x and the input
of the next block or the head.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import mvar_kernels as mk
from mvar.models.config import ModelConfig
from mvar.models.layers import Attention, CausalAttention, FeedForward, IntraScaleAttention, KeyValues, Mamba2, State
from mvar.models.modulation import modulation_layer
from mvar.models.sharding import is_fsdp_module, is_sharded

LN_EPS = 1e-6


class AfterBranch(NamedTuple):
    """Modulation after a branch, vectors (B, C): its gate, and scale and shift of the next branch or the head."""

    gate: Tensor
    scale: Tensor
    shift: Tensor


class Block(nn.Module):
    """Base class of M-VAR's and VAR's blocks: branches and their modulation.

    The modulation layer is `ada_lin`; with `config.shared_adaln` the block has an offset `ada_gss` to the output of the
    model's shared layer instead.
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

    def modulation(self, cond: Tensor) -> Tensor:
        """Gates, scales and shifts of all branches, in this order: (B, 3·branches·C).

        Args:
            cond: class embedding (B, C), or with `config.shared_adaln` output of the shared layer (B, vectors·C).
        """
        shared = hasattr(self, "ada_gss")
        if not shared and not is_fsdp_module(self.ada_lin) and any(map(is_sharded, self.ada_lin.parameters())):
            raise RuntimeError(
                "ada_lin: expected a separately sharded layer, as it is called before its block: call "
                "fully_shard(block.ada_lin) before fully_shard(block); got DTensor"
            )
        vectors: Tensor = cond + self.ada_gss.flatten() if shared else self.ada_lin(cond)
        return vectors

    def empty_state(self, batch: int) -> State:
        """State before the first scale."""
        raise NotImplementedError

    def mixers(self) -> Sequence[nn.Module]:
        """Branches before the feed-forward network, called as mixer(h, scales, state, backend) → (B, L, C), state."""
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
        """Run all branches on the tokens of one or more complete scales.

        Args:
            x, h: residual stream and input of the first branch, (B, L, C).
            after: modulation after each branch.
            scales: tokens of each scale in x.
            state: state after all coarser scales; None for the first scales, without a carried state.

        Returns:
            x, input of the next block or the head, and the new state.
        """
        *after_mixers, after_ffn = after
        for mixer, vectors in zip(self.mixers(), after_mixers, strict=True):
            mixed, state = mixer(h, scales, state, backend)
            x, h = _add(x, mixed, vectors, backend)
        x, h = _add(x, self.ffn(h), after_ffn, backend)
        return x, h, state


class MVARBlock(Block):
    branches = 3
    attn: IntraScaleAttention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.channels
        self.attn = IntraScaleAttention(C, config.heads, config.scales, qk_norm=bool(config.qk_norm))
        self.mamba = Mamba2(
            C,
            config.inner_width,
            config.mixer_heads,
            state_dim=config.state_dim,
            conv_width=config.conv_width,
            bidirectional=config.bidirectional,
        )
        self.ffn = FeedForward(C, config.hidden_width)
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
        C = config.channels
        self.attn = CausalAttention(C, config.heads, config.num_tokens, qk_norm=bool(config.qk_norm))
        self.ffn = FeedForward(C, config.hidden_width)
        self.add_modulation(config)

    def empty_state(self, batch: int) -> KeyValues:
        return self.attn.empty_state(batch)

    def mixers(self) -> tuple[CausalAttention]:
        return (self.attn,)


def _add(x: Tensor, branch: Tensor, after: AfterBranch, backend: str) -> tuple[Tensor, Tensor]:
    # Under autocast, branches return 16-bit tensors; the residual stream keeps the dtype of x.
    return mk.gated_adaln(x, branch.to(x.dtype), *after, eps=LN_EPS, backend=backend)


class HeadNorm(nn.Module):
    """Modulation of the last layer norm, before the head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ada_lin = modulation_layer(channels, 2)
