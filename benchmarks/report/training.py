"""Tables of training: a step, data loading, and a whole run on digits."""

from typing import Any

from benchmarks.common.markdown import table


def step(model: str, result: dict[str, Any]) -> str:
    baselines = [name for name in result["runs"][0]["median_ms"] if name != "mvar"]
    columns = ("batch", "dtype", "mvar", *baselines, "matmuls alone")
    rows = []
    for run in result["runs"]:
        ms, speed = run["median_ms"], {name: 1e3 * run["batch"] / t for name, t in run["median_ms"].items()}
        rows.append(
            (
                run["batch"],
                run["dtype"],
                f"{speed['mvar']:.3g}",
                *(f"{speed[name]:.3g} ({ms[name] / ms['mvar']:.2f}×)" for name in baselines),
                f"{1e3 * run['batch'] / run['floor_ms']:.3g}",
                ", ".join(f"{run['peak_gib'][name]:.2f}" for name in ("mvar", *baselines)),
            )
        )
    first, encoder = result["runs"][0], result["encode"]["encoder"]
    largest = max(result["gradient_differences"].values())
    return (
        f"A training step of {model} at 256×256, from forward to fused AdamW, images per second; in brackets the "
        "speed-up of mvar:\n\n"
        + table((*columns, f"peak memory, GiB: mvar, {', '.join(baselines)}"), rows)
        + f"\nGradients differ from eager PyTorch's by at most {largest:.1g} of their norm. From images instead of "
        f"tokens, the published tokenizer's encoder, in float32, adds {encoder / 1e3:.2f} s to a {first['dtype']} step "
        f"at batch {first['batch']}, which itself takes {first['median_ms']['mvar'] / 1e3:.2f} s.\n"
    )


def data(model: str, row: dict[str, Any]) -> str:
    ms = row["median_ms"]
    images, tokens = ms["step from pictures"], ms["step from tokens"]
    return (
        f"A training step of {model} at 256×256, batch {row['batch']}, {row['dtype']}: {images / 1e3:.2f} s from "
        f"images, with {ms['encoding'] / 1e3:.2f} s of encoding and {ms['reading pictures']:.0f} ms of reading; "
        f"{tokens / 1e3:.2f} s from tokens ({images / tokens:.2f} times as fast), with {ms['reading tokens']:.2f} ms "
        "of reading.\n"
    )


def digits(result: list[dict[str, Any]]) -> str:
    """Whole runs, and the part of them that differs."""
    baselines = [name for name in result[0]["median_s"] if name != "mvar"]
    rows, notes = [], []
    for row in result:
        parts, n = row["parts_s"], row["steps"]
        steps_ms = {name: 1e3 * each["steps"] / (n - 1) for name, each in parts.items()}
        timed: list[tuple[str, dict[str, float], str]] = [
            ("the whole command, s", row["median_s"], "–"),
            ("a step after the first, ms", steps_ms, f"{1e3 * row['floor_s'] / n:.1f}"),
        ]
        for what, times, bound in timed:
            slower = (f"{times[name]:.1f} ({times[name] / times['mvar']:.2f}×)" for name in baselines)
            share = f"{row['shorten']:.0%}, {n} steps"
            rows.append((share, row["dtype"], what, f"{times['mvar']:.1f}", *slower, bound))
        rest = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts["mvar"].items() if part != "steps")
        losses = ", ".join(f"{loss:.4f}" for loss in row["val_loss"].values())
        far = ", ".join(f"{distance:.1g}" for distance in row["loss_distances"].values())
        recognised = ", ".join(f"{share:.1%}" for share in row["agreement"].values())
        notes.append(
            f"- {row['shorten']:.0%}, {row['dtype']}: besides the steps mvar's run has {rest}. torch.compile's first "
            f"step takes {parts['torch.compile']['first step']:.1f} s with its graphs cached on disk, as here, and "
            f"{row['first_step_without_cache_s']:.1f} s without. For mvar, {', '.join(baselines)}: held-out loss "
            f"{losses}; losses at most {far} from the float64 reference's; a classifier of real digits recognises "
            f"{recognised} of {row['drawn']} generated ones as the requested class."
        )
    columns = ("share of the epochs", "dtype", "", "mvar", *baselines, "matmuls alone")
    return (
        "`mvar train --preset digits` from scikit-learn's images to the grid of images, whole commands; only the "
        "implementation of the model differs. In brackets the time relative to mvar's:\n\n"
        + table(columns, rows)
        + "\n".join(["", *notes, ""])
    )
