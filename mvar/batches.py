"""The batches of a long run: the device draws one while the host has the one before."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from mvar.generate import PendingResult
from mvar.pictures import to_bytes
from mvar.transfer import to_host


def drawn_batches(begin: Callable[[int], PendingResult], starts: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """The batches that begin at these images, as (first image, (B, H, W, 3) uint8 on the host).

    Raises FloatingPointError where a batch is not finite.
    """
    before: Callable[[], tuple[int, Tensor]] | None = None
    for start in starts:
        launched = begin(start)
        arriving = to_host(to_bytes(launched.generated.images), launched.finite)
        if before is not None:
            yield before()
        before = partial(_arrived, start, launched, arriving)
    if before is not None:
        yield before()


def _arrived(start: int, launched: PendingResult, arriving: Callable[[], tuple[Tensor, ...]]) -> tuple[int, Tensor]:
    pixels, finite = arriving()
    replace(launched, finite=finite).result()
    return start, pixels
