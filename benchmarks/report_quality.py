"""README tables of what benchmarks/parity.py and benchmarks/growth.py found."""

from typing import Any


def parity(rows: dict[str, Any]) -> str:
    """What each backend and dtype costs in quality."""
    lines = [
        f"Quality, {rows['model']}, {rows['images']} images of the same seeds as the reference's in float32. Features: "
        f"{rows['judge']}. In brackets the middle 95 % of a bootstrap over images:\n",
        "| side | equal tokens: all, last scale | logit error, rms of their spread | PSNR, dB: images, decoder alone "
        "| Fréchet distance to the reference's | farther from real images |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows["sides"]:
        name = f"`{row['backend']}`, {row['dtype']}"
        if "objection" in row:
            lines.append(f"| {name} | {row['objection']} | | | | |")
            continue
        cells = ["–"] * 3
        if "equal_tokens" in row:
            psnrs = (row["psnr_db"], row["psnr_of_same_tokens_db"])
            cells = [
                f"{row['equal_tokens']:.1%}, {row['equal_tokens_by_scale'][-1]:.1%}",
                f"{row['logit_error_rms']:.1e}",
                ", ".join("the same" if psnr is None else f"{psnr:.1f}" for psnr in psnrs),
            ]
        else:
            name += ", another seed"
        low, high = row["costs_interval"]
        cells += [f"{abs(row['frechet_to_reference']):.3f}", f"{row['costs']:+.3f} ({low:+.3f} … {high:+.3f})"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def growth(rows: dict[str, Any]) -> str:
    """Cost against tokens: counted of d16, and measured of a small model."""
    timed = {row["resolution"]: row for row in rows["measured"]}
    depth = next((row["depth"] for row in timed.values()), None)
    lines = [
        "How cost grows with tokens, an image with guidance, without decoder: FLOPs and what is remembered between "
        f"scales are counted, of d16 in bfloat16 (the public algorithm keeps its inputs in float32); "
        f"{f'seconds are measured, of d{depth} in float32' if timed else 'times have not been measured yet'}.\n",
        "| resolution | tokens | side | TFLOP | remembered, MB | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows["counted"]:
        ms = timed[row["resolution"]]["median_ms"][row["side"]] if row["resolution"] in timed else None
        cells = (f"{row['resolution']}×{row['resolution']}", row["tokens"], row["side"], f"{row['flops'] / 1e12:.2f}")
        lines.append(
            f"| {' | '.join(map(str, cells))} | {row['state_bytes'] / 1e6:.0f} "
            f"| {'not measured' if ms is None else f'{ms / 1e3:.2f}'} |"
        )
    return "\n".join(lines) + "\n"
