"""Tables of bench_editing's results."""

from typing import Any

from benchmarks.common.markdown import table


def editing(result: dict[str, Any]) -> str:
    """Agreement and seam of every method, and the agreement of variations."""
    rows = [
        (asked, method, f"{value['agreement']:.1%}", f"{value['seam']:.3f}")
        for asked, methods in result["inpainting"].items()
        for method, value in methods.items()
    ]
    real = result["real"]
    rows.append(("", "the real digits", f"{real['agreement']:.1%}", f"{real['seam']:.3f}"))
    names = [name for name in result["variations"][0] if name != "keep_scales"]
    kept = [(row["keep_scales"], *(f"{row[name]:.1%}" for name in names)) for row in result["variations"]]
    return (
        f"{result['model']}, {result['images']} held-out images, {result['options']}. The right half generated anew; "
        "agreement is that of a classifier with the class, or without one with the digit's; seam is the mean "
        "difference of pixels across the mask's edge, in [0, 1]:\n\n"
        + table(("class", "method", "agreement", "seam"), rows)
        + "\nVariations, agreement with the class:\n\n"
        + table(("`keep_scales`", *names), kept)
    )
