"""What every kernel of adaln and gated_adaln takes, checked by the public functions."""

from typing import NamedTuple

from torch import Tensor

from mvar_kernels.binding import view


class AdaLN(NamedTuple):
    """x (B, L, C); scale and shift (B, C)."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    eps: float

    def readable(self) -> "AdaLN":
        """The same with the last dimension of every tensor contiguous: in place, or a copy where it must be."""
        return AdaLN(view(self.x), view(self.scale), view(self.shift), self.eps)


class GatedAdaLN(NamedTuple):
    """x and branch (B, L, C), in the backward x' in the place of x; gate, scale and shift (B, C)."""

    x: Tensor
    branch: Tensor
    gate: Tensor
    scale: Tensor
    shift: Tensor
    eps: float

    def readable(self) -> "GatedAdaLN":
        x, branch, gate, scale, shift, eps = self
        return GatedAdaLN(view(x), view(branch), view(gate), view(scale), view(shift), eps)
