"""Tables of what benchmarks/parity.py found."""

from typing import Any


def parity(rows: dict[str, Any]) -> str:
    """What each backend and dtype costs in quality."""
    lines = [
        f"Quality, {rows['model']}, {rows['images']} images of the same seeds as the reference's in float32. Features: "
        f"{rows['judge']}. In brackets the middle 95 % of a bootstrap over images:\n",
        "| side | equal tokens: all, last scale | logit error, rms of their spread | PSNR, dB: images, decoder alone "
        "| Fréchet distance to the reference's | to real images | farther from these than the reference's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows["sides"]:
        name = f"`{row['backend']}`, {row['dtype']}"
        if "objection" in row:
            lines.append(f"| {name} | {row['objection']} | | | | | |")
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
        cells += [
            _with_interval(row, "frechet_to_reference", ".3f"),
            _with_interval(row, "frechet_to_real", ".3f"),
            _with_interval(row, "costs", "+.3f"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_interval(row: dict[str, Any], name: str, form: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{form}} ({low:{form}} … {high:{form}})"
