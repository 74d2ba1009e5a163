"""Plots of the result files, for the README."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)

from mvar.files import replacing  # noqa: E402

BASELINES = ("public algorithm", "public algorithm, torch's default products")
GREY = "0.75"


def generation(rows: dict[str, Any], path: Path) -> None:
    """One image: a bar for each side and dtype, ours by part, and the sum of floors as a line across it."""
    runs = [run for run in rows["runs"] if run["breakdown"]]
    names: list[str] = []
    figure = plt.figure(figsize=(8, 0.55 * sum(len(run["median_ms"]) for run in runs) + 1.3))
    axes = figure.add_subplot()
    parts = list(runs[0]["breakdown"]["parts_ms"])
    colours = dict(zip(parts, plt.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    for run in runs:
        for side in reversed(BASELINES):
            if side in run["median_ms"]:
                axes.barh(len(names), run["median_ms"][side] / 1e3, color=GREY)
                names.append(f"{side}, {run['dtype']}")
        found = run["breakdown"]
        share = run["median_ms"]["mvar"] / found["total_ms"]  # the timed parts cost a little themselves
        left = 0.0
        for part, ms in found["parts_ms"].items():
            width = ms * share / 1e3
            axes.barh(len(names), width, left=left, color=colours[part], label=part)
            left += width
        axes.plot([sum(found["floor_ms"].values()) / 1e3] * 2, [len(names) - 0.4, len(names) + 0.4], color="black")
        names.append(f"mvar, {run['dtype']}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds an image; black: sum of floors")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, ncols=2)
    _save(figure, path)


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
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)
    _save(figure, path)


def speed(rows: dict[str, Any], path: Path) -> None:
    """Images a second against the batch, each side and dtype."""
    figure = plt.figure(figsize=(8, 3.6))
    axes = figure.add_subplot()
    for dtype, style in (("float32", "--"), ("bfloat16", "-")):
        runs = [run for run in rows["runs"] if run["dtype"] == dtype]
        for side, colour in (("mvar", "tab:blue"), (BASELINES[0], "0.5")):
            points = [(run["batch"], 1e3 * run["batch"] / run["median_ms"][side]) for run in runs]
            axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=f"{side}, {dtype}")
    axes.set_xlabel("batch")
    axes.set_ylabel("images a second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def growth(rows: dict[str, Any], path: Path) -> None:
    """FLOPs and what is remembered, counted, and time, measured, against the number of tokens."""
    count = 3 if rows["measured"] else 2
    figure = plt.figure(figsize=(3.7 * count, 3.8))
    panels = figure.subplots(1, count)
    colours = {"mvar": "tab:blue", "VAR": "tab:orange", "public algorithm": "0.5"}
    for axes, name, unit in zip(panels, ("flops", "state_bytes"), (1e12, 1e6), strict=False):
        for side, colour in colours.items():
            points = [(row["tokens"], row[name] / unit) for row in rows["counted"] if row["side"] == side]
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=side)
    for side, colour in colours.items() if rows["measured"] else ():
        points = [(row["tokens"], row["median_ms"][side] / 1e3) for row in rows["measured"]]
        panels[2].plot(*zip(*points, strict=True), marker="o", color=colour, label=side)
    depths = {row["depth"] for row in rows["measured"]}
    small = " and ".join(f"d{depth}" for depth in sorted(depths))
    titles = ("TFLOP, d16, counted", "MB remembered, d16, counted", f"seconds, {small}, float32, measured")
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_xticks([row["tokens"] for row in rows["counted"][::3]])
        axes.get_xaxis().set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.grid(color="0.9")
    panels[0].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
