"""Results of a generation."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Generated:
    """images: (B, 3, R, R) float32 in [0, 1]. tokens: (B, L) int64. scales: images after each scale, if requested."""

    images: Tensor
    tokens: Tensor
    scales: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class PendingResult:
    """A generation that may still be running on the device."""

    generated: Generated
    finite: Tensor
    """() bool: whether logits and images are finite."""
    dtype: torch.dtype

    def result(self) -> Generated:
        """Wait for the device. FloatingPointError: logits or images are not finite."""
        if not bool(self.finite):
            raise FloatingPointError(
                f"logits or images in {self.dtype} are not finite: NaN in the weights, or overflow"
            )
        return self.generated
