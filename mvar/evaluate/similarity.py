"""PSNR and SSIM of pairs of images, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 255
WINDOW, SIGMA = 11, 1.5  # side and standard deviation of the Gaussian window of SSIM, in pixels
K1, K2 = 0.01, 0.03


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each pair, over all pixels and channels.

    Args:
        a, b: (B, H, W, C) uint8.

    Returns:
        (B,) float64.

    Raises:
        ValueError: other shapes or dtypes.
    """
    _check(a, b, 1)
    return (a.double() - b.double()).square().flatten(1).mean(1)


def decibels(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of 8-bit images from their mean squared error: 10·log₁₀(255² / mse)."""
    return 10 * (PEAK**2 / mse).log10()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, (B,) float64; infinite for equal images. See :func:`mse`."""
    return decibels(mse(a, b))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al., "Image quality assessment", 2004).

    Gaussian window of 11×11 pixels with σ = 1.5, K1 = 0.01, K2 = 0.03, covariances normalized by the sum of the
    window's weights. Of each channel on its own, averaged over the channels and over all positions at which the window
    lies inside the image. scikit-image computes the same with `gaussian_weights=True, use_sample_covariance=False`.

    Args:
        a, b: (B, H, W, C) uint8, at least 11 pixels per side.

    Returns:
        (B,) float64.

    Raises:
        ValueError: other shapes or dtypes.
    """
    _check(a, b, WINDOW)
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=a.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = window / window.sum()
    values = [_ssim(*pair, window) for pair in zip(a, b, strict=True)]  # one at a time: five maps per channel
    return torch.stack(values) if values else a.new_zeros(0, dtype=torch.float64)


def _ssim(a: Tensor, b: Tensor, window: Tensor) -> Tensor:
    """SSIM of two images (H, W, C)."""
    x, y = (image.permute(2, 0, 1).double() for image in (a, b))
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # (5C, 1, H, W)
    means = F.conv2d(F.conv2d(maps, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = means.unflatten(0, (5, -1))
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    variances = xx - mean_x.square() + yy - mean_y.square()
    return (luminance * (2 * (xy - mean_x * mean_y) + c2) / (variances + c2)).mean()


def _check(a: Tensor, b: Tensor, side: int) -> None:
    for name, images in (("a", a), ("b", b)):
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape != a.shape or min(a.shape[1:3]) < side:
            expected = f"(B, H, W, C) uint8, both of the same shape, with sides of at least {side}"
            raise ValueError(f"{name}: expected {expected}; got {tuple(images.shape)} {images.dtype}")
