"""Image files, image grids, and the npz format of ADM's evaluator."""

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvar.utils.errors import message
from mvar.utils.files import atomic_write


def to_bytes(images: Tensor) -> Tensor:
    """Convert images (B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8 by rounding to nearest, on the same device."""
    return (images.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as Pillow does, but 16-bit gray to 8 bits instead of clipping it.

    Raises:
        ValueError: pixels are 32-bit integers or floating point, whose range is not known.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits per channel, got pixels of mode {image.mode}")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
    return image.convert("RGB")


class _Format(NamedTuple):
    name: str
    """in Pillow"""
    max_side: int
    options: Mapping[str, Any] = {}


_PNG = _Format("PNG", 2**31 - 1)
_JPEG = _Format("JPEG", 65500, {"quality": 95, "subsampling": 0})
_FORMATS: Mapping[str, _Format] = {
    "": _PNG,  # for example a pipe
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Format("WEBP", 16383, {"lossless": True}),
    ".bmp": _Format("BMP", 2**31 - 1),
}


def check_image(path: str | Path, height: int = 1, width: int = 1) -> None:
    """Raise ValueError unless the format of the file's suffix exists and supports images of this size."""
    found = _format(path)
    if max(height, width) > found.max_side:
        expected = f"expected at most {found.max_side} pixels per side for {found.name}"
        raise ValueError(f"{path}: {expected}, got {height} × {width}: give a .png")


def _format(path: str | Path) -> _Format:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        known = ", ".join(name for name in _FORMATS if name)
        raise ValueError(f"{path}: expected a name that ends in one of {known}, or no suffix (PNG), got {suffix}")
    return _FORMATS[suffix]


def save_image(path: str | Path, image: Tensor) -> None:
    """Write an image (3, H, W) in [0, 1]. The suffix determines the format; without a suffix it is PNG.

    Raises:
        ValueError: the suffix is unknown, or the format does not support an image of this size.
    """
    save_pixels(path, to_bytes(image[None])[0].cpu())


def save_pixels(path: str | Path, pixels: Tensor) -> None:
    """Write an image (H, W, 3) uint8, see :func:`save_image`."""
    check_image(path, *pixels.shape[:2])
    found = _format(path)
    with atomic_write(path) as temporary:
        Image.fromarray(pixels.numpy()).save(temporary, format=found.name, **found.options)


def save_npz(path: str | Path, shape: Sequence[int], batches: Iterable[NDArray[np.uint8]], labels: Tensor) -> None:
    """Write images as `arr_0`, the format of ADM's evaluator, and their labels as `labels`.

    Batches are written one at a time, uncompressed: 50,000 images are 10 GB, which need not fit in memory.

    Args:
        shape: (B, H, W, 3), the shape of all batches together.
    """
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as content:
        with content.open("arr_0.npy", "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(stream, header)
            written = 0
            for batch in batches:
                stream.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != shape[0]:
            raise ValueError(f"batches: expected {shape[0]} images in total, got {written}")
        with content.open("labels.npy", "w") as stream:
            np.lib.format.write_array(stream, labels.numpy())


def read_npz(path: str | Path, batch: int) -> Iterator[NDArray[np.uint8]]:
    """Read the images `arr_0` of an npz, compressed or not, in batches (≤ batch, H, W, 3) uint8.

    Raises:
        ValueError: `arr_0` is missing, truncated or not (n, H, W, 3) uint8.
    """
    try:
        with zipfile.ZipFile(path) as content, content.open("arr_0.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header[version != (1, 0)](stream)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
                raise ValueError(f"arr_0: expected (n, H, W, 3) uint8, got {shape} {dtype}")
            for start in range(0, shape[0], batch):
                rows = (min(batch, shape[0] - start), *shape[1:])
                yield np.frombuffer(stream.read(math.prod(rows)), np.uint8).reshape(rows)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not an npz of images, or damaged: {message(error)}") from error


def grid_size(count: int, columns: int, height: int, width: int, *, gap: int = 2) -> tuple[int, int]:
    """Height and width of a :func:`grid` of `count` images."""
    rows = -(-count // columns)
    return rows * (height + gap) + gap, columns * (width + gap) + gap


def grid(images: Tensor, columns: int, *, gap: int = 2, enlarge: int = 1) -> Tensor:
    """Arrange images in a grid on white.

    Args:
        images: (B, 3, H, W) in [0, 1].
        columns: images per row.
        gap: pixels between images.
        enlarge: factor of nearest-neighbor upsampling.

    Returns:
        One image (3, H', W'), see :func:`grid_size`.
    """
    images = images.repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    B, _, H, W = images.shape
    canvas = images.new_ones(3, *grid_size(B, columns, H, W, gap=gap))
    for i, image in enumerate(images):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        canvas[:, top : top + H, left : left + W] = image
    return canvas
