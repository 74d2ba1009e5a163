"""Tables and plots of benchmarks/throughput.py's results, and of how cost grows with tokens."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, published
from benchmarks.growth import DEPTH, OURS, PUBLIC, VAR, counted

Row = dict[str, Any]
NO_MEASUREMENT = "Throughput: not yet measured (`mvar bench --suite throughput`).\n"


def sections(content: Row | None, device: str, folder: Path) -> dict[str, str]:
    """Markdown by heading of one device's results, None where there are none; plots are drawn into `folder`."""
    rows = [row for size in content["sizes"] for row in size["rows"]] if content else []
    by_part = content["by_part"] if content else []

    def picture(name: str, caption: str) -> str:
        return f"![{caption}]({name}_{device}.png)\n"

    found = [table(content["sizes"])] if content and rows else [NO_MEASUREMENT]
    if content:
        found += [*left_out(content["sizes"]), *agreement(content["agreement"]), *aims(rows, by_part, device)]
    if by_part:
        plots.by_part(by_part, rows, folder / f"time_by_part_{device}.png")
        found += [parts(by_part), picture("time_by_part", "where the time goes")]
    if plots.speed(rows, folder / f"speed_{device}.png"):
        found.append(picture("speed", "images a second against the batch"))
    measured = grown(rows)
    plots.growth(list(counted()), measured, folder / f"growth_{device}.png")
    grows = [growth(measured), picture("growth", "cost against tokens: mvar, the public algorithm, VAR")]
    return {"Generation": "\n".join(found), "Cost as resolution grows": "\n".join(grows)}


