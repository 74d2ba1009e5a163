"""A source of images in one folder per class."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mvar.data.crops import Resized, center_crop, random_crop, read_image
from mvar.data.listing import images_below, images_by_class
from mvar.data.order import Purpose, below, in_order, shuffled, words
from mvar.data.source import Batch, load
from mvar.utils.errors import message
from mvar.utils.files import expanded, is_environmental

MAX_UNREADABLE = 0.01
MIN_DENOMINATOR = 1000
"""The fraction of unreadable images is relative to at least this number, since a smaller sample is unreliable."""
MAX_TRIES = 16
"""Images tried per row of a batch; if 1 % are unreadable, all of them fail with probability 10⁻³²."""

log = logging.getLogger("mvar")


class UnreadableImages(ValueError):
    """More than 1 % of the images cannot be read. The message names up to three of them."""


class ImageFolder:
    """A source of the images `path/<class>/…` with the transforms of VAR's trainer.

    The shorter side is resized to round(mid_resolution·resolution) with a Lanczos filter. Training takes a random crop
    of R×R and, with `flip`, flips it with probability 1/2; validation takes the center crop. EXIF rotation is ignored,
    as in VAR.

    An image that cannot be read is logged and replaced by another one, which depends on its index alone. More than 1 %
    unreadable images end the run: the fraction is relative to the images read so far in the epoch, or to the smaller
    of 1000 and the number of images if that is more. Errors that are not caused by the image (too many open files, out
    of memory, permissions, a failing disk) are raised.

    Hidden and system files (`._x.png`, `.ipynb_checkpoints`, …) and cyclic links are `skipped`, see
    :mod:`mvar.data.listing`.

    Args:
        resolution: R, in pixels.
        mid_resolution: size of the shorter side before the crop, relative to `resolution`.
        flip: random horizontal flips.
        classes: class names by label, for a validation folder in which some may be missing; None for the subfolders,
            sorted by name.
        labeled: False for all images of `path` and its subfolders, as one class "".

    Attributes:
        unreadable: the error of each image that this process could not read, by name.

    Raises:
        OSError: the folder does not exist.
        ValueError: there are no images, a class has none, or an argument is out of range.
        UnreadableImages: (while reading) more than 1 % of the images cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int,
        *,
        mid_resolution: float = 1.125,
        flip: bool = False,
        classes: Sequence[str] | None = None,
        labeled: bool = True,
    ) -> None:
        if resolution < 1:
            raise ValueError(f"resolution: expected at least 1, got {resolution}")
        if not 1 <= mid_resolution <= 16:
            raise ValueError(f"mid_resolution: expected from 1 to 16 times the resolution, got {mid_resolution}")
        self.path, self.resolution, self.flip = expanded(path), resolution, flip
        self.side = round(mid_resolution * resolution)
        found: dict[str, list[str]] = {}
        if labeled:
            found, self.skipped = images_by_class(self.path)
        else:
            found[""], self.skipped = images_below(self.path)
        self.classes = tuple(found) if classes is None else tuple(classes)
        if unknown := sorted(found.keys() - set(self.classes)):
            raise ValueError(f"{self.path}: {len(unknown)} classes that are not in training, the first is {unknown[0]}")
        if not found:
            raise ValueError(f"{self.path}: expected one folder per class, got none")
        self.counts = tuple(len(found.get(name, ())) for name in self.classes)
        if labeled and classes is None and 0 in self.counts:
            raise ValueError(f"{self.path}: no images of class {self.classes[self.counts.index(0)]}")
        if not any(self.counts):
            raise ValueError(f"{self.path}: no images{' in any class' if labeled else ''}")
        # A NumPy array: reference counts of Python strings would cause copy-on-write of all pages in worker processes.
        self._names = np.array([os.fsencode(name) for c in self.classes for name in found.get(c, ())])
        self._labels = np.repeat(np.arange(len(self.classes)), self.counts)
        self.unreadable: dict[str, str] = {}

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, item: int) -> str:
        """The path of an image, relative to the folder."""
        return os.fsdecode(self._names[item])

    def digest(self) -> str:
        """SHA-256 of the names of all images, which changes if an image is added, renamed or removed."""
        return hashlib.sha256(b"\0".join(self._names.tolist())).hexdigest()

    def batches(
        self, *, batch: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1, start: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        order = shuffled(len(self), batch=batch, seed=seed, epoch=epoch, rank=rank, world_size=world_size, start=start)
        return self._batches(CropDataset(self, seed, (epoch,)), order, workers)

    def once(self, *, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[Batch]:
        order = in_order(len(self), batch=batch, rank=rank, world_size=world_size)
        return self._batches(CropDataset(self), order, workers)

    def _batches(self, dataset: "CropDataset", order: Iterable[Any], workers: int) -> Iterator[Batch]:
        for crop_batch in self.read(dataset, order, workers):
            yield Batch(torch.from_numpy(self._labels)[crop_batch.indices], crop_batch.images[:, 0])

    def read(self, dataset: "CropDataset", order: Iterable[Any], workers: int) -> Iterator["CropBatch"]:
        """Read the batches of `order`; log unreadable images and raise UnreadableImages if there are too many."""
        failed: set[str] = set()
        seen = 0
        for crop_batch in load(dataset, order, workers):
            if crop_batch.error is not None:
                raise crop_batch.error
            seen += len(crop_batch.indices) + (0 if dataset.replace else len(crop_batch.failures))
            for name, reason in crop_batch.failures:
                failed.add(name)
                if name not in self.unreadable:
                    log.warning("cannot read %s: %s", self.path / name, reason)
                self.unreadable[name] = reason
            denominator = max(seen, min(len(self), MIN_DENOMINATOR))
            if len(failed) > MAX_UNREADABLE * denominator or -1 in crop_batch.indices:
                raise UnreadableImages(self._unreadable_message(failed, seen))
            yield crop_batch

    def _unreadable_message(self, failed: set[str], seen: int) -> str:
        examples = "; ".join(f"{name}: {self.unreadable[name]}" for name in sorted(failed)[:3])
        return (
            f"{self.path}: {len(failed)} of the first {seen} images cannot be read, at most {MAX_UNREADABLE:.0%} are "
            f"allowed: {examples}"
        )


class CropBatch(NamedTuple):
    """A batch of images with E crops each."""

    indices: Tensor
    """(B,) int64: the images read, after replacement of unreadable ones; −1 if all replacements failed. Without
    replacement: only the images read"""
    images: Tensor
    """(B, E, 3, R, R) float32 in [−1, 1]"""
    failures: list[tuple[str, str]]
    """name and error message of each image that could not be read"""
    error: Exception | None = None
    """an error to be raised in the main process; raised in a worker process, DataLoader would change its message"""


class CropDataset(Dataset[CropBatch]):
    """Reads batches of a folder in worker processes: per image the random crops of `epochs`, or the center crop.

    Without `replace`, unreadable images are left out of a batch.
    """

    def __init__(
        self, folder: ImageFolder, seed: int = 0, epochs: tuple[int, ...] | None = None, *, replace: bool = True
    ) -> None:
        self.folder, self.seed, self.epochs, self.replace = folder, seed, epochs, replace

    def __getitems__(self, items: Sequence[int]) -> CropBatch:
        crops = 1 if self.epochs is None else len(self.epochs)
        images = torch.zeros(
            *(len(items), crops, 3, self.folder.resolution, self.folder.resolution), dtype=torch.float32, device="cpu"
        )
        indices = torch.full((len(items),), -1, dtype=torch.int64, device="cpu")
        failures: list[tuple[str, str]] = []
        for row, item in enumerate(items):
            for candidate in candidates(int(item), len(self.folder)) if self.replace else (int(item),):
                try:
                    image = read_image(self.folder.path / self.folder.name(candidate), self.folder.side)
                except Exception as error:  # Pillow raises a dozen types for corrupted files
                    if is_environmental(error):
                        return CropBatch(indices, images, failures, error)
                    failures.append((self.folder.name(candidate), message(error)))
                else:
                    indices[row], images[row] = candidate, self._crops(image, candidate)
                    break
        if not self.replace:
            images, indices = images[indices >= 0], indices[indices >= 0]
        return CropBatch(indices, images, failures)

    def _crops(self, image: Resized, item: int) -> Tensor:
        if self.epochs is None:
            return center_crop(image, self.folder.resolution)[None]
        options: dict[str, Any] = {"flip": self.folder.flip, "seed": self.seed, "item": item}
        return torch.stack([random_crop(image, self.folder.resolution, epoch=e, **options) for e in self.epochs])


def candidates(item: int, items: int) -> Iterator[int]:
    """The item, then its replacements. They are random, so that a lost part of the folder needs no long search."""
    yield item
    for word in words(MAX_TRIES - 1, Purpose.REPLACEMENT, item=item).tolist():
        yield below(word, items)
