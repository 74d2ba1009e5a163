"""Image transforms of VAR's trainer, with Pillow alone: RGB conversion, Lanczos resize, crop, horizontal flip."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvar.data.order import Purpose, below, words
from mvar.utils.images import to_rgb

MAX_RESIZED_PIXELS = 2**26
"""256 MiB; larger images are resized crop by crop. A PNG of 1 × 20,000 pixels has 157 bytes; resized to a width of 288
it has 1.7·10⁹ pixels and took 7.6 GiB."""


class Resized(NamedTuple):
    """An image of `size` (width, height): `source` has this size, or is resized crop by crop if `size` is too large."""

    source: Image.Image
    size: tuple[int, int]

    def crop(self, left: int, top: int, side: int) -> Image.Image:
        """Crop of side × side pixels.

        The crop of a larger image can differ slightly from the resized image: Pillow rounds and clips between the
        horizontal and the vertical pass, and chooses their order by the sizes.
        """
        if self.source.size == self.size:
            return self.source.crop((left, top, left + side, top + side))
        width, height = self.source.size
        scale_x, scale_y = width / self.size[0], height / self.size[1]
        right, bottom = min((left + side) * scale_x, width), min((top + side) * scale_y, height)
        box = left * scale_x, top * scale_y, right, bottom
        return self.source.resize((side, side), Image.Resampling.LANCZOS, box)


def read_image(path: Path, side: int) -> Resized:
    """Read an image as RGB and resize its shorter side to `side` with a Lanczos filter. Raises what Pillow raises."""
    with Image.open(path) as file:
        image = to_rgb(file)
    width, height = image.size
    shorter = min(width, height)
    size = side * width // shorter, side * height // shorter
    if size != image.size and math.prod(size) <= MAX_RESIZED_PIXELS:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return Resized(image, size)


def center_crop(image: Resized, resolution: int) -> Tensor:
    """Center crop, (3, R, R) float32 in [−1, 1]."""
    left, top = (round((side - resolution) / 2) for side in image.size)
    return _crop(image, resolution, left, top, flipped=False)


def random_crop(image: Resized, resolution: int, *, flip: bool, seed: int, epoch: int, item: int) -> Tensor:
    """Random crop, (3, R, R) float32 in [−1, 1], determined by (seed, epoch, item).

    Args:
        flip: flip horizontally with probability 1/2.
    """
    *offsets, flip_word = words(3, Purpose.CROP, seed=seed, epoch=epoch, item=item).tolist()
    left, top = (below(w, side - resolution + 1) for w, side in zip(offsets, image.size, strict=True))
    return _crop(image, resolution, left, top, flipped=flip and below(flip_word, 2) == 1)


def _crop(image: Resized, resolution: int, left: int, top: int, flipped: bool) -> Tensor:
    crop = image.crop(left, top, resolution)
    if flipped:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float()
    return pixels.div_(255).mul_(2).sub_(1)
