"""Pictures on disk: single ones, grids, and the npz that the ADM evaluator reads."""

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

from mvar.errors import message
from mvar.files import replacing


def to_bytes(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] → (B, H, W, 3) uint8, rounded to the nearest, on the same device."""
    return (images.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class _Format(NamedTuple):
    name: str
    """Pillow's"""
    max_side: int
    options: Mapping[str, Any] = {}


_PNG = _Format("PNG", 2**31 - 1)
_JPEG = _Format("JPEG", 65500, {"quality": 95, "subsampling": 0})
_FORMATS: Mapping[str, _Format] = {
    "": _PNG,  # a pipe, say
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Format("WEBP", 16383, {"lossless": True}),
    ".bmp": _Format("BMP", 2**31 - 1),
}


def check_picture(path: str | Path, height: int = 1, width: int = 1) -> None:
    """Raise ValueError unless a picture of this size can be written under this name, by its suffix."""
    found = _format(path)
    if max(height, width) > found.max_side:
        limit = f"{found.name} holds at most {found.max_side} pixels a side"
        raise ValueError(f"{path}: {limit}, and the picture has {height} × {width}: give a .png")


def _format(path: str | Path) -> _Format:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        known = ", ".join(name for name in _FORMATS if name)
        raise ValueError(
            f"{path}: expected a name that ends in one of {known}, or a PNG's without suffix, got {suffix}"
        )
    return _FORMATS[suffix]


def save_picture(path: str | Path, image: Tensor) -> None:
    """Write one (3, H, W) picture in [0, 1] in the format of the name's suffix; without suffix, a PNG.

    Raises ValueError for another suffix, or where the format does not hold so large a picture.
    """
    save_pixels(path, to_bytes(image[None])[0].cpu())


def save_pixels(path: str | Path, pixels: Tensor) -> None:
    """The same of (H, W, 3) uint8."""
    check_picture(path, *pixels.shape[:2])
    found = _format(path)
    with replacing(path) as aside:
        Image.fromarray(pixels.numpy()).save(aside, format=found.name, **found.options)


def save_npz(path: str | Path, shape: Sequence[int], batches: Iterable[NDArray[np.uint8]], labels: Tensor) -> None:
    """Write the batches, together (B, H, W, 3), as `arr_0`, as ADM's evaluator reads it, and the labels beside it.

    One batch after the other, uncompressed: 50,000 pictures are 10 GB, which need not fit in memory.
    """
    with replacing(path) as aside, zipfile.ZipFile(aside, "w") as content:
        with content.open("arr_0.npy", "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(stream, header)
            written = 0
            for batch in batches:
                stream.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != shape[0]:
            raise ValueError(f"batches: expected {shape[0]} pictures together, got {written}")
        with content.open("labels.npy", "w") as stream:
            np.lib.format.write_array(stream, labels.numpy())


def read_npz(path: str | Path, batch: int) -> Iterator[NDArray[np.uint8]]:
    """The pictures of such a file or of ADM's, compressed or not, in (batch, H, W, 3), never all of them at a time.

    Raises ValueError where `arr_0` is no pictures, or not all of them are there.
    """
    try:
        with zipfile.ZipFile(path) as content, content.open("arr_0.npy") as stream:
            version = np.lib.format.read_magic(stream)
            reads = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reads[version != (1, 0)](stream)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
                raise ValueError(f"arr_0: expected (n, H, W, 3) uint8, got {shape} {dtype}")
            for start in range(0, shape[0], batch):
                rows = (min(batch, shape[0] - start), *shape[1:])
                yield np.frombuffer(stream.read(math.prod(rows)), np.uint8).reshape(rows)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: no npz of images, or damaged: {message(error)}") from error


def grid_size(count: int, columns: int, height: int, width: int, *, gap: int = 2) -> tuple[int, int]:
    """Height and width of the :func:`grid` of so many images."""
    rows = -(-count // columns)
    return rows * (height + gap) + gap, columns * (width + gap) + gap


def grid(images: Tensor, columns: int, *, gap: int = 2, enlarge: int = 1) -> Tensor:
    """(B, 3, H, W) in rows of `columns` → one (3, H', W') picture on white, every pixel `enlarge` times as wide."""
    images = images.repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    B, _, H, W = images.shape
    canvas = images.new_ones(3, *grid_size(B, columns, H, W, gap=gap))
    for i, image in enumerate(images):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        canvas[:, top : top + H, left : left + W] = image
    return canvas
