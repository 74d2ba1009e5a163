"""Tables of bench_generation's results, and of how cost scales with the number of tokens."""

from collections.abc import Sequence
from typing import Any

from benchmarks.analysis.flops import OURS, PUBLIC, VAR
from benchmarks.analysis.scaling import DEPTH, counted
from benchmarks.common.markdown import table, three_digits
from benchmarks.report import published

Row = dict[str, Any]
PRODUCTS = "linear layers", "convolutions"
PART_NAMES = {"drawing": "token sampling"}  # parts that have another name in result files
NOT_MEASURED = "Generation: not yet measured (`python -m benchmarks.bench_generation`).\n"


def sections(content: Row | None, device: str) -> dict[str, str]:
    """Markdown by heading of one device's results, None where there are none."""
    rows = [row for size in content["sizes"] for row in size["rows"]] if content else []
    found = [methods(content["sizes"])] if content and rows else [NOT_MEASURED]
    if content:
        profiles = content["by_part"]
        found += [*left_out(content["sizes"]), *checks(content["agreement"]), *targets(rows, profiles, device)]
        found += [by_part(profiles)] if profiles else []
    return {"Generation": "\n".join(found), "Cost by resolution": scaling(one_image(rows))}


def methods(sizes: Sequence[Row]) -> str:
    """A line for each method of each configuration."""
    all_rows = [row for size in sizes for row in size["rows"]]
    chunks = ", ".join(str(chunk) for chunk in sorted({row["scan_chunk"] for row in all_rows if row["scan_chunk"]}))
    attention = ", ".join(sorted({row["attention"] for row in all_rows if row["attention"]}))
    peaks = ", ".join(
        f"{row['peak_tflops_per_second']:.3g} TFLOP/s in {dtype} ({row['peak_is']})"
        for dtype, row in {row["dtype"]: row for row in all_rows}.items()
    )
    rows = []
    for size in sorted(sizes, key=lambda size: [size[name] for name in ("depth", "resolution", "batch", "dtype")]):
        ours = next((row["p50_ms"] for row in size["rows"] if row["side"] == OURS), None)
        for row in size["rows"]:
            p90 = three_digits(row["p90_ms"]) if row["rounds"] > 1 else "–"
            rows.append(
                (
                    f"d{row['depth']} at {row['resolution']}×{row['resolution']}",
                    row["batch"],
                    row["dtype"],
                    row["side"],
                    f"{row['images_per_second']:.3g}",
                    f"{three_digits(row['p50_ms'])}; {p90} ({row['rounds']})",
                    f"{row['p50_ms'] / ours:.2f}" if ours else "–",
                    "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
                    f"{row['parameters'] / 1e6:.0f}",
                    f"{row['flops'] / 1e12:.2f}",
                    f"{row['share_of_peak']:.0%}",
                )
            )
    public = f" The public algorithm uses torch's {attention}, and a scan in chunks of {chunks}." if chunks else ""
    columns = (
        "model",
        "batch",
        "dtype",
        "method",
        "images/s",
        "p50; p90, ms (rounds)",
        "of mvar's time",
        "peak memory, GiB",
        "weights, M",
        "TFLOP per image",
        "share of peak rate",
    )
    return (
        "Generation with guidance, random weights; all methods from the same float32 ones, those of one configuration "
        "interleaved. FLOPs are counted: matmuls and scans of blocks and head, and the decoder. Peak rate: of matmuls, "
        f"{peaks}. Peak memory: with the float32 weights and the inference copies of them.{public}\n\n"
    ) + table(columns, rows)


def left_out(sizes: Sequence[Row]) -> list[str]:
    """One paragraph for each reason."""
    missing: dict[str, list[str]] = {}
    for size in sizes:
        for method, reason in size["left_out"].items():
            where = f"d{size['depth']}, {size['resolution']}, batch {size['batch']}, {size['dtype']}"
            missing.setdefault(reason, []).append(f"{method} ({where})")
    return [f"Not measured, {reason}: {', '.join(names)}.\n" for reason, names in missing.items()]


def checks(found: Row) -> list[str]:
    """What each method was compared with before it was timed."""
    results = []
    for method, row in found.items():
        if "equal_greedy_tokens" in row:
            results.append(f"{method} {row['equal_greedy_tokens']:.2%} as {row['as']} in {row['dtype']}")
        elif "same_tokens" in row:
            results.append(f"{method}: {'the same tokens' if row['same_tokens'] else 'OTHER TOKENS'} as {row['as']}")
    text = "Equal greedy tokens, up to the first scale that differs: "
    return [f"{text}{'; '.join(results)}.\n"] if results else []


