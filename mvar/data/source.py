"""The interface of data sources, and a source of tensors in memory."""

import hashlib
import signal
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mvar.data.order import in_order, shuffled


class Batch(NamedTuple):
    """A batch of one rank, with either `images` or `tokens`. In pinned memory if CUDA is available."""

    labels: Tensor
    """(B,) int64"""
    images: Tensor | None = None
    """(B, 3, R, R) float32 in [−1, 1]"""
    tokens: Tensor | None = None
    """(B, L) int64"""


class Source(Protocol):
    """A set of labeled training or validation items."""

    @property
    def num_classes(self) -> int: ...

    @property
    def unreadable(self) -> Collection[str]:
        """Names of the items that this process could not read."""

    @property
    def skipped(self) -> Collection[str]:
        """Names of entries that are not items."""

    def __len__(self) -> int:
        """Number of items per epoch."""

    def digest(self) -> str:
        """SHA-256 that identifies the items; a run is resumed only with the same digest."""

    def batches(
        self, *, batch: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1, start: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """Training batches of an epoch, in random order, from batch `start` on.

        The batches depend on (seed, epoch) alone: batch k of all ranks, concatenated, equals batch k of a single rank
        with batch·world_size rows, and neither `workers` nor `start` changes the content of a batch. There are
        `num_batches(len(self), batch, world_size) − start` batches, all of them full.

        Args:
            batch: rows per rank.
            start: index of the first batch, to resume an epoch.
            workers: worker processes; 0 reads in the calling process.

        Raises:
            ValueError: an argument is out of range.
        """

    def once(self, *, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[Batch]:
        """Validation batches: every item once, in order, without augmentation.

        All ranks have the same number of batches; the last batch of a rank can be shorter or empty.
        """


def skipped_summary(source: Source) -> str:
    """Suffix for a log line with the number of skipped entries and an example; empty if there are none."""
    return f", {len(source.skipped)} skipped such as {min(source.skipped)}" if source.skipped else ""


def load(dataset: Dataset[Any], batches: Iterable[Any], workers: int) -> Iterator[Any]:
    """`dataset.__getitems__(batch)` for each batch, in order, prefetched by worker processes."""
    if workers < 0:
        raise ValueError(f"workers: expected at least 0, got {workers}")
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws an unused base seed; from the global generator it would change the state of the training.
        generator=torch.Generator(),
    )
    with torch.device("cpu"):  # the generator's device, independent of torch's default device
        return iter(loader)


def _identity(batch: Any) -> Any:
    return batch


def _ignore_signals(_: int) -> None:
    """Ignore signals that the whole process group receives (Ctrl-C, a cluster's scheduler) in worker processes.

    The main process still needs the workers to save its state. It stops them at the end; if it is killed, they end
    within seconds.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class TensorSource:
    """A source of images or tokens in memory, see :func:`tensor_source`."""

    unreadable: Collection[str] = ()
    skipped: Collection[str] = ()

    def __init__(self, data: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
        self._data, self._labels = data, labels
        self.num_classes = int(labels.max()) + 1 if num_classes is None else num_classes

    def __len__(self) -> int:
        return len(self._labels)

    def digest(self) -> str:
        """SHA-256 of the labels; tokens are excluded, since they can differ between devices by rounding."""
        return hashlib.sha256(self._labels.numpy().tobytes()).hexdigest()

    def batches(
        self, *, batch: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1, start: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        order = shuffled(len(self), batch=batch, seed=seed, epoch=epoch, rank=rank, world_size=world_size, start=start)
        return (self._batch(torch.from_numpy(items)) for items in order)

    def once(self, *, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[Batch]:
        order = in_order(len(self), batch=batch, rank=rank, world_size=world_size)
        return (self._batch(torch.from_numpy(items)) for items in order)

    def _batch(self, items: Tensor) -> Batch:
        rows = self._data[items]
        is_images = rows.is_floating_point()
        return Batch(self._labels[items], rows if is_images else None, None if is_images else rows)


def tensor_source(data: Tensor, labels: Tensor, num_classes: int | None = None) -> TensorSource:
    """Create a source of images or tokens in memory, without augmentation and worker processes.

    Args:
        data: images (n, 3, R, R) float32 in [−1, 1], or tokens (n, L) int64.
        labels: (n,) int64 class indices.
        num_classes: number of classes, None for max(labels) + 1.

    Raises:
        ValueError: wrong shapes or dtypes.
    """
    shapes = {(torch.float32, 4): "images (n, 3, R, R)", (torch.int64, 2): "tokens (n, L)"}
    if (data.dtype, data.dim()) not in shapes:
        expected = " or ".join(f"{dtype} {shape}" for (dtype, _), shape in shapes.items())
        raise ValueError(f"data: expected {expected}, got {data.dtype} {tuple(data.shape)}")
    if labels.dtype != torch.int64 or labels.shape != data.shape[:1] or not len(labels):
        raise ValueError(f"labels: expected int64 ({len(data)},), got {labels.dtype} {tuple(labels.shape)}")
    return TensorSource(data, labels, num_classes)
