"""adaLN modulation by the class: a gate after each branch, a scale and a shift before each branch and the head.

It does not depend on the scale, so it is computed once per image.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Modulation(NamedTuple):
    """Modulation vectors (B, C) of all branches of all blocks, in order, and of the head."""

    gates: list[Tensor]
    """One per branch."""
    scales: list[Tensor]
    """One per branch, and one for the head."""
    shifts: list[Tensor]
    """One per branch, and one for the head."""


def modulation_layer(channels: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, vectors * channels, dtype=torch.float32))


class JoinedModulation(nn.Module):
    """All modulation layers of a model as one matmul, for inference.

    Output vectors are in the order of :class:`Modulation`: all gates, all scales, all shifts.

    Args:
        layers: linear layers of the blocks, or the shared one.
        head: linear layer of the head.
        offsets: with a shared layer, the offset of each block, (gates, scales and shifts of its branches, C).
    """

    def __init__(self, layers: Sequence[nn.Linear], head: nn.Linear, offsets: Sequence[Tensor] = ()) -> None:
        super().__init__()
        weight = _join([layer.weight for layer in layers], head.weight)
        bias = _join([layer.bias for layer in layers], head.bias)
        self.channels = weight.shape[1]
        self.linear = nn.Linear(self.channels, len(weight), dtype=weight.dtype, device="meta")
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        self.linear.bias = nn.Parameter(bias, requires_grad=False)
        branches = layers[0].out_features // (3 * self.channels)
        self.branches = branches * len(offsets or layers)
        self.offsets: Tensor | None = None
        if offsets:
            # Output vectors of `linear`: those of one block and of the head.
            vectors = torch.arange(3 * branches + 2, dtype=torch.int64, device=weight.device)
            gates_and_scales, scale, shifts, shift = vectors.split((2 * branches, 1, branches, 1))
            self.index = _join([torch.cat([gates_and_scales, shifts])] * len(offsets), torch.cat([scale, shift]))
            self.offsets = _join(offsets, torch.zeros_like(offsets[0][:2]))

    def forward(self, cond: Tensor, expand: Callable[[Tensor], Tensor]) -> Modulation:
        """Compute the modulation of class embeddings.

        Args:
            cond: (B, C).
            expand: applied to all vectors, for a batch that repeats rows of `cond`.
        """
        vectors = expand(self.linear(F.silu(cond))).unflatten(-1, (-1, self.channels))
        if self.offsets is not None:
            vectors = vectors[:, self.index] + self.offsets
        pieces = vectors.split((self.branches, self.branches + 1, self.branches + 1), 1)
        return Modulation(*(list(piece.unbind(1)) for piece in pieces))


def _join(blocks: Sequence[Tensor], head: Tensor) -> Tensor:
    """Concatenate [gates, scales, shifts] of the blocks and [scale, shift] of the head to all gates, scales, shifts."""
    gates, scales, shifts = zip(*(rows.chunk(3) for rows in blocks), strict=True)
    scale, shift = head.chunk(2)
    return torch.cat([*gates, *scales, scale, *shifts, shift])
