"""The image and the mask of an edit, from files of any format and size."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mvar.utils.errors import message
from mvar.utils.files import is_environmental
from mvar.utils.images import to_rgb

MAX_CANVAS_SIDE = 8192
"""256 MiB with mask; the result has at most 1,024 pixels per side."""

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels"""


@dataclass(frozen=True)
class Canvas:
    """An image, RGB, and its mask, mode L, of the same size: 255 where the image is generated anew, 0 elsewhere."""

    image: Image.Image
    mask: Image.Image

    def fitted(self, resolution: int) -> tuple[Tensor, Tensor, str]:
        """Scale the shorter side to R = `resolution` and crop the center.

        Returns:
            The image (3, R, R) float32 in [0, 1]; the mask (R, R) bool, in which a masked pixel masks the one that it
            is scaled to, however small its share; and a description of what was scaled and cropped.

        Raises:
            ValueError: nothing of the mask is left.
        """
        width, height = self.image.size
        shorter = min(width, height)
        size = max(resolution * width // shorter, resolution), max(resolution * height // shorter, resolution)
        left, top = ((side - resolution) // 2 for side in size)
        target = resolution, resolution
        # The crop's box in the source, so that an extreme aspect ratio does not make a huge intermediate image.
        unit = shorter / resolution
        right, bottom = min((left + resolution) * unit, width), min((top + resolution) * unit, height)  # rounding
        box = left * unit, top * unit, right, bottom
        image = self.image.resize(target, Image.Resampling.LANCZOS, box)
        mask = self.mask.convert("F").resize(target, Image.Resampling.BOX, box)
        hidden = torch.from_numpy(np.array(mask)) > 0
        if not bool(hidden.any()):
            raise ValueError(f"mask: nothing of it is in the center crop of {resolution} × {resolution} pixels")
        steps = [f"{width} × {height} pixels"]
        if size != self.image.size:
            steps.append(f"scaled to {size[0]} × {size[1]}")
        if size != target:
            steps.append(f"cropped to the center {resolution} × {resolution}")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return pixels, hidden, ", ".join(steps)


def read(path: str | Path, background: str = "white") -> Image.Image:
    """Read an image as RGB, rotated as its EXIF data says, and on a background if it is transparent.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it is not an image, a damaged one, or has more than 16 bits per channel.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba)
            return to_rgb(image)
    except Exception as error:  # Pillow raises a dozen types for damaged files
        if isinstance(error, FileNotFoundError | IsADirectoryError) or is_environmental(error):
            raise
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else message(error)
        raise ValueError(f"{path}: {reason}") from error


def with_mask_file(image: Image.Image, path: str | Path) -> Canvas:
    """Mask from a file of the image's size, white where the image is generated anew, black or transparent elsewhere.

    Raises:
        OSError: as :func:`read`.
        ValueError: as :func:`read`, or the mask has another size or no white pixel.
    """
    mask = read(path, background="black").convert("L").point(lambda value: 255 * (value >= 128))
    if mask.size != image.size:
        expected = f"expected the size of the image, {image.width} × {image.height}"
        raise ValueError(f"{path}: {expected}, got {mask.width} × {mask.height}")
    if mask.getbbox() is None:
        raise ValueError(f"{path}: expected white pixels where the image is generated anew, got none of at least 128")
    return Canvas(image, mask)


def with_box(image: Image.Image, box: Box) -> Canvas:
    """Mask of a box in the image. Raises ValueError if it is empty or not inside of the image."""
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        expected = f"x0 < x1 ≤ {image.width} and y0 < y1 ≤ {image.height}"
        raise ValueError(f"box: expected x0,y0,x1,y1 with {expected}, got {','.join(map(str, box))}")
    mask = Image.new("L", image.size)
    mask.paste(255, box)
    return Canvas(image, mask)


def with_margins(image: Image.Image, margins: Box) -> Canvas:
    """The image on a larger canvas, whose margins are masked and repeat the pixels at the image's edge.

    As generated images are square, the shorter side of the canvas gets further margins, equal on both sides.

    Raises:
        ValueError: margins are negative, all 0, or too large.
    """
    left, top, right, bottom = margins
    if min(margins) < 0 or not any(margins):
        raise ValueError(f"margins: expected pixels of at least 0, not all 0, got {','.join(map(str, margins))}")
    width, height = image.width + left + right, image.height + top + bottom
    side = max(width, height)
    if side > MAX_CANVAS_SIDE:
        raise ValueError(f"margins: expected a canvas of at most {MAX_CANVAS_SIDE} pixels per side, got {side}")
    left, top = left + (side - width) // 2, top + (side - height) // 2
    right, bottom = side - image.width - left, side - image.height - top
    # Scaling mixes neighboring pixels: other ones than those at the edge would be visible in the image.
    pixels = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = Image.new("L", (side, side), 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return Canvas(Image.fromarray(pixels), mask)


def everywhere(image: Image.Image) -> Canvas:
    return Canvas(image, Image.new("L", image.size, 255))
