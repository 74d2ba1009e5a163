"""Tables of training: a step, where its data come from, and digits end to end."""

from typing import Any


def step(model: str, rows: dict[str, Any]) -> str:
    others = [side for side in rows["runs"][0]["median_ms"] if side != "mvar"]
    lines = [
        f"A training step of {model} at 256×256, from forward to fused AdamW, images a second; in brackets how many "
        "times as fast mvar is:\n",
        f"| batch | dtype | mvar | {' | '.join(others)} | products alone "
        f"| peak memory, GiB: mvar, {', '.join(others)} |",
        "|---" * (5 + len(others)) + "|",
    ]
    for run in rows["runs"]:
        ms, speed = run["median_ms"], {side: 1e3 * run["batch"] / t for side, t in run["median_ms"].items()}
        slower = (f"{speed[side]:.3g} ({ms[side] / ms['mvar']:.2f}×)" for side in others)
        held = ", ".join(f"{run['peak_gib'][side]:.2f}" for side in ("mvar", *others))
        lines.append(
            f"| {run['batch']} | {run['dtype']} | {speed['mvar']:.3g} | {' | '.join(slower)} "
            f"| {1e3 * run['batch'] / run['floor_ms']:.3g} | {held} |"
        )
    first, encoder = rows["runs"][0], rows["encode"]["encoder"]
    largest = max(rows["gradient_differences"].values())
    lines += [
        "",
        f"Gradients differ from eager PyTorch's by at most {largest:.1g} of their norm. From pictures instead of "
        f"tokens, the published tokenizer's encoder, in float32, adds {encoder / 1e3:.2f} s to a {first['dtype']} step "
        f"at batch {first['batch']}, which itself takes {first['median_ms']['mvar'] / 1e3:.2f} s.\n",
    ]
    return "\n".join(lines)


def data(model: str, row: dict[str, Any]) -> str:
    ms = row["median_ms"]
    pictures, tokens = ms["step from pictures"], ms["step from tokens"]
    return (
        f"A training step of {model} at 256×256, batch {row['batch']}, {row['dtype']}: {pictures / 1e3:.2f} s from "
        f"pictures, with {ms['encoding'] / 1e3:.2f} s of encoding and {ms['reading pictures']:.0f} ms of reading; "
        f"{tokens / 1e3:.2f} s from tokens ({pictures / tokens:.2f} times as fast), with {ms['reading tokens']:.2f} ms "
        "of reading.\n"
    )


def digits(rows: list[dict[str, Any]]) -> str:
    """Whole commands, and the part of them that differs."""
    others = [side for side in rows[0]["median_s"] if side != "mvar"]
    lines = [
        "Digits end to end: `mvar train --preset digits`, from scikit-learn's pictures to the grid of pictures, whole "
        "commands; only the model's computation is another on each side. In brackets how many times mvar's:\n",
        f"| share of the epochs | dtype | | mvar | {' | '.join(others)} | products alone |",
        "|---" * (5 + len(others)) + "|",
    ]
    notes = []
    for row in rows:
        parts, n = row["parts_s"], row["steps"]
        steps_ms = {side: 1e3 * each["steps"] / (n - 1) for side, each in parts.items()}
        timed: list[tuple[str, dict[str, float], str]] = [
            ("the whole command, s", row["median_s"], "–"),
            ("a step after the first, ms", steps_ms, f"{1e3 * row['floor_s'] / n:.1f}"),
        ]
        for what, times, floor in timed:
            slower = (f"{times[side]:.1f} ({times[side] / times['mvar']:.2f}×)" for side in others)
            cells = (f"{row['shorten']:.0%}, {n} steps", row["dtype"], what, f"{times['mvar']:.1f}", *slower, floor)
            lines.append(f"| {' | '.join(cells)} |")
        rest = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts["mvar"].items() if part != "steps")
        losses = ", ".join(f"{loss:.4f}" for loss in row["val_loss"].values())
        far = ", ".join(f"{distance:.1g}" for distance in row["loss_distances"].values())
        agreement = ", ".join(f"{share:.1%}" for share in row["agreement"].values())
        notes.append(
            f"- {row['shorten']:.0%}, {row['dtype']}: beside those steps mvar's run has {rest}. torch.compile's first "
            f"step takes {parts['torch.compile']['first step']:.1f} s with its graphs on the disk, as here, and "
            f"{row['first_step_without_cache_s']:.1f} s without. For mvar, {', '.join(others)}: held-out loss {losses};"
            f" losses at most {far} from the float64 reference's; of {row['drawn']} digits drawn, a classifier of real "
            f"ones takes {agreement} for the class asked for."
        )
    return "\n".join([*lines, "", *notes, ""])
