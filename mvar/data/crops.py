"""One picture: reading, Lanczos resize, crop. The transforms of VAR's trainer, with Pillow alone."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvar.data.order import Purpose, below, words

MAX_RESIZED_PIXELS = 2**26
"""Of a picture that is resized as a whole: 256 MiB. A PNG of 1 × 20,000 pixels has 157 bytes; resized to a width of 288
it has 1.7·10⁹ pixels, and took 7.6 GiB."""


class Resized(NamedTuple):
    """A picture resized to `size`; or what it is resized from, crop by crop, where all of it is too large."""

    source: Image.Image
    size: tuple[int, int]

    def crop(self, left: int, top: int, side: int) -> Image.Image:
        """side × side pixels. Resized by themselves they can differ from those of the whole: Pillow rounds and clips
        between the passes across and down, and chooses their order by the sizes."""
        if self.source.size == self.size:
            return self.source.crop((left, top, left + side, top + side))
        width, height = self.source.size
        across, down = width / self.size[0], height / self.size[1]
        right, bottom = min((left + side) * across, width), min((top + side) * down, height)
        box = left * across, top * down, right, bottom
        return self.source.resize((side, side), Image.Resampling.LANCZOS, box)


def read_picture(path: Path, side: int) -> Resized:
    """The picture in RGB, its shorter side resized to `side` by Lanczos's filter. Raises what Pillow raises."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    width, height = picture.size
    shorter = min(width, height)
    size = side * width // shorter, side * height // shorter
    if size != picture.size and math.prod(size) <= MAX_RESIZED_PIXELS:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return Resized(picture, size)


def centre_crop(picture: Resized, resolution: int) -> Tensor:
    """The middle of a picture, (3, R, R) float32 in [−1, 1]."""
    left, top = (round((side - resolution) / 2) for side in picture.size)
    return _crop(picture, resolution, left, top, flipped=False)


def random_crop(picture: Resized, resolution: int, *, flip: bool, seed: int, epoch: int, item: int) -> Tensor:
    """The crop (3, R, R) float32 in [−1, 1] that this item has in this epoch, with `flip` mirrored in half of all."""
    across, down, mirror = words(3, Purpose.CROP, seed=seed, epoch=epoch, item=item).tolist()
    left, top = (below(w, side - resolution + 1) for w, side in zip((across, down), picture.size, strict=True))
    return _crop(picture, resolution, left, top, flipped=flip and below(mirror, 2) == 1)


def _crop(picture: Resized, resolution: int, left: int, top: int, flipped: bool) -> Tensor:
    crop = picture.crop(left, top, resolution)
    if flipped:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float()
    return pixels.div_(255).mul_(2).sub_(1)
