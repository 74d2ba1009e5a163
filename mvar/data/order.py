"""Which items make a batch, and every random choice about an item: pure functions of (seed, epoch, item).

Random words are Philox-4x64's (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by the seed
and by what they are for. NumPy keeps the stream of its bit generators from version to version (NEP 19), not that of
`Generator.permutation`; so only raw words are used.
"""

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MAX_WORD = 2**63 - 1


class Purpose(IntEnum):
    """What a random word is for: words of different purposes are independent."""

    ORDER = 0
    CROP = 1
    REPLACEMENT = 2
    CROP_OF_STORE = 3


def words(count: int, purpose: Purpose, *, seed: int = 0, epoch: int = 0, item: int = 0) -> NDArray[np.uint64]:
    """`count` independent random 64-bit words."""
    return np.random.Philox(counter=[0, 0, epoch, item], key=[seed, purpose]).random_raw(count)


def below(word: int, limit: int) -> int:
    """A random word as a whole number in [0, limit)."""
    return word * limit >> 64


def num_batches(items: int, batch: int, world: int = 1) -> int:
    """Batches of an epoch: as many as hold every item, of `batch` rows in each of `world` ranks."""
    return -(-items // (batch * world))


def shuffled(
    items: int, *, batch: int, seed: int, epoch: int, rank: int, world: int, start: int
) -> Iterator[NDArray[np.int64]]:
    """The items of this rank's batches start, start+1, … of an epoch, (batch,) each.

    Batch k of all ranks together is rows k·batch·world … of the epoch's permutation; rank r has the r-th part of it.
    The last batch is filled up from the permutation's beginning, as VAR's sampler does.
    """
    check_batches(items, batch=batch, rank=rank, world=world)
    for name, value in (("seed", seed), ("epoch", epoch), ("start", start)):
        check_word(name, value)
    order = words(items, Purpose.ORDER, seed=seed, epoch=epoch).argsort(kind="stable")
    for k in range(start, num_batches(items, batch, world)):
        first = (k * world + rank) * batch
        yield order[np.arange(first, first + batch) % items]


def in_order(items: int, *, batch: int, rank: int, world: int) -> Iterator[NDArray[np.int64]]:
    """Every item once: (≤ batch,) each; every rank has as many batches, of which the last can be short or empty."""
    check_batches(items, batch=batch, rank=rank, world=world)
    for first in range(0, items, batch * world):
        yield np.array_split(np.arange(first, min(first + batch * world, items)), world)[rank]


def check_batches(items: int, *, batch: int, rank: int, world: int) -> None:
    """ValueError unless there are items, and rows and ranks to share them."""
    if items < 1:
        raise ValueError("there are no items to make batches of")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected from 0 to below world={world}, got {rank}")


def check_word(name: str, value: int) -> None:
    """ValueError unless the value can key or count random words."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_WORD:
        raise ValueError(f"{name}: expected a whole number from 0 to 2⁶³−1, got {value!r}")
