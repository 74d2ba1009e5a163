"""Pictures in one folder a class."""

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

from mvar.data.crops import Resized, centre_crop, random_crop, read_picture
from mvar.data.listing import pictures_by_class
from mvar.data.order import Purpose, below, in_order, shuffled, words
from mvar.data.source import Batch, load
from mvar.errors import message
from mvar.files import expanded, is_environmental

MAX_UNREADABLE = 0.01
JUDGED_FROM = 1000
"""Pictures; fewer than that say little about the share of unreadable ones."""
TRIES = 16
"""Pictures read for one place in a batch; with 1 % unreadable, all of them fail once in 10³²."""

log = logging.getLogger("mvar")


class UnreadablePictures(ValueError):
    """More than 1 % of the pictures cannot be read; the message names some."""


class ImageFolder:
    """A source of the pictures `path/<class>/…`, resized and cropped as by VAR's trainer.

    The shorter side is resized to round(mid_resolution·resolution) by Lanczos's filter; an epoch takes a random crop of
    R×R and, with `flip`, mirrors every other one; validation takes the middle. EXIF rotation is ignored, as there.

    A picture that cannot be read is named in the log, and another one, which follows from its place in the folder
    alone, stands in for it. More than 1 % of them stops the run: of those met in the epoch so far, counted as 1000 at
    least, or of the whole folder where it has fewer. An error that says nothing of the picture (too many open files, no
    memory, no permission, a failing disk) is raised as it is.

    What systems and tools leave beside pictures (`._x.png`, `.ipynb_checkpoints`, …), and links back, are `skipped`:
    see :mod:`mvar.data.listing`.

    Args:
        resolution: R, pixels.
        classes: names in the order of their labels, for a validation folder that may lack some; None for the
            subfolders, sorted by name.

    Raises:
        OSError: no such folder.
        ValueError: no pictures, a class without any, or an argument out of range.
        UnreadablePictures: (while reading) more than 1 %.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int,
        *,
        mid_resolution: float = 1.125,
        flip: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        if resolution < 1:
            raise ValueError(f"resolution: expected at least 1, got {resolution}")
        if not 1 <= mid_resolution <= 16:
            raise ValueError(f"mid_resolution: expected from 1 to 16 times the resolution, got {mid_resolution}")
        self.path, self.resolution, self.flip = expanded(path), resolution, flip
        self.side = round(mid_resolution * resolution)
        found, self.skipped = pictures_by_class(self.path)
        self.classes = tuple(found) if classes is None else tuple(classes)
        if unknown := sorted(found.keys() - set(self.classes)):
            raise ValueError(f"{self.path}: {len(unknown)} classes that are not in training, the first is {unknown[0]}")
        if not found:
            raise ValueError(f"{self.path}: expected one folder a class, found none")
        self.counts = tuple(len(found.get(name, ())) for name in self.classes)
        if classes is None and 0 in self.counts:
            raise ValueError(f"{self.path}: no pictures of class {self.classes[self.counts.index(0)]}")
        if not any(self.counts):
            raise ValueError(f"{self.path}: no pictures in any class")
        # One block of bytes: worker processes count references to Python strings, and so copy each page of them.
        self._names = np.array([os.fsencode(name) for c in self.classes for name in found.get(c, ())])
        self._labels = np.repeat(np.arange(len(self.classes)), self.counts)
        self.unreadable: dict[str, str] = {}
        """name → reason, of all pictures that this process has met and could not read"""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, item: int) -> str:
        """The picture's path, relative to the folder."""
        return os.fsdecode(self._names[item])

    def digest(self) -> str:
        """SHA-256 over the pictures' names: another one has been added, renamed or taken away."""
        return hashlib.sha256(b"\0".join(self._names.tolist())).hexdigest()

    def batches(
        self, *, batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        order = shuffled(len(self), batch=batch, seed=seed, epoch=epoch, rank=rank, world=world, start=start)
        return self._batches(Crops(self, seed, (epoch,)), order, workers)

    def once(self, *, batch: int, rank: int = 0, world: int = 1, workers: int = 0) -> Iterator[Batch]:
        return self._batches(Crops(self), in_order(len(self), batch=batch, rank=rank, world=world), workers)

    def _batches(self, reader: "Crops", order: Iterable[Any], workers: int) -> Iterator[Batch]:
        for read in self.read(reader, order, workers):
            yield Batch(torch.from_numpy(self._labels)[read.pictures], read.images[:, 0])

    def read(self, reader: "Crops", order: Iterable[Any], workers: int) -> Iterator["Read"]:
        """The batches of `order`; counts and names what cannot be read."""
        failed: set[str] = set()
        seen = 0
        for read in load(reader, order, workers):
            if read.error is not None:
                raise read.error
            seen += len(read.pictures)
            for name, reason in read.failures:
                failed.add(name)
                if name not in self.unreadable:
                    log.warning("cannot read %s: %s", self.path / name, reason)
                self.unreadable[name] = reason
            judged = max(seen, min(len(self), JUDGED_FROM))
            if len(failed) > MAX_UNREADABLE * judged or -1 in read.pictures:
                raise UnreadablePictures(self._complaint(failed, seen))
            yield read

    def _complaint(self, failed: set[str], seen: int) -> str:
        some = "; ".join(f"{name}: {self.unreadable[name]}" for name in sorted(failed)[:3])
        return (
            f"{self.path}: {len(failed)} of the first {seen} pictures cannot be read, and more than "
            f"{MAX_UNREADABLE:.0%} stop the run: {some}"
        )


class Read(NamedTuple):
    """A batch of pictures, E crops of each."""

    pictures: Tensor
    """(B,) int64: items read, which are those asked for or their stand-ins; −1 where all those failed too"""
    images: Tensor
    """(B, E, 3, R, R) float32 in [−1, 1]"""
    failures: list[tuple[str, str]]
    """name and reason of each picture that could not be read"""
    error: Exception | None = None
    """what ended the reading, and is to be raised: from a worker process it would come in another one's text"""


class Crops(Dataset[Read]):
    """Reads batches of a folder, in worker processes: of each picture the crops of these epochs, or the middle."""

    def __init__(self, folder: ImageFolder, seed: int = 0, epochs: tuple[int, ...] | None = None) -> None:
        self.folder, self.seed, self.epochs = folder, seed, epochs

    def __getitems__(self, items: Sequence[int]) -> Read:
        crops = 1 if self.epochs is None else len(self.epochs)
        images = torch.zeros(
            *(len(items), crops, 3, self.folder.resolution, self.folder.resolution), dtype=torch.float32, device="cpu"
        )
        pictures = torch.full((len(items),), -1, dtype=torch.int64, device="cpu")
        failures: list[tuple[str, str]] = []
        for row, item in enumerate(items):
            for candidate in candidates(int(item), len(self.folder)):
                try:
                    picture = read_picture(self.folder.path / self.folder.name(candidate), self.folder.side)
                except Exception as error:  # what a corrupted byte raises inside Pillow is any of a dozen types
                    if is_environmental(error):
                        return Read(pictures, images, failures, error)
                    failures.append((self.folder.name(candidate), message(error)))
                else:
                    images[row], pictures[row] = self._crops(picture, candidate), candidate
                    break
        return Read(pictures, images, failures)

    def _crops(self, picture: Resized, item: int) -> Tensor:
        if self.epochs is None:
            return centre_crop(picture, self.folder.resolution)[None]
        draw: dict[str, Any] = {"flip": self.folder.flip, "seed": self.seed, "item": item}
        return torch.stack([random_crop(picture, self.folder.resolution, epoch=e, **draw) for e in self.epochs])


def candidates(item: int, items: int) -> Iterator[int]:
    """The item, and its stand-ins: random ones, so that a folder of which one part is lost costs no long searches."""
    yield item
    for word in words(TRIES - 1, Purpose.REPLACEMENT, item=item).tolist():
        yield below(word, items)
