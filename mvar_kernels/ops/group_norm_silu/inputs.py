"""What every kernel of group_norm_silu takes, checked by the public function."""

from typing import NamedTuple

from torch import Tensor


class GroupNormSiLU(NamedTuple):
    """x (B, L, C) if channels_last, else (B, C, L), of L = H·W positions; weight and bias (C,)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    channels_last: bool
