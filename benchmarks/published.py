"""Images per second at 256×256 that papers report for VAR on a GPU, beside what was measured on this one.

Their models are VAR of the same depth, on other cards and in other programs; M-VAR's paper (arXiv 2411.10433) has no
absolute figure.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Published(NamedTuple):
    """batch, card: None where the paper does not say. decoded: with the tokenizer's decoder."""

    depth: int
    images_per_second: float
    batch: int | None
    decoded: bool
    card: str | None
    source: str


ARPG, CODE, MARKOV = "ARPG, arXiv 2503.10568", "CoDe, arXiv 2411.17787", "Markov-VAR, arXiv 2511.23334"
PUBLISHED = (
    *(Published(depth, rate, None, True, None, ARPG) for depth, rate in ((16, 114.0), (20, 73.7), (24, 48.9))),
    *(Published(depth, rate, 64, False, "L20", CODE) for depth, rate in ((20, 49.6), (24, 30.9), (30, 17.7))),
    *(Published(depth, 25 / s, 25, True, "H200", MARKOV) for depth, s in ((16, 0.303), (24, 0.711))),
)
SIDES = {True: ("mvar", "VAR"), False: ("mvar without its decoder", "VAR without its decoder")}
"""Of the throughput suite, with and without the decoder."""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each figure; the paper's batch where it says one, else the fastest of this GPU's."""
    lines = [
        "| VAR as published | batch, card | decoder | images/s | M-VAR here | VAR here |",
        "|---" * 6 + "|",
    ]
    for entry in PUBLISHED:
        card = f"{entry.batch or 'batch not named'}, {entry.card or 'card not named'}"
        here = [_fastest(rows, entry, side) for side in SIDES[entry.decoded]]
        cells = (f"d{entry.depth}, {entry.source}", card, "with" if entry.decoded else "without")
        lines.append(f"| {' | '.join(cells)} | {entry.images_per_second:.1f} | {' | '.join(here)} |")
    return "\n".join(lines) + "\n"


def _fastest(rows: Sequence[dict[str, Any]], entry: Published, side: str) -> str:
    wanted = {"depth": entry.depth, "resolution": 256, "dtype": "bfloat16", "side": side}
    found = [row for row in rows if row.items() >= wanted.items() and entry.batch in (None, row["batch"])]
    if not found:
        return "not measured"
    row = max(found, key=lambda row: float(row["images_per_second"]))
    return f"{row['images_per_second']:.1f} (batch {row['batch']})"
