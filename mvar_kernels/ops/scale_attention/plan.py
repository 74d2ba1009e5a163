"""The tile plan of a scale schedule: which rows a program takes, and which columns it must look at.

Rows are queries and columns keys; or, for the gradients of keys and values, the other way round. Either
way the rows of one scale share one span of columns, and a tile is a run of at most `block_rows` rows:

- a scale of at least `block_rows` rows is cut into tiles of its own, from its first row on, so that all their
  rows share one span and only a last, partial block of columns needs a mask;
- smaller neighbouring scales are packed into one tile, whose span is the union of theirs. A tile of 64 rows takes
  the first five scales of 256×256, 55 tokens, which one by one would cost five tiles.

The same rule serves the causal pattern: cutting a run of rows at every `block_rows`, whatever the scale, would let a
few rows of the next scale drag its whole span into the tile (85 blocks of 64×64 instead of 79 at 256×256).
"""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from mvar_kernels.dispatch import check_not_capturing

Span = tuple[int, int, int]  # rows that share columns [lo, hi): rows, lo, hi


@dataclass(frozen=True)
class Plan:
    """A plan on a device.

    tiles: (T, 6) int32, longest first: first row, rows, lo, full_lo, full_hi, hi. Blocks of columns start at lo, those
        in [full_lo, full_hi) are whole and seen by all rows; the blocks of [lo, full_lo) and of [full_hi, hi) need a
        mask.
    spans: (2, Lq) int32, the keys [lo, hi) that each query sees.
    """

    tiles: Tensor
    spans: Tensor


def query_spans(scales: tuple[int, ...], queries: int, causal: bool) -> list[Span]:
    """The keys that the queries see; queries are the last of the sequence, or see the only scale, however many."""
    if len(scales) == 1:
        return [(queries, 0, scales[0])]
    first = sum(scales) - queries
    starts = accumulate(scales[:-1], initial=0)
    return [(n, 0 if causal else start, start + n) for start, n in zip(starts, scales, strict=True) if start >= first]


def key_spans(scales: tuple[int, ...], queries: int, causal: bool) -> list[Span]:
    """The queries that see the keys, counted from the first query; keys that none sees have an empty span."""
    if len(scales) == 1:
        return [(scales[0], 0, queries)]
    first = sum(scales) - queries
    starts = accumulate(scales[:-1], initial=-first)
    return [
        (n, max(start, 0), queries if causal else max(start + n, 0)) for start, n in zip(starts, scales, strict=True)
    ]


def tiles(
    spans: list[Span], block_rows: int, block_columns: int, lengths: range | None = None, *, cut: bool = True
) -> list[tuple[int, ...]]:
    """The plan's tiles for rows of `spans`, or for those of the scales whose length is in `lengths`.

    cut: False for one tile a scale, however many rows it has.
    """
    groups: list[tuple[int, list[Span]]] = []
    row, packed = 0, block_rows
    for span in spans:
        if lengths is None or span[0] in lengths:
            if packed + span[0] <= block_rows:
                groups[-1][1].append(span)
            else:
                groups.append((row, [span]))
                packed = 0
            packed += span[0]
        else:
            packed = block_rows
        row += span[0]
    found = []
    for first, group in groups:
        rows = sum(n for n, _, _ in group)
        step = block_rows if cut else rows
        columns = _columns(group, block_columns)
        found += [(first + i, min(step, rows - i), *columns) for i in range(0, rows, step)]
    return sorted(found, key=lambda tile: tile[2] - tile[5])


def _columns(group: list[Span], block: int) -> tuple[int, int, int, int]:
    """(lo, full_lo, full_hi, hi) of a tile's rows."""
    seen = [(lo, hi) for _, lo, hi in group if lo < hi]
    if not seen:
        return 0, 0, 0, 0
    lo, hi = min(lo for lo, _ in seen), max(hi for _, hi in seen)
    if len(seen) < len(group):
        return lo, lo, lo, hi
    full_lo = lo + -(-(max(lo for lo, _ in seen) - lo) // block) * block
    full_hi = lo + (min(hi for _, hi in seen) - lo) // block * block
    return (lo, full_lo, full_hi, hi) if full_lo < full_hi else (lo, lo, lo, hi)


@cache  # for good: a captured CUDA graph reads the plan where it lay at capture
def plan(
    scales: tuple[int, ...],
    queries: int,
    causal: bool,
    rows_are_keys: bool,
    block_rows: int,
    block_columns: int,
    device: torch.device,
    lengths: range | None = None,
    cut: bool = True,
) -> Plan:
    """The plan of a schedule, copied to the device once. lengths, cut: as in :func:`tiles`."""
    check_not_capturing("scale_attention", device)
    spans = (key_spans if rows_are_keys else query_spans)(scales, queries, causal)
    by_row = [(lo, hi) for n, lo, hi in query_spans(scales, queries, causal) for _ in range(n)]
    return Plan(
        torch.tensor(tiles(spans, block_rows, block_columns, lengths, cut=cut), dtype=torch.int32, device=device),
        torch.tensor(list(zip(*by_row, strict=True)), dtype=torch.int32, device=device),
    )