def table(sizes: Sequence[Row]) -> str:
    """A line for each side of each size."""
    rows = [row for size in sizes for row in size["rows"]]
    chunks = ", ".join(str(chunk) for chunk in sorted({row["scan_chunk"] for row in rows if row["scan_chunk"]}))
    attention = ", ".join(sorted({row["attention"] for row in rows if row["attention"]}))
    peaks = ", ".join(
        f"{row['peak_tflops_per_second']:.3g} TFLOP/s in {dtype} ({row['peak_is']})"
        for dtype, row in {row["dtype"]: row for row in rows}.items()
    )
    theirs = (
        f" The public algorithm's attention: torch's {attention}; its scan in chunks of {chunks}." if chunks else ""
    )
    lines = [
        "Generation with guidance, random weights, every side from the same float32 ones; sides of one size took "
        "turns. FLOPs are counted: products and scans of blocks and head, and the decoder. Share: of the best rate of "
        f"products, {peaks}. Peak memory: with the float32 weights, and what the engine prepares of them.{theirs}\n",
        "| model | batch | dtype | side | images/s | p50; p90, ms (rounds) | of mvar's time | peak, GiB "
        "| weights, M | TFLOP an image | share of peak |",
        "|---" * 11 + "|",
    ]
    for size in sorted(sizes, key=lambda size: [size[name] for name in ("depth", "resolution", "batch", "dtype")]):
        ours = next((row["p50_ms"] for row in size["rows"] if row["side"] == OURS), None)
        for row in size["rows"]:
            cells = (
                f"d{row['depth']} at {row['resolution']}×{row['resolution']}",
                row["batch"],
                row["dtype"],
                row["side"],
                f"{row['images_per_second']:.3g}",
                f"{_short(row['p50_ms'])}; {_short(row['p90_ms']) if row['rounds'] > 1 else '–'} ({row['rounds']})",
                f"{row['p50_ms'] / ours:.2f}" if ours else "–",
                "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
                f"{row['parameters'] / 1e6:.0f}",
                f"{row['flops'] / 1e12:.2f}",
                f"{row['share_of_peak']:.0%}",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def left_out(sizes: Sequence[Row]) -> list[str]:
    """One paragraph for each reason."""
    missing: dict[str, list[str]] = {}
    for size in sizes:
        for side, reason in size["left_out"].items():
            where = f"d{size['depth']}, {size['resolution']}, batch {size['batch']}, {size['dtype']}"
            missing.setdefault(reason, []).append(f"{side} ({where})")
    return [f"Not measured, {reason}: {', '.join(names)}.\n" for reason, names in missing.items()]


def agreement(found: Row) -> list[str]:
    """What each side was held against before it was timed."""
    said = []
    for side, row in found.items():
        if "equal_greedy_tokens" in row:
            said.append(f"{side} {row['equal_greedy_tokens']:.2%} as {row['as']} in {row['dtype']}")
        elif "same_tokens" in row:
            said.append(f"{side}: {'the same tokens' if row['same_tokens'] else 'OTHER TOKENS'} as {row['as']}")
    return [f"Greedy tokens, up to the first scale that differs: {'; '.join(said)}.\n"] if said else []


def aims(rows: Sequence[Row], by_part: Sequence[Row], device: str) -> list[str]:
    """What was aimed at on an H200 for d16 at 256×256 with guidance, and what was found on this GPU."""
    if not device.startswith("nvidia"):
        return []

    def ms(batch: int, side: str) -> float | None:
        wanted = {"depth": 16, "resolution": 256, "batch": batch, "dtype": "bfloat16", "side": side}
        return next((row["p50_ms"] for row in rows if row.items() >= wanted.items()), None)

    ours, theirs, one = ms(25, OURS), ms(25, PUBLIC), ms(1, OURS)
    shares = [t["linear_tflops"] / t["product_tflops"] for t in by_part if t["batch"] == 64 and t["linear_tflops"]]
    found = {
        "batch 25: at least 4 times the public algorithm's speed": ours and theirs and f"{theirs / ours:.1f} times",
        "batch 1: less than 25 ms": one and f"{one:.1f} ms",
        "batch 64: linear layers at 50 % or more of a large product's rate": shares and f"{max(shares):.0%}",
    }
    lines = [f"- {aim}: {value or 'not measured'}" for aim, value in found.items()]
    return ["\n".join(["Aims on an H200, d16 at 256×256:\n", *lines, ""]), published.table(rows)]


def parts(by_part: Sequence[Row]) -> str:
    """Milliseconds by part; on a CPU beside the floor of each, on a GPU with the gaps between kernels."""
    with_floors = "floor_ms" in by_part[0]
    names = [plots.size_name(found) for found in by_part]
    head = "".join(f" {name} | floor |" if with_floors else f" {name} |" for name in names)
    lines = [f"| where a batch's time goes, ms |{head}", "|---" * (1 + len(names) * (1 + with_floors)) + "|"]

    def line(part: str, times: Iterable[tuple[float, float | None]]) -> str:
        return f"| {part} |" + "".join(f" {_short(ms)} |" + f" {_floor(f)} |" * with_floors for ms, f in times)

    for part in by_part[0]["parts_ms"]:
        lines.append(line(part, ((f["parts_ms"][part], f.get("floor_ms", {}).get(part)) for f in by_part)))
    lines.append(line("all", ((f["total_ms"], sum(f.get("floor_ms", {}).values())) for f in by_part)))
    if with_floors:
        peaks = ", ".join(f"{f['peak_gflops']:.0f} GFLOP/s in {f['dtype']}" for f in by_part)
        note = (
            f"Floors: the larger of FLOPs at the best rate measured beside it ({peaks}) and bytes at that of a copy "
            f"({by_part[0]['copy_gbps']:.0f} GB/s); the quantizer's are not counted.\n"
        )
    else:
        rates = (f"{f['linear_tflops'] or 0:.0f} of {f['product_tflops']:.0f} at batch {f['batch']}" for f in by_part)
        note = (
            "Kernels are timed in a run without a graph; gaps, the time of a replay less that of all kernels, have the "
            f"host in them. Linear layers, TFLOP/s, beside a product of 8192×8192 matrices: {', '.join(rates)}.\n"
        )
    return "\n".join([*lines, "", note])


def grown(rows: Sequence[Row]) -> list[Row]:
    """The measured rows that belong beside the counts: one image, in the dtype that most of them are in."""
    one_image = [r for r in rows if (r["depth"], r["batch"]) == (DEPTH, 1) and r["side"] in (OURS, PUBLIC, VAR)]
    dtypes = [row["dtype"] for row in one_image]
    return [row for row in one_image if row["dtype"] == max(dict.fromkeys(dtypes), key=dtypes.count)]


def growth(measured: Sequence[Row]) -> str:
    """Cost against tokens: what is counted, and what was measured."""
    timed = {(row["resolution"], row["side"]): row for row in measured}
    told = f"seconds and peak memory are measured, in {measured[0]['dtype']} and with the decoder" if measured else ""
    lines = [
        f"How cost grows with tokens, an image with guidance, d{DEPTH}: FLOPs, without decoder, and what is remembered "
        "between scales, in bfloat16, are counted (the public algorithm keeps its inputs in float32); "
        f"{told or 'times have not been measured yet'}.\n",
        "| resolution | tokens | side | TFLOP | remembered, MB | seconds | peak, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in counted():
        found = timed.get((row["resolution"], row["side"]), {"p50_ms": None, "peak_gib": None})
        seconds, gib = found["p50_ms"], found["peak_gib"]
        cells = (
            f"{row['resolution']}×{row['resolution']}",
            row["tokens"],
            row["side"],
            f"{row['flops'] / 1e12:.2f}",
            f"{row['state_bytes'] / 1e6:.0f}",
            "not measured" if seconds is None else f"{seconds / 1e3:.3g}",
            "not measured" if gib is None else f"{gib:.1f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _floor(ms: float | None) -> str:
    return f"{ms:.0f}" if ms and ms >= 0.5 else ("< 1" if ms else "–")


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
