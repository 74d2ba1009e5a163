"""Pictures on disk: single PNGs, grids, and the npz that the ADM evaluator reads."""

import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
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

    Raises ValueError where `arr_0` is no pictures.
    """
    with zipfile.ZipFile(path) as content, content.open("arr_0.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise ValueError(f"{path}: arr_0: expected (n, H, W, 3) uint8, got {shape} {dtype}")
        for start in range(0, shape[0], batch):
            rows = (min(batch, shape[0] - start), *shape[1:])
            yield np.frombuffer(stream.read(math.prod(rows)), np.uint8).reshape(rows)


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
