"""Writes docs/generated/benchmarks.md, its plots and compiled_kernels.md from the result files alone."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plots, report_kernels, report_ops, report_quality, report_throughput, report_training
from benchmarks.measure import RESULTS
from mvar.files import replacing
from mvar_kernels.testing.registry import SPECS

ROOT = RESULTS.parent.parent
GENERATED = ROOT / "docs" / "generated"
BENCHMARKS = GENERATED / "benchmarks.md"
KERNELS = GENERATED / "compiled_kernels.md"
INTRODUCTION = """# Benchmark results

Written by `python -m benchmarks.report` from the files in `benchmarks/results`; do not edit. The method, the baselines
and the missed targets are described in [Benchmarks](../benchmarks.md).

"""


class Part(NamedTuple):
    """Markdown of one subject."""

    heading: str
    text: str

    def markdown(self) -> str:
        return f"### {self.heading}\n\n{self.text}"


def main() -> None:
    folders = [path for path in sorted(RESULTS.iterdir()) if path.is_dir() and any(path.glob("*.json"))]
    sections: dict[str, list[Part]] = {}
    on_cpu = []
    for folder in folders:
        results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        heading = machine(folder.name, results)
        sections[f"{heading}, {folder.name}" if heading in sections else heading] = device(folder.name, results)
        on_cpu.append(all(content["machine"]["device"] == "cpu" for content in results.values()))
    text = "\n".join(
        f"## {name}\n\n" + "\n".join(part.markdown() for part in parts) for name, parts in sections.items()
    )
    if all(on_cpu):
        text += "\nOn a GPU: not yet measured (`make gpu-bench` does it).\n"
    stored = (json.loads((RESULTS / name).read_text()) for name in ("kernels.json", "cuda_kernels.json"))
    for path, content in ((BENCHMARKS, INTRODUCTION + text), (KERNELS, report_kernels.page(*stored))):
        with replacing(path) as aside:
            aside.write_text(content)
        print(path)


def device(name: str, results: dict[str, Any]) -> list[Part]:
    """All results of one device; its plots are drawn on the way."""

    def named(prefix: str) -> dict[str, Any]:
        return {stem.removeprefix(prefix): r["rows"] for stem, r in results.items() if stem.startswith(prefix)}

    def picture(stem: str, caption: str, draw: Callable[[Path], None]) -> str:
        path = GENERATED / f"{stem}_{name}.png"
        draw(path)
        return f"![{caption}]({path.name})\n"

    throughput = results.get("throughput", {"rows": None})["rows"]
    parts = [Part(heading, text) for heading, text in report_throughput.sections(throughput, name, GENERATED).items()]
    steps = [report_training.step(model, rows) for model, rows in named("train_").items()]
    steps += [report_training.data(model, row) for model, rows in named("data_").items() for row in rows]
    if "digits" in results:
        steps.append(report_training.digits(results["digits"]["rows"]))
    if steps:
        parts.append(Part("Training", "\n".join(steps)))
    if plugged_in := named("plug_in_"):
        parts.append(Part("accelerate in a VAR repository", accelerated(list(plugged_in.values()))))
    parts += [Part(f"Quality, {model}", report_quality.parity(rows)) for model, rows in named("parity_").items()]
    if ops := {op: results[op]["rows"] for op in SPECS if op in results}:
        products = {row["dtype"]: row["gflops"] for row in results["products"]["rows"]} if "products" in results else {}
        roofline = picture("roofline", report_ops.CAPTION, partial(plots.roofline, ops, products))
        beside = picture("ops", "every op and its baselines, as a share of the copy's speed", partial(plots.ops, ops))
        parts.append(Part("Ops against the roofline", report_ops.reached(ops, products) + "\n" + roofline))
        table = report_ops.table(ops, products)
        parts.append(Part("Every op and its baselines", "\n".join([table, beside])))
    parts.append(Part("Measured commits", commits(results)))
    return parts


def commits(results: Mapping[str, Any]) -> str:
    measured: dict[str, list[str]] = {}
    for stem, content in results.items():
        measured.setdefault(content["machine"]["commit"], []).append(f"`{stem}`")
    lines = ["| commit | result files |", "|---|---|"]
    return "\n".join(lines + [f"| {commit} | {', '.join(stems)} |" for commit, stems in measured.items()]) + "\n"


def machine(folder: str, results: Mapping[str, Any]) -> str:
    """The machine or machines of one folder's results.

    Raises ValueError where they are of several devices, or models of CPUs: their figures never share a table.
    """
    found = [content["machine"] for content in results.values()]
    devices = {m["cpu_model"] if m["device"] == "cpu" else m["device"] for m in found}
    if len(devices) > 1:
        raise ValueError(f"{folder}: has figures of {' and of '.join(sorted(devices))}; give each a folder of its own")
    described = (
        f"{m['cpu_model'] if m['device'] == 'cpu' else m['processor']}, {m['threads']} threads"
        + f", {m['device']}" * (m["device"] != "cpu")
        + f", torch {m['torch']}"
        for m in found
    )
    return " and ".join(dict.fromkeys(described))


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


if __name__ == "__main__":
    main()
