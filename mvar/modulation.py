"""What the class decides: a gate for each branch, and a scale and a shift before each branch and the head.

It is the same at every scale: once an image is enough.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Modulation(NamedTuple):
    """All that the class decides: vectors (B, C) for all branches of all blocks in order, and for the head."""

    gates: list[Tensor]
    """one a branch."""
    scales: list[Tensor]
    """one more than branches: the scale before each branch, and before the head."""
    shifts: list[Tensor]
    """likewise."""


def modulation_layer(channels: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, vectors * channels, dtype=torch.float32))


class JoinedModulation(nn.Module):
    """All modulation layers of a model as one product, for inference.

    Its vectors are in the order of :class:`Modulation`, so that each of the three is one piece of them.

    Args:
        layers: the linear ones of the blocks, or the one that they share. head: the head's.
        offsets: of a shared layer, what each block adds to it, (gates, scales and shifts of its branches, C).
    """

    def __init__(self, layers: Sequence[nn.Linear], head: nn.Linear, offsets: Sequence[Tensor] = ()) -> None:
        super().__init__()
        weight = _joined([layer.weight for layer in layers], head.weight)
        bias = _joined([layer.bias for layer in layers], head.bias)
        self.channels = weight.shape[1]
        self.linear = nn.Linear(self.channels, len(weight), dtype=weight.dtype, device="meta")
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        self.linear.bias = nn.Parameter(bias, requires_grad=False)
        branches = layers[0].out_features // (3 * self.channels)
        self.branches = branches * len(offsets or layers)
        self.offsets: Tensor | None = None
        if offsets:
            vectors = torch.arange(
                3 * branches + 2, dtype=torch.int64, device=weight.device
            )  # what `linear` gives: of one block
            gates_and_scales, scale, shifts, shift = vectors.split((2 * branches, 1, branches, 1))
            self.source = _joined([torch.cat([gates_and_scales, shifts])] * len(offsets), torch.cat([scale, shift]))
            self.offsets = _joined(offsets, torch.zeros_like(offsets[0][:2]))

    def forward(self, cond: Tensor, expand: Callable[[Tensor], Tensor]) -> Modulation:
        """Class embeddings (B, C), and what makes rows of the batch of their rows → vectors of the batch's rows."""
        vectors = expand(self.linear(F.silu(cond))).unflatten(-1, (-1, self.channels))
        if self.offsets is not None:
            vectors = vectors[:, self.source] + self.offsets
        pieces = vectors.split((self.branches, self.branches + 1, self.branches + 1), 1)
        return Modulation(*(list(piece.unbind(1)) for piece in pieces))


def _joined(blocks: Sequence[Tensor], head: Tensor) -> Tensor:
    """Rows of [gates, scales, shifts] a block and [scale, shift] of the head → gates, scales, shifts of all."""
    gates, scales, shifts = zip(*(rows.chunk(3) for rows in blocks), strict=True)
    scale, shift = head.chunk(2)
    return torch.cat([*gates, *scales, scale, *shifts, shift])
