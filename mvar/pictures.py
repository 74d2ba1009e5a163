"""Pictures on disk: single PNGs, grids, and the npz that the ADM evaluator reads."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvar.files import replacing


def to_bytes(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] → (B, H, W, 3) uint8, rounded to the nearest, on the same device."""
    return (images.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write one (3, H, W) picture in [0, 1]."""
    save_pixels(path, to_bytes(image[None])[0].cpu())


def save_pixels(path: str | Path, pixels: Tensor) -> None:
    """Write one (H, W, 3) uint8 picture as a PNG."""
    with replacing(path) as aside:
        Image.fromarray(pixels.numpy()).save(aside, format="PNG")


def save_npz(path: str | Path, images: NDArray[np.uint8], labels: Tensor) -> None:
    """Write (B, H, W, 3) as `arr_0`, as ADM's evaluator reads it, and the labels beside it."""
    with replacing(path) as aside, aside.open("wb") as stream:
        np.savez(stream, arr_0=images, labels=labels.numpy())


def grid(images: Tensor, columns: int, *, gap: int = 2, enlarge: int = 1) -> Tensor:
    """(B, 3, H, W) in rows of `columns` → one (3, H', W') picture on white, every pixel `enlarge` times as wide."""
    images = images.repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    B, _, H, W = images.shape
    rows = -(-B // columns)
    canvas = images.new_ones(3, rows * (H + gap) + gap, columns * (W + gap) + gap)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        canvas[:, top : top + H, left : left + W] = image
    return canvas
