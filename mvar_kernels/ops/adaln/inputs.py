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

    def plain(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """x, scale and shift, readable, of a call without options: modulation (B, C) in the dtype of x, no weight."""
        x, scale, shift, _, weight, bias, rms = self
        if scale is None or shift is None or not _is_plain(x, scale, weight, bias, rms):
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

    def plain(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """x, branch, gate, scale and shift of such a call, the branch in the dtype of x, too."""
        x, branch, gate, scale, shift, _, weight, bias, rms = self
        if scale is None or shift is None or branch.dtype != x.dtype or not _is_plain(x, scale, weight, bias, rms):
            return None
        return (
            last_dim_contiguous(x),
            last_dim_contiguous(branch),
            last_dim_contiguous(gate),
            last_dim_contiguous(scale),
            last_dim_contiguous(shift),
        )


def _is_plain(x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> bool:
    """Where there are gate, scale and shift, which share dtype and shape."""
    if rms or weight is not None or bias is not None or scale.dtype != x.dtype:
        return False
    B, _, C = x.shape
    return scale.shape == (B, C)
