"""What every kernel of group_norm_silu takes, checked by the public function."""

from typing import NamedTuple

import torch
from torch import Tensor


class GroupNormSiLU(NamedTuple):
    """x (B, L, C) if channels_last, else (B, C, L), of L = H·W positions; weight and bias (C,)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    channels_last: bool


def flattened(x: Tensor) -> tuple[Tensor, bool]:
    """x (B, C, H, W) as the kernels take it, and whether it is channels last; a copy unless its samples are dense."""
    _, C, _, W = x.shape
    if x.stride()[1:] == (1, W * C, C) and not x.is_contiguous():
        return x.permute(0, 2, 3, 1).flatten(1, 2), True
    return x.flatten(2), False


def unflattened(out: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    return out.unflatten(1, shape[2:]).permute(0, 3, 1, 2) if channels_last else out.view(shape)
