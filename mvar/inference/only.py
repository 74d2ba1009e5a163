"""Modules that were loaded for inference alone."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Self = TypeVar("Self", bound="OnlyForInference")


class OnlyForInference(nn.Module):
    """Base class of modules that cannot be trained, moved or converted."""

    dtype: torch.dtype

    def train(self: Self, mode: bool = True) -> Self:
        if mode:
            raise RuntimeError(f"{type(self).__name__} is for inference: to train it, load it without dtype")
        return super().train(mode)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for t in (*self.parameters(), *self.buffers()):
            converted = t if t.is_meta else fn(t)
            if (converted.device, converted.dtype) != (t.device, t.dtype):
                name = type(self).__name__
                raise RuntimeError(f"{name} cannot be moved or converted: load it with that device and dtype")
        return self
