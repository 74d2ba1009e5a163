"""README tables, plots and one page of both from the result files alone: `mvar bench --report`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import plots, report_kernels, report_quality, report_throughput, report_training
from benchmarks.measure import RESULTS
from benchmarks.page import page
from mvar.files import replacing
from mvar_kernels.catalogue import SPECS

ROOT = RESULTS.parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: made by `python -m benchmarks.report` -->\n", "<!-- end of benchmarks -->\n"
KERNELS = ROOT / "docs" / "kernels.md"
PAGE = ROOT / "build" / "report.html"


def main() -> None:
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    sections = {folder.name: device(folder) for folder in folders if any(folder.glob("*.json"))}
    text = "\n".join(sections.values())
    if all(folder.name == "cpu" for folder in folders):
        text += "\nOn a GPU: not yet measured (`make gpu` does it).\n"
    with replacing(README) as aside:
        aside.write_text(before + BEGIN + "\n" + text + "\n" + END + after)
    with replacing(PAGE) as aside:
        aside.write_text(page("mvar: benchmarks", sections, ROOT))
    print(PAGE)
    with replacing(KERNELS) as aside:
        stored = (json.loads((RESULTS / name).read_text()) for name in ("kernels.json", "cuda_kernels.json"))
        aside.write_text(report_kernels.page(*stored))


def device(folder: Path) -> str:
    """Markdown of all results of one device; its plots are drawn on the way."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    data = {name: r for name, r in results.items() if name.startswith("data_")}
    plugged_in = {name: r for name, r in results.items() if name.startswith("plug_in_")}
    steps = {name: r for name, r in results.items() if name.startswith("train_")}
    parities = {name: r for name, r in results.items() if name.startswith("parity_")}
    ops = {name: r for name, r in results.items() if name in SPECS}
    parts = [machines(results.values())]
    throughput = results.get("throughput", {"rows": None})["rows"]
    parts += report_throughput.sections(throughput, folder.name, ROOT)
    parts += [report_training.data(name.removeprefix("data_"), row) for name, r in data.items() for row in r["rows"]]
    if plugged_in:
        parts.append(accelerated([content["rows"] for content in plugged_in.values()]))
    parts += [report_training.step(name.removeprefix("train_"), content["rows"]) for name, content in steps.items()]
    if "digits" in results:
        parts.append(report_training.digits(results["digits"]["rows"]))
    parts += [report_quality.parity(content["rows"]) for content in parities.values()]
    if ops:
        picture = Path("docs") / f"ops_{folder.name}.png"
        plots.ops({name: content["rows"] for name, content in ops.items()}, ROOT / picture)
        parts += [table_of_ops(ops), f"![every op beside the others, as a share of the copy's speed]({picture})\n"]
    return "\n".join(parts)


def machines(results: Iterable[Any]) -> str:
    described = {
        f"{m['processor']}, {m['threads']} threads" + f", {m['device']}" * (m["device"] != "cpu"): m
        for m in (content["machine"] for content in results)
    }
    commits = sorted({content["machine"]["commit"] for content in results})
    return "\n".join(
        f"{name}, torch {m['torch']}, commit {', '.join(commits)}. Medians of interleaved runs.\n"
        for name, m in described.items()
    )


def accelerated(models: list[dict[str, Any]]) -> str:
    """Models of VAR's shape before and after `accelerate`."""
    sides = ("before", "accelerated", "torch.compile", "mvar")
    lines = [
        "`mvar_kernels.accelerate` on VAR models with random weights at 256×256, float32; in the last column, mvar "
        "with the same weights. A training step is forward and backward; a generation has guidance and a small "
        "decoder. Seconds; in brackets how many times as fast as before:\n",
        "| model | | batch | before | accelerated | torch.compile | mvar |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows in models:
        for part in ("training", "generation"):
            ms = rows[part]["median_ms"]
            times = (f"{ms[s] / 1e3:.2f}" + f" ({ms['before'] / ms[s]:.2f}×)" * (s != "before") for s in sides)
            cells = (f"{rows['model']}, d{rows['depth']}", part, str(rows[part]["batch"]), *times)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table_of_ops(ops: dict[str, Any]) -> str:
    lines = [
        "Ops, ms; in brackets how many times mvar's. The copy moves as many bytes as the op must at least:\n",
        "| op | case | dtype | pass | mvar | others | copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, content in ops.items():
        for row in content["rows"]:
            times = dict(row["median_ms"])
            copy = times.pop("copy")
            ours = {side: times.pop(side) for side in list(times) if side.startswith("mvar")}
            best = min(ours.values(), default=float("nan"))
            mine = ", ".join(f"{ms:.3g}" for ms in ours.values()) or "wrong, not timed"
            others = ", ".join(f"{side} {ms:.3g} ({ms / best:.1f}×)" for side, ms in times.items())
            cells = (f"`{name}`", row["case"], row["dtype"], row["pass"], mine, others, f"{copy:.3g}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
