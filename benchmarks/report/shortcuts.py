"""Tables of bench_shortcuts and bench_memory."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.common.markdown import table

Row = dict[str, Any]
CASE = ("depth", "refiner_depth", "batch", "dtype")


def shortcuts(rows: Sequence[Row], quality: Mapping[str, Mapping[str, Any]]) -> str:
    """Speed of generation with random weights, beside the quality of the packaged models with the same shortcuts.

    Args:
        quality: results by model.
    """
    lines: list[tuple[str, ...]] = []
    for _, group in groupby(rows, key=lambda row: [row[name] for name in CASE]):
        of_case = list(group)
        seconds = {_key(row): statistics.median(row["seconds"]) for row in of_case}
        complete = next(row for row in of_case if _key(row) == (0, 0))
        public = next((second for key, second in seconds.items() if key is None), None)
        for row in sorted(of_case, key=lambda row: _key(row) or (-1, -1)):
            key = _key(row)
            costs = [_costs(found["rows"], key) for found in quality.values()]
            lines.append(
                (
                    f"d{row['depth']}, batch {row['batch']}, {row['dtype']}",
                    row["method"] if key is None else _name(key, row["refiner_depth"]),
                    f"{row['flops'] / 1e12:.2f}",
                    f"{complete['flops'] / row['flops']:.2f}",
                    f"{seconds[key] / row['batch']:.2f} ({row['rounds']})",
                    f"{seconds[0, 0] / seconds[key]:.2f}",
                    "–" if public is None else f"{public / seconds[key]:.2f}",
                    *costs,
                )
            )
    columns = (
        "M-VAR at 256×256",
        "method",
        "TFLOP per image",
        "counted speed-up over mvar",
        "seconds per image (rounds)",
        "over mvar",
        "over the public algorithm",
        *(f"{name}, of {_scales(found)} scales: farther from real images" for name, found in quality.items()),
    )
    return (
        "Random weights; the variants of a configuration take turns, medians of their rounds. The last columns: how "
        "much farther from real images the Fréchet distance of the packaged models' images is than without the "
        "shortcut, on the same number of fine scales, with the middle 95 % of a bootstrap. These models have fewer "
        "scales, so that it is a larger share of theirs.\n\n"
    ) + table(columns, lines)


def quality(result: Mapping[str, Any]) -> str:
    """Speed and quality of one packaged model with each shortcut."""
    ours, refiner = (f"{count / 1e6:.1f} M" for count in result["parameters"])
    lines = [
        (
            _name((row["unguided"], row["refined"]), None),
            f"{row['counted_ratio']:.2f}",
            f"{row['ratio']:.2f}",
            _interval(row, "frechet_to_real", ".2f"),
            _interval(row, "costs", "+.2f"),
        )
        for row in result["rows"]
    ]
    sampling = ", ".join(f"{name} {value:g}" for name, value in result["sampling"].items())
    return (
        f"{result['model']} ({ours} parameters, refiner {refiner}), {result['images']} images with {sampling}, batches "
        f"of 50, {result['seconds_per_image'] * 1e3:.0f} ms per image without shortcuts. Features: "
        f"{result['features']}. In brackets the middle 95 % of a bootstrap over images:\n\n"
    ) + table(("method", "counted speed-up", "measured", "distance to real images", "farther than complete"), lines)


def memory(rows: Sequence[Row]) -> str:
    """Peaks of loading and generation."""
    lines = [
        (
            f"d{row['depth']}, batch {row['batch']}, {row['dtype']}",
            f"{row['way']}, stored in {row['stored']}",
            f"{row['weights_gib']:.2f}",
            *(f"{row[name]:.2f}" for name in ("loading_peak_gib", "held_gib", "generation_peak_gib")),
            f"{row['loading_peak_gib'] / row['weights_gib']:.2f}",
            f"{row['load_s']:.0f}; {row['generation_s']:.1f}",
        )
        for row in rows
    ]
    columns = (
        "M-VAR at 256×256",
        "loaded as",
        "weights, GiB",
        "peak of loading",
        "held afterwards",
        "peak of generation",
        "peak of loading / weights",
        "seconds: loading; generation",
    )
    return (
        "Random weights from a safetensors file, one process each; resident memory above that of the process with all "
        "imports, with the pages of the mapped file and the tokenizer. Weights: those of the model in its dtype, with "
        "known labels without the modulation layers.\n\n"
    ) + table(columns, lines)


def _key(row: Row) -> tuple[int, int] | None:
    return (row["unguided"], row["refined"]) if "unguided" in row else None


def _name(key: tuple[int, int], refiner: int | None) -> str:
    unguided, refined = key
    parts = [f"no guidance on the last {unguided}"] * bool(unguided)
    size = "" if refiner is None else f" d{refiner}"
    parts += [f"refiner{size} on the last {refined}"] * bool(refined)
    return ", ".join(parts) or "mvar"


def _scales(result: Mapping[str, Any]) -> int:
    """Of a packaged model: the refiner generates all of them in one of the rows."""
    return max(row["refined"] for row in result["rows"])


def _costs(rows: Sequence[Row], key: tuple[int, int] | None) -> str:
    found = next((row for row in rows if key not in (None, (0, 0)) and _key(row) == key), None)
    return "–" if found is None else _interval(found, "costs", "+.2f")


def _interval(row: Row, name: str, form: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{form}} ({low:{form}} … {high:{form}})"
