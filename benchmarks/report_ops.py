"""The ops' part of the report: each row of their result files against its roof, beside the other sides."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Ops = Mapping[str, Sequence[Row]]
CAPTION = "roofline: FLOP/s against FLOP a byte, each op, case, dtype and pass"


class Point(NamedTuple):
    """One op, case, dtype and pass in the roofline model (Williams et al., 2009), of our fastest backend."""

    op: str
    dtype: str
    direction: str
    intensity: float
    """FLOP a byte that the op must do and move at least"""
    gflops: float
    """reached"""
    roof_gflops: float
    """what the slower of two would reach: a copy of as many bytes, and as many FLOPs at the rate of a large product"""


def point(op: str, row: Row, products: Mapping[str, float]) -> Point | None:
    """None where none of our backends gave the right answer."""
    if not (ours := _ours(row)):
        return None
    gflop = row["flops"] / 1e9
    limits = [row["median_ms"]["copy"], *(1e3 * gflop / products[d] for d in (row["dtype"],) if d in products)]
    return Point(
        op,
        row["dtype"],
        row["pass"],
        row["flops"] / row["moved_bytes"],
        1e3 * gflop / min(ours.values()),
        1e3 * gflop / max(limits),
    )


def points(ops: Ops, products: Mapping[str, float]) -> list[Point]:
    found = (point(op, row, products) for op, rows in ops.items() for row in rows)
    return [p for p in found if p]


def copy_gbps(ops: Ops) -> float:
    """The fastest copy of any row, bytes read and written."""
    return max(row["moved_bytes"] / row["median_ms"]["copy"] for rows in ops.values() for row in rows) / 1e6


def reached(ops: Ops, products: Mapping[str, float]) -> str:
    """What the roofline plot shows, and each op's share of its roofs in numbers."""
    rates = "".join(f", a large {dtype} product {gflops:.0f} GFLOP/s" for dtype, gflops in products.items())
    shares: dict[str, list[float]] = {}
    for p in points(ops, products):
        shares.setdefault(p.op, []).append(p.gflops / p.roof_gflops)
    listed = ", ".join(f"`{op}` {100 * min(found):.0f}–{_percent(max(found))}" for op, found in shares.items())
    return (
        f"FLOP/s reached by mvar's kernels against the FLOPs that an op needs for each byte it must move at least. A "
        f"copy reaches {copy_gbps(ops):.0f} GB/s here at best{rates}; an op's own roof is the copy of as many bytes, "
        f"or the product if that is slower. Reached of it: {listed}. Arithmetic outside products, as in "
        "adaLN and in drawing, is slower than the product's.\n"
    )


def table(ops: Ops, products: Mapping[str, float]) -> str:
    lines = [
        "Milliseconds; in brackets how many times mvar's. The roof is the time of the slower of two: a copy of as many "
        "bytes as the op must move at least, and as many FLOPs as it must do at the rate of a large matrix product.\n",
        "| op, case | dtype, pass | mvar | of the roof | copy | others |",
        "|---|---|---|---|---|---|",
    ]
    for op, rows in ops.items():
        for row in rows:
            ours, found = _ours(row), point(op, row, products)
            others = {side: ms for side, ms in row["median_ms"].items() if side not in ours and side != "copy"}
            cells = (
                f"`{op}` {row['case']}",
                f"{row['dtype']} {row['pass']}",
                ", ".join(f"{ms:.3g}" for ms in ours.values()) or "wrong, not timed",
                _percent(found.gflops / found.roof_gflops) if found else "–",
                f"{row['median_ms']['copy']:.3g}",
                ", ".join(
                    f"{side} {ms:.3g}" + (f" ({ms / min(ours.values()):.1f}×)" if ours else "")
                    for side, ms in others.items()
                )
                or "–",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _ours(row: Row) -> dict[str, float]:
    return {side: ms for side, ms in row["median_ms"].items() if side.startswith("mvar")}
