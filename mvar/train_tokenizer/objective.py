"""The losses of a tokenizer's training, except for the adversarial one."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvar.train_tokenizer.flags import TokenizerFlags


class Losses(NamedTuple):
    """Losses of each image, (B,) float32; `perceptual` is zero without LPIPS."""

    l1: Tensor
    """mean absolute error of the pixels in [−1, 1]"""
    l2: Tensor
    """mean squared error"""
    perceptual: Tensor

    def total(self, flags: TokenizerFlags) -> Tensor:
        """The weighted mean, a scalar."""
        return (flags.l1 * self.l1 + flags.l2 * self.l2 + flags.perceptual * self.perceptual).mean()


def reconstruction_losses(images: Tensor, reconstructions: Tensor, lpips: nn.Module | None) -> Losses:
    """The losses of reconstructions, not clamped, of images in [−1, 1]: (B, 3, R, R) float32 each."""
    error = (reconstructions - images).flatten(1)
    l1 = error.abs().mean(1)
    perceptual = torch.zeros_like(l1) if lpips is None else lpips(images, reconstructions)
    return Losses(l1, error.square().mean(1), perceptual)


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, (B,), of the reconstructions clamped to [−1, 1]."""
    error = (reconstructions.clamp(-1, 1) - images).square().flatten(1).mean(1)
    return 10 * (4 / error.clamp(min=1e-10)).log10()  # the range is 2 wide; 106 dB for equal images
