"""adaLN modulation by the class: a gate after each branch, a scale and a shift before each branch and the head.

It does not depend on the scale, so it is computed once per image.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Modulation(NamedTuple):
    """Modulation vectors (B, C) of all branches of all blocks, in order, and of the head."""

    gates: list[Tensor]
    """One per branch."""
    scales: list[Tensor]
    """One per branch, and one for the head."""
    shifts: list[Tensor]
    """One per branch, and one for the head."""

    @classmethod
    def of(cls, blocks: Iterable[Tensor], head: Tensor) -> "Modulation":
        """From the outputs of the modulation layers: [gates, scales, shifts] of each block's branches, each
        (B, 3·branches·C), and [scale, shift] of the head, (B, 2C)."""
        scale, shift = head.chunk(2, -1)
        parts = [[part.split(scale.shape[-1], -1) for part in vectors.chunk(3, -1)] for vectors in blocks]
        gates, scales, shifts = ([v for of_block in kind for v in of_block] for kind in zip(*parts, strict=True))
        return cls(gates, [*scales, scale], [*shifts, shift])


def modulation_layer(channels: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, vectors * channels, dtype=torch.float32))