def targets(rows: Sequence[Row], profiles: Sequence[Row], device: str) -> list[str]:
    """The targets on an H200 for d16 at 256×256 with guidance, and what was measured on this GPU."""
    if not device.startswith("nvidia"):
        return []

    def ms(batch: int, method: str) -> float | None:
        wanted = {"depth": 16, "resolution": 256, "batch": batch, "dtype": "bfloat16", "side": method}
        return next((row["p50_ms"] for row in rows if row.items() >= wanted.items()), None)

    ours, public, one = ms(25, OURS), ms(25, PUBLIC), ms(1, OURS)
    shares = [p["linear_tflops"] / p["product_tflops"] for p in profiles if p["batch"] == 64 and p["linear_tflops"]]
    found = {
        "batch 25: at least 4 times the public algorithm's speed": ours and public and f"{public / ours:.1f} times",
        "batch 1: less than 25 ms": one and f"{one:.1f} ms",
        "batch 64: linear layers at 50 % or more of a large matmul's rate": shares and f"{max(shares):.0%}",
    }
    lines = [f"- {target}: {value or 'not measured'}" for target, value in found.items()]
    return ["\n".join(["Targets on an H200, d16 at 256×256:\n", *lines, ""]), published.comparison(rows)]


def by_part(profiles: Sequence[Row]) -> str:
    """Milliseconds by part; on a CPU beside their lower bounds, on a GPU with the gaps between kernels."""
    bounded = "floor_ms" in profiles[0]
    columns = ["part of a batch's time, ms"]
    for profile in profiles:
        size = f"d{profile['depth']} at {profile['resolution']}, batch {profile['batch']}, {profile['dtype']}"
        columns += [size, *["lower bound"] * bounded]
    rows = []
    for part in [*profiles[0]["parts_ms"], None]:
        cells = ["all" if part is None else PART_NAMES.get(part, part)]
        for profile in profiles:
            bounds = profile.get("floor_ms", {})
            ms, bound = (
                (profile["total_ms"], sum(bounds.values()))
                if part is None
                else (profile["parts_ms"][part], bounds.get(part))
            )
            cells += [three_digits(ms), *[_bound(bound)] * bounded]
        rows.append(cells)
    split = all("convolutions" in profile["parts_ms"] for profile in profiles)
    if split:
        rows.append(_without_multiplications(profiles, bounded))
    if bounded:
        rates = ", ".join(f"{p['peak_gflops']:.0f} GFLOP/s in {p['dtype']}" for p in profiles)
        note = (
            f"Lower bounds: the larger of FLOPs at the matmul rate measured beside it ({rates}) and bytes at the rate "
            f"of a copy ({profiles[0]['copy_gbps']:.0f} GB/s); the quantizer's are not counted."
            + " The decoder is without its convolutions; its bound is that of its GroupNorms." * split
            + "\n"
        )
    else:
        rates = ", ".join(
            f"{p['linear_tflops'] or 0:.0f} of {p['product_tflops']:.0f} at batch {p['batch']}" for p in profiles
        )
        note = (
            "Kernels are timed in a run without a graph; gaps, the time of a replay minus that of all kernels, include "
            f"the host's. Linear layers, TFLOP/s, beside a matmul of 8192×8192 matrices: {rates}.\n"
        )
    return table(columns, rows) + "\n" + note


def _without_multiplications(profiles: Sequence[Row], bounded: bool) -> list[str]:
    """Share of all parts but linear layers and convolutions; on a CPU also if each took no longer than its bound."""
    cells = ["all but linear layers and convolutions"]
    for profile in profiles:
        products = sum(profile["parts_ms"][part] for part in PRODUCTS)
        for times in (profile[name] for name in ("parts_ms", *["floor_ms"] * bounded)):
            others = sum(ms for part, ms in times.items() if part not in PRODUCTS)
            cells.append(f"{others / (products + others):.1%}")
    return cells


def one_image(rows: Sequence[Row]) -> list[Row]:
    """The measured rows to show beside the counts: one image, in the dtype that most of them are in."""
    found = [r for r in rows if (r["depth"], r["batch"]) == (DEPTH, 1) and r["side"] in (OURS, PUBLIC, VAR)]
    dtypes = [row["dtype"] for row in found]
    return [row for row in found if row["dtype"] == max(dict.fromkeys(dtypes), key=dtypes.count)]


def scaling(measured: Sequence[Row]) -> str:
    """Cost against tokens: what is counted, and what was measured."""
    timed = {(row["resolution"], row["side"]): row for row in measured}
    times = f"seconds and peak memory are measured, in {measured[0]['dtype']} and with the decoder" if measured else ""
    rows = []
    for row in counted():
        found = timed.get((row["resolution"], row["side"]), {"p50_ms": None, "peak_gib": None})
        seconds, gib = found["p50_ms"], found["peak_gib"]
        rows.append(
            (
                f"{row['resolution']}×{row['resolution']}",
                row["tokens"],
                row["side"],
                f"{row['flops'] / 1e12:.2f}",
                f"{row['state_bytes'] / 1e6:.0f}",
                "not measured" if seconds is None else f"{seconds / 1e3:.3g}",
                "not measured" if gib is None else f"{gib:.1f}",
            )
        )
    return (
        f"How the cost of an image with guidance scales with its tokens, d{DEPTH}: FLOPs, without decoder, and the "
        "state carried between scales, in bfloat16, are counted (the public algorithm keeps its inputs in float32); "
        f"{times or 'times have not been measured yet'}.\n\n"
    ) + table(("resolution", "tokens", "method", "TFLOP", "carried state, MB", "seconds", "peak memory, GiB"), rows)


def _bound(ms: float | None) -> str:
    return f"{ms:.0f}" if ms and ms >= 0.5 else ("< 1" if ms else "–")
