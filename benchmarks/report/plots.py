"""Plots of the result files, for docs/generated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)
from matplotlib.lines import Line2D  # noqa: E402

from benchmarks.analysis import roofline as rooflines  # noqa: E402
from benchmarks.analysis.roofline import Ops  # noqa: E402
from mvar.utils.files import atomic_write  # noqa: E402

MARKS = {"forward": "o", "backward": "^"}
LABEL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": "0.35"}


def ops(results: Ops, path: Path) -> None:
    """Every row of every op: the speed of mvar and the baselines as a share of the copy's, on a logarithmic axis."""
    rows = [(name, row) for name, content in results.items() for row in content]
    figure = plt.figure(figsize=(8, 0.28 * len(rows) + 1.2))
    axes = figure.add_subplot()
    for i, (_, row) in enumerate(rows):
        times = row["median_ms"]
        for name, ms in times.items():
            if name == "copy":
                continue
            mine = name.startswith("mvar")
            label = "mvar" if mine else ("torch.compile" if name == "torch.compile" else "PyTorch, third-party")
            colour = {"mvar": "tab:blue", "torch.compile": "tab:orange"}.get(label, "0.5")
            axes.plot(100 * times["copy"] / ms, i, "o" if mine else "|", color=colour, label=label, markersize=7)
    labels = [f"{name}, {row['case']}, {row['dtype']}, {row['pass']}" for name, row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel("% of the speed of a copy (100: the memory bound)")
    handles, texts = axes.get_legend_handles_labels()
    unique = dict(zip(texts, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)
    _save(figure, path)


def roofline(ops: Ops, matmul_gflops: Mapping[str, float], path: Path) -> None:
    """Every op, dtype and pass by FLOP per byte and FLOP/s, below the rates of a matmul and of the fastest copy.

    A thin line leads from each point to its own limit: a copy of as many bytes may be slower than the fastest.
    """
    points, copy_gbps = rooflines.points(ops, matmul_gflops), rooflines.fastest_copy_gbps(ops)
    figure = plt.figure(figsize=(8, 4.8))
    axes = figure.add_subplot()
    colours = dict(zip(dict.fromkeys(p.op for p in points), plt.colormaps["Dark2"].colors, strict=False))  # type: ignore[attr-defined]
    left, right = 0.6 * min(p.intensity for p in points), 1.7 * max(p.intensity for p in points)
    for dtype, gflops in matmul_gflops.items():
        ridge = max(gflops / copy_gbps, left)
        axes.plot([left, ridge, right], [left * copy_gbps, gflops, gflops], color="0.35", linewidth=1.2, zorder=1)
        axes.annotate(f"{dtype} matmul\n{_rate(gflops)}", (right, gflops), (4, 0), **LABEL, va="center")
    turned: dict[str, Any] = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
    start = 1.15 * left
    axes.annotate(f"copy: {copy_gbps:.0f} GB/s", (start, start * copy_gbps), (-4, 4), **LABEL, **turned)
    for p in points:
        colour = colours[p.op]
        axes.plot([p.intensity] * 2, [p.gflops, p.limit_gflops], color=colour, linewidth=0.8, alpha=0.5, zorder=2)
        axes.plot(p.intensity, p.limit_gflops, "_", color=colour, markersize=7, alpha=0.7, zorder=2)
        face = colour if p.dtype == "float32" else "white"
        axes.plot(p.intensity, p.gflops, MARKS[p.direction], color=colour, markerfacecolor=face, markersize=7, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(top=1.6 * max(matmul_gflops.values(), default=max(p.limit_gflops for p in points)))
    axes.grid(color="0.92")
    axes.get_xaxis().set_major_formatter("{x:g}")
    axes.get_yaxis().set_major_formatter(lambda gflops, _: _rate(gflops))
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("reached")
    marks = [Line2D([], [], marker="o", linestyle="", color=colour, label=op) for op, colour in colours.items()]
    grey: dict[str, Any] = {"linestyle": "", "color": "0.35"}
    marks += [Line2D([], [], marker=mark, label=name, **grey) for name, mark in MARKS.items()]
    marks.append(Line2D([], [], marker="o", markerfacecolor="white", label="16 bits (filled: float32)", **grey))
    marks.append(Line2D([], [], marker="_", label="its own limit", **grey))
    axes.legend(handles=marks, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, ncols=4)
    _save(figure, path)


def _rate(gflops: float) -> str:
    return f"{gflops / 1e3:g} TFLOP/s" if gflops >= 1e3 else f"{gflops:.3g} GFLOP/s"


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
