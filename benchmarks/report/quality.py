"""Tables of bench_quality's results."""

from typing import Any

from benchmarks.common.markdown import table

COLUMNS = (
    "backend, dtype",
    "equal tokens: all, last scale",
    "logit error, rms of their spread",
    "PSNR, dB: images, decoder alone",
    "Fréchet distance to the reference's",
    "to real images",
    "farther from these than the reference's",
)


def quality(result: dict[str, Any]) -> str:
    """What each backend and dtype costs in quality."""
    rows: list[tuple[str, ...]] = []
    for row in result["sides"]:
        name = f"`{row['backend']}`, {row['dtype']}"
        if "objection" in row:
            rows.append((name, row["objection"], *[""] * (len(COLUMNS) - 2)))
            continue
        cells = ["–"] * 3
        if "equal_tokens" in row:
            psnrs = (row["psnr_db"], row["psnr_of_same_tokens_db"])
            cells = [
                f"{row['equal_tokens']:.1%}, {row['equal_tokens_by_scale'][-1]:.1%}",
                f"{row['logit_error_rms']:.1e}",
                ", ".join("equal" if psnr is None else f"{psnr:.1f}" for psnr in psnrs),
            ]
        else:
            name += ", another seed"
        forms = {"frechet_to_reference": ".3f", "frechet_to_real": ".3f", "costs": "+.3f"}
        rows.append((name, *cells, *(_with_interval(row, *form) for form in forms.items())))
    return (
        f"{result['model']}, {result['images']} images with the seeds of the float32 reference's. Features: "
        f"{result['judge']}. In brackets the middle 95 % of a bootstrap over images:\n\n"
    ) + table(COLUMNS, rows)


def _with_interval(row: dict[str, Any], name: str, form: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{form}} ({low:{form}} … {high:{form}})"
