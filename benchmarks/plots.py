"""Plots of the result files, for docs/generated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)
from matplotlib.lines import Line2D  # noqa: E402

from benchmarks import report_ops  # noqa: E402
from benchmarks.growth import OURS, PUBLIC, VAR  # noqa: E402
from benchmarks.report_ops import Ops  # noqa: E402
from mvar.files import replacing  # noqa: E402

Row = dict[str, Any]
COLOURS = {OURS: "tab:blue", VAR: "tab:orange", PUBLIC: "0.5"}
GREY = "0.75"
MARKS = {"forward": "o", "backward": "^"}
ROOF: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": "0.35"}


def by_part(found: Sequence[Row], rows: Sequence[Row], path: Path) -> None:
    """The engine's time by part, the sum of floors (where there are any) as a line across it, and the others' bars."""
    others = [[row for row in rows if row["side"] != OURS and _size(row) == _size(each)] for each in found]
    figure = plt.figure(figsize=(8, 0.4 * (len(found) + sum(map(len, others))) + 1.4))
    axes = figure.add_subplot()
    parts = list(found[0]["parts_ms"])
    colours = dict(zip(parts, plt.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    names: list[str] = []
    for each, beside in zip(found, others, strict=True):
        left = 0.0
        for part, ms in each["parts_ms"].items():
            axes.barh(len(names), ms / 1e3, left=left, color=colours[part], label=part)
            left += ms / 1e3
        if "floor_ms" in each:
            floor = sum(each["floor_ms"].values()) / 1e3
            axes.plot([floor] * 2, [len(names) - 0.4, len(names) + 0.4], color="black", label="sum of floors")
        names.append(f"{OURS}: {size_name(each)}")
        for row in beside:
            axes.barh(len(names), row["p50_ms"] / 1e3, color=GREY)
            names.append(row["side"])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a batch")
    _legend(axes, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _size(row: Row) -> Row:
    return {name: row[name] for name in ("depth", "resolution", "batch", "dtype")}


def size_name(row: Row) -> str:
    return f"d{row['depth']} at {row['resolution']}, batch {row['batch']}, {row['dtype']}"


def ops(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Every row of every op: the speed of each side as a share of the copy's, on a logarithmic axis."""
    rows = [(name, row) for name, content in results.items() for row in content]
    figure = plt.figure(figsize=(8, 0.28 * len(rows) + 1.2))
    axes = figure.add_subplot()
    for i, (_, row) in enumerate(rows):
        times = row["median_ms"]
        for side, ms in times.items():
            if side == "copy":
                continue
            mine = side.startswith("mvar")
            label = "mvar" if mine else ("torch.compile" if side == "torch.compile" else "PyTorch and peers")
            colour = {"mvar": "tab:blue", "torch.compile": "tab:orange"}.get(label, "0.5")
            axes.plot(100 * times["copy"] / ms, i, "o" if mine else "|", color=colour, label=label, markersize=7)
    labels = [f"{name}, {row['case']}, {row['dtype']}, {row['pass']}" for name, row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel("% of the speed of a copy (100: the memory floor)")
    _legend(axes)
    _save(figure, path)


def roofline(ops: Ops, products: Mapping[str, float], path: Path) -> None:
    """Every op, dtype and pass by FLOP a byte and FLOP/s, below the rates of a product and of the fastest copy.

    A thin line leads from each point to its own roof: the copy of as many bytes may be slower than the fastest.
    """
    points, copy_gbps = report_ops.points(ops, products), report_ops.copy_gbps(ops)
    figure = plt.figure(figsize=(8, 4.8))
    axes = figure.add_subplot()
    colours = dict(zip(dict.fromkeys(p.op for p in points), plt.colormaps["Dark2"].colors, strict=False))  # type: ignore[attr-defined]
    left, right = 0.6 * min(p.intensity for p in points), 1.7 * max(p.intensity for p in points)
    for dtype, gflops in products.items():
        ridge = max(gflops / copy_gbps, left)
        axes.plot([left, ridge, right], [left * copy_gbps, gflops, gflops], color="0.35", linewidth=1.2, zorder=1)
        axes.annotate(f"{dtype} product\n{_rate(gflops)}", (right, gflops), (4, 0), **ROOF, va="center")
    turned: dict[str, Any] = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
    start = 1.15 * left
    axes.annotate(f"copy: {copy_gbps:.0f} GB/s", (start, start * copy_gbps), (-4, 4), **ROOF, **turned)
    for p in points:
        colour = colours[p.op]
        axes.plot([p.intensity] * 2, [p.gflops, p.roof_gflops], color=colour, linewidth=0.8, alpha=0.5, zorder=2)
        axes.plot(p.intensity, p.roof_gflops, "_", color=colour, markersize=7, alpha=0.7, zorder=2)
        face = colour if p.dtype == "float32" else "white"
        axes.plot(p.intensity, p.gflops, MARKS[p.direction], color=colour, markerfacecolor=face, markersize=7, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(top=1.6 * max(products.values(), default=max(p.roof_gflops for p in points)))
    axes.grid(color="0.92")
    axes.get_xaxis().set_major_formatter("{x:g}")
    axes.get_yaxis().set_major_formatter(lambda gflops, _: _rate(gflops))
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("reached")
    marks = [Line2D([], [], marker="o", linestyle="", color=colour, label=op) for op, colour in colours.items()]
    grey: dict[str, Any] = {"linestyle": "", "color": "0.35"}
    marks += [Line2D([], [], marker=mark, label=name, **grey) for name, mark in MARKS.items()]
    marks.append(Line2D([], [], marker="o", markerfacecolor="white", label="16 bits (filled: float32)", **grey))
    marks.append(Line2D([], [], marker="_", label="its own roof", **grey))
    axes.legend(handles=marks, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, ncols=4)
    _save(figure, path)


def _rate(gflops: float) -> str:
    return f"{gflops / 1e3:g} TFLOP/s" if gflops >= 1e3 else f"{gflops:.3g} GFLOP/s"


def speed(rows: Sequence[Row], path: Path) -> bool:
    """Images a second against the batch, of the model with most batches; False, and no plot, if it has but one."""
    batches: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        batches.setdefault((row["depth"], row["resolution"]), set()).add(row["batch"])
    model = max(batches, key=lambda model: len(batches[model]), default=None)
    if model is None or len(batches[model]) < 2:
        return False
    figure = plt.figure(figsize=(8, 3.6))
    axes = figure.add_subplot()
    for side, colour in COLOURS.items():
        for dtype, style in (("float32", "--"), ("bfloat16", "-"), ("float16", ":")):
            chosen = dict(zip(("depth", "resolution", "dtype", "side"), (*model, dtype, side), strict=True))
            points = {row["batch"]: row["images_per_second"] for row in rows if row.items() >= chosen.items()}
            if points:
                line = sorted(points.items())
                axes.plot(*zip(*line, strict=True), style, marker="o", color=colour, label=f"{side}, {dtype}")
    axes.set_title(f"d{model[0]} at {model[1]}×{model[1]}", fontsize=10)
    axes.set_xlabel("batch")
    axes.set_ylabel("images a second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)
    return True


def growth(counted: Sequence[Row], measured: Sequence[Row], path: Path) -> None:
    """FLOPs and what is remembered, counted; where they are there, time and peak memory, measured; against tokens."""
    depth = counted[0]["depth"]
    panels = [(counted, "flops", 1e12, f"TFLOP, d{depth}, counted")]
    panels += [(counted, "state_bytes", 1e6, f"MB remembered, d{depth}, counted")]
    if measured:
        where = f"d{depth}, {measured[0]['dtype']}, measured"
        panels += [(measured, "p50_ms", 1e3, f"seconds, {where}"), (measured, "peak_gib", 1, f"peak GiB, {where}")]
    figure = plt.figure(figsize=(8, 3.6 * len(panels) / 2))
    for axes, (rows, name, unit, title) in zip(figure.subplots(len(panels) // 2, 2).flat, panels, strict=True):
        for side, width in ((PUBLIC, 4), (VAR, 1.5), (OURS, 1.5)):  # the widest below: VAR's cache is as large
            points = [(r["tokens"], r[name] / unit) for r in rows if r["side"] == side and r[name] is not None]
            line = [x for x, _ in points], [y for _, y in points]
            axes.plot(*line, marker="o", linewidth=width, markersize=3 + 1.5 * width, color=COLOURS[side], label=side)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        if name == "peak_gib":
            axes.set_ylim(bottom=0)  # less than a decade
        else:
            axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_xticks(sorted({row["tokens"] for row in counted}))
        axes.get_xaxis().set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.grid(color="0.9")
    figure.axes[0].legend(fontsize=8)
    _save(figure, path)


def _legend(axes: Any, **place: Any) -> None:
    """Every label once."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, **place)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
