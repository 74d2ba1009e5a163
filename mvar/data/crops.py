"""One picture: reading, Lanczos resize, crop. The transforms of VAR's trainer, with Pillow alone."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvar.data.order import Purpose, below, words


def read_picture(path: Path, side: int) -> Image.Image:
    """The picture in RGB, its shorter side resized to `side` by Lanczos's filter. Raises what Pillow raises."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    width, height = picture.size
    shorter = min(width, height)
    if shorter == side:
        return picture
    return picture.resize((side * width // shorter, side * height // shorter), Image.Resampling.LANCZOS)


def centre_crop(picture: Image.Image, resolution: int) -> Tensor:
    """The middle of a picture, (3, R, R) float32 in [−1, 1]."""
    left, top = (round((side - resolution) / 2) for side in picture.size)
    return _crop(picture, resolution, left, top, flipped=False)


def random_crop(picture: Image.Image, resolution: int, *, flip: bool, seed: int, epoch: int, item: int) -> Tensor:
    """The crop (3, R, R) float32 in [−1, 1] that this item has in this epoch, with `flip` mirrored in half of all."""
    across, down, mirror = words(3, Purpose.CROP, seed=seed, epoch=epoch, item=item).tolist()
    left, top = (below(w, side - resolution + 1) for w, side in zip((across, down), picture.size, strict=True))
    return _crop(picture, resolution, left, top, flipped=flip and below(mirror, 2) == 1)


def _crop(picture: Image.Image, resolution: int, left: int, top: int, flipped: bool) -> Tensor:
    crop = picture.crop((left, top, left + resolution, top + resolution))
    if flipped:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float()
    return pixels.div_(255).mul_(2).sub_(1)
