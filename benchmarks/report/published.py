"""Images per second at 256×256 that papers report for VAR on a GPU, beside what was measured on this one.

Their models are VAR of the same depth, on other GPUs and in other programs; M-VAR's paper (arXiv 2411.10433) has no
absolute figure.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.common.markdown import table


class Published(NamedTuple):
    """batch, gpu: None where the paper does not say. decoded: with the tokenizer's decoder."""

    depth: int
    images_per_second: float
    batch: int | None
    decoded: bool
    gpu: str | None
    source: str


ARPG, CODE, MARKOV = "ARPG, arXiv 2503.10568", "CoDe, arXiv 2411.17787", "Markov-VAR, arXiv 2511.23334"
PUBLISHED = (
    *(Published(depth, rate, None, True, None, ARPG) for depth, rate in ((16, 114.0), (20, 73.7), (24, 48.9))),
    *(Published(depth, rate, 64, False, "L20", CODE) for depth, rate in ((20, 49.6), (24, 30.9), (30, 17.7))),
    *(Published(depth, 25 / s, 25, True, "H200", MARKOV) for depth, s in ((16, 0.303), (24, 0.711))),
)
METHODS = {True: ("mvar", "VAR"), False: ("mvar without its decoder", "VAR without its decoder")}
"""Of bench_generation, with and without the decoder."""


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each figure, with the measurement at the paper's batch size; where it names none, the fastest."""
    return table(
        ("VAR as published", "batch, GPU", "decoder", "images/s", "M-VAR here", "VAR here"),
        (
            (
                f"d{entry.depth}, {entry.source}",
                f"{entry.batch or 'batch not named'}, {entry.gpu or 'GPU not named'}",
                "with" if entry.decoded else "without",
                f"{entry.images_per_second:.1f}",
                *(_fastest(rows, entry, method) for method in METHODS[entry.decoded]),
            )
            for entry in PUBLISHED
        ),
    )


def _fastest(rows: Sequence[dict[str, Any]], entry: Published, method: str) -> str:
    wanted = {"depth": entry.depth, "resolution": 256, "dtype": "bfloat16", "side": method}
    found = [row for row in rows if row.items() >= wanted.items() and entry.batch in (None, row["batch"])]
    if not found:
        return "not measured"
    row = max(found, key=lambda row: float(row["images_per_second"]))
    return f"{row['images_per_second']:.1f} (batch {row['batch']})"
