"""The interface between data and training, and tensors behind it."""

import hashlib
import signal
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mvar.data.order import in_order, shuffled


class Batch(NamedTuple):
    """Rows of one rank; exactly one of `images` and `tokens` is given. Pinned where there is a CUDA device."""

    labels: Tensor
    """(B,) int64"""
    images: Tensor | None = None
    """(B, 3, R, R) float32 in [−1, 1]"""
    tokens: Tensor | None = None
    """(B, L) int64"""


class Source(Protocol):
    """A set of training or validation items with classes."""

    @property
    def num_classes(self) -> int: ...

    @property
    def unreadable(self) -> Collection[str]:
        """Names of the items that this process has met and could not read."""

    @property
    def skipped(self) -> Collection[str]:
        """Names of what lies among the items and is none."""

    def __len__(self) -> int:
        """Items: those of one epoch."""

    def digest(self) -> str:
        """Which items these are, as SHA-256: a run goes on only with the same."""

    def batches(
        self, *, batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """The rest of an epoch in random order, `num_batches(len(self), batch, world) − start` full batches.

        A function of (seed, epoch) and of the item alone: the batches k of all ranks, one after another, are batch k
        of a single rank with batch·world rows; and neither `workers` nor `start` changes what a batch holds.

        Args:
            batch: rows of this rank.
            start: batches of the epoch that have been used already.
            workers: processes that read ahead; 0 reads in this one.

        Raises ValueError for an argument out of range; what else, see the source.
        """

    def once(self, *, batch: int, rank: int = 0, world: int = 1, workers: int = 0) -> Iterator[Batch]:
        """Every item once, in order and without augmentation, for validation.

        Every rank has the same number of batches; those of the last round can be short, or without rows.
        """


def skipped_in_words(source: Source) -> str:
    """For the end of a summary: how many entries are no items, and one of them; empty where there are none."""
    return f", {len(source.skipped)} skipped such as {min(source.skipped)}" if source.skipped else ""


def load(reader: Dataset[Any], batches: Iterable[Any], workers: int) -> Iterator[Any]:
    """What `reader.__getitems__` makes of each batch of items, in their order, read ahead by worker processes."""
    if workers < 0:
        raise ValueError(f"workers: expected at least 0, got {workers}")
    loader = DataLoader(
        reader,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_left_to_the_run,
        pin_memory=torch.cuda.is_available(),
        # Its own, for a seed that nothing here uses: torch's global one is the training's, and part of its checkpoints.
        generator=torch.Generator(),
    )
    with torch.device("cpu"):  # where its generator is, whatever torch's default
        return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def _left_to_the_run(_: int) -> None:
    """What ends a whole process group, as Ctrl-C or a cluster's queue, leaves the readers to a run that saves itself.

    They end with it: by its word, or within seconds of its death.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class TensorSource:
    """Images or tokens that are in memory."""

    unreadable: Collection[str] = ()
    skipped: Collection[str] = ()

    def __init__(self, data: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
        self._data, self._labels = data, labels
        self.num_classes = int(labels.max()) + 1 if num_classes is None else num_classes

    def __len__(self) -> int:
        return len(self._labels)

    def digest(self) -> str:
        """Of the labels; not of the data, which another device encodes with other roundings."""
        return hashlib.sha256(self._labels.numpy().tobytes()).hexdigest()

    def batches(
        self, *, batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        order = shuffled(len(self), batch=batch, seed=seed, epoch=epoch, rank=rank, world=world, start=start)
        return (self._batch(torch.from_numpy(items)) for items in order)

    def once(self, *, batch: int, rank: int = 0, world: int = 1, workers: int = 0) -> Iterator[Batch]:
        order = in_order(len(self), batch=batch, rank=rank, world=world)
        return (self._batch(torch.from_numpy(items)) for items in order)

    def _batch(self, items: Tensor) -> Batch:
        rows = self._data[items]
        is_images = rows.is_floating_point()
        return Batch(self._labels[items], rows if is_images else None, None if is_images else rows)


def tensor_source(data: Tensor, labels: Tensor, num_classes: int | None = None) -> TensorSource:
    """A source of what is in memory: no augmentation, no worker processes.

    Args:
        data: images (n, 3, R, R) float32 in [−1, 1], or tokens (n, L) int64.
        labels: (n,) int64 classes.
        num_classes: None for the largest label and one.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    shapes = {(torch.float32, 4): "images (n, 3, R, R)", (torch.int64, 2): "tokens (n, L)"}
    if (data.dtype, data.dim()) not in shapes:
        expected = " or ".join(f"{dtype} {what}" for (dtype, _), what in shapes.items())
        raise ValueError(f"data: expected {expected}, got {data.dtype} {tuple(data.shape)}")
    if labels.dtype != torch.int64 or labels.shape != data.shape[:1] or not len(labels):
        raise ValueError(f"labels: expected int64 ({len(data)},), got {labels.dtype} {tuple(labels.shape)}")
    return TensorSource(data, labels, num_classes)
