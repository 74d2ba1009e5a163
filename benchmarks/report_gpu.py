"""Tables of generation on a GPU, from its result files."""

from collections.abc import Sequence
from typing import Any

from benchmarks.generation import OURS, targets

Rows = Sequence[dict[str, Any]]


def generation(content: dict[str, Any], timelines: Rows) -> str:
    """Speed and memory by size, what was left out, targets, and where the time goes."""
    rows, agreement = content["sizes"], content["agreement"]
    sides = list(dict.fromkeys(side for row in rows for side in row["median_ms"] if side != OURS))
    attention = next((row["public_attention"] for row in rows if row.get("public_attention")), None)
    lines = [
        "Generation with guidance in bfloat16, random weights: milliseconds a batch (images a second, peak GiB); of "
        "the others milliseconds (how many times mvar's, peak GiB). Memory is that of the float32 weights that every "
        f"side is given, and all that it makes. The public algorithm's attention: torch's {attention or 'own'}.\n",
        f"| size | batch | mvar | {' | '.join(sides)} |",
        "|---" * (3 + len(sides)) + "|",
    ]
    for row in rows:
        name = f"d{row['depth']} at {row['resolution']}×{row['resolution']}"
        cells = (_cell(row, side) for side in (OURS, *sides))
        lines.append(f"| {name} | {row['batch']} | {' | '.join(cells)} |")
    missing = {reason: [] for row in rows for reason in row["left_out"].values()}  # type: dict[str, list[str]]
    for row in rows:
        for side, reason in row["left_out"].items():
            missing[reason].append(f"{side} (d{row['depth']}, {row['resolution']}, batch {row['batch']})")
    lines += ["", *(f"Not measured, {reason}: {', '.join(names)}.\n" for reason, names in missing.items())]
    if agreement:
        same = "the same tokens" if agreement["same_tokens_without_a_graph"] else "OTHER TOKENS"
        equal = agreement["greedy_tokens_equal_to_public"]
        lines.append(
            f"Greedy tokens in float32, up to the first scale that differs: {equal:.2%} as the public algorithm's. "
            f"With and without a graph: {same}.\n"
        )
    lines += ["Aims on an H200, d16 at 256×256:\n", *(f"- {a}: {found}" for a, found in targets(rows, timelines)), ""]
    return "\n".join(lines + ([timeline(timelines)] if timelines else []))


def _cell(row: dict[str, Any], side: str) -> str:
    if side not in row["median_ms"]:
        return "–"
    ms, gib = row["median_ms"][side], row["peak_gib"][side]
    if side == OURS:
        return f"{_short(ms)} ({_short(row['images_per_second'][side])}, {gib:.1f})"
    times = f"{ms / row['median_ms'][OURS]:.1f}×, " if OURS in row["median_ms"] else ""
    return f"{_short(ms)} ({times}{gib:.1f})"


def timeline(timelines: Rows) -> str:
    """Milliseconds by part, a column for each batch."""
    heads = "".join(f" d{t['depth']} at {t['resolution']}, batch {t['batch']} |" for t in timelines)
    lines = [f"| where a batch's time goes, ms |{heads}", "|---" * (1 + len(timelines)) + "|"]
    for part in timelines[0]["parts_ms"]:
        lines.append(f"| {part} |" + "".join(f" {_short(t['parts_ms'][part])} |" for t in timelines))
    lines.append("| all |" + "".join(f" {_short(t['total_ms'])} |" for t in timelines))
    rates = (f"{t['linear_tflops'] or 0:.0f} of {t['product_tflops']:.0f} at batch {t['batch']}" for t in timelines)
    note = (
        "Kernels are timed in a run without a graph; gaps, the time of a replay less that of all kernels, have the "
        f"host in them. Linear layers, TFLOP/s, beside a product of 8192×8192 matrices: {', '.join(rates)}.\n"
    )
    return "\n".join([*lines, "", note])


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
