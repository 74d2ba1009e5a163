"""What every kernel of adaln and gated_adaln takes, checked by the public functions."""

from typing import NamedTuple

from torch import Tensor

from mvar_kernels.ffi import last_dim_contiguous


class AdaLN(NamedTuple):
    """x (B, L, C); scale and shift (B, C). In the backward shift is scale: nothing of it is read."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    eps: float

    def readable(self) -> "AdaLN":
        """The same with the last dimension of every tensor contiguous: in place, or a copy where it must be."""
        return AdaLN(
            last_dim_contiguous(self.x), last_dim_contiguous(self.scale), last_dim_contiguous(self.shift), self.eps
        )


class GatedAdaLN(NamedTuple):
    """x and branch (B, L, C); gate, scale and shift (B, C). In the backward x is x', and shift is scale."""

    x: Tensor
    branch: Tensor
    gate: Tensor
    scale: Tensor
    shift: Tensor
    eps: float

    def readable(self) -> "GatedAdaLN":
        x, branch, gate, scale, shift, eps = self
        return GatedAdaLN(
            last_dim_contiguous(x),
            last_dim_contiguous(branch),
            last_dim_contiguous(gate),
            last_dim_contiguous(scale),
            last_dim_contiguous(shift),
            eps,
        )
