"""What every kernel of adaln and gated_adaln takes, checked by the public functions."""

from typing import NamedTuple

from torch import Tensor

from mvar_kernels.ffi import last_dim_contiguous


class AdaLN(NamedTuple):
    """x (B, L, C); modulation: scale and shift, of one shape, (B, C), (1, C) or (B, L, C); weight and bias (C,).

    rms: normalized by the root mean square, without subtraction of the mean. There is no shift without a scale. In the
    backward shift is scale: nothing of it is read.
    """

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    rms: bool = False

    def is_plain(self) -> bool:
        """Whether it is a layer norm without weight, modulated by (B, C) in the dtype of x: no option is in use."""
        x, scale, shift, _, weight, bias, rms = self
        return (
            scale is not None
            and shift is not None
            and weight is None
            and bias is None
            and not rms
            and scale.dtype == x.dtype
            and scale.shape == (x.shape[0], x.shape[2])
        )

    def plain(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """x, scale and shift of a call without options, the last dimension contiguous: in place, or a copy if not."""
        x, scale, shift = self[:3]
        if scale is None or shift is None or not self.is_plain():
            return None
        return last_dim_contiguous(x), last_dim_contiguous(scale), last_dim_contiguous(shift)


class GatedAdaLN(NamedTuple):
    """x and branch (B, L, C); modulation: gate, scale and shift, and the rest, as in :class:`AdaLN`.

    In the backward x is x'.
    """

    x: Tensor
    branch: Tensor
    gate: Tensor
    scale: Tensor | None
    shift: Tensor | None
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    rms: bool = False

    def norm(self) -> AdaLN:
        """What becomes of x'."""
        return AdaLN(self.x, *self[3:])

    def is_plain(self) -> bool:
        """As in :class:`AdaLN`; the branch is in the dtype of x, too."""
        return self.branch.dtype == self.x.dtype and self.norm().is_plain()

    def plain(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """x, branch, gate, scale and shift of such a call."""
        norm = self.norm().plain() if self.branch.dtype == self.x.dtype else None
        if norm is None:
            return None
        x, scale, shift = norm
        return x, last_dim_contiguous(self.branch), last_dim_contiguous(self.gate), scale, shift
