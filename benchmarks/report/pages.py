"""Writes docs/generated: the benchmarks' page and its plots from the result files, the kernels' page, and what is
counted."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.analysis import lower_bounds, scaling
from benchmarks.common.markdown import table
from benchmarks.common.results import RESULTS, ROOT
from benchmarks.report import (
    compiled_kernels,
    editing,
    generation,
    kernel_costs,
    ops,
    plots,
    quality,
    shortcuts,
    training,
)
from mvar.utils.files import atomic_write
from mvar_kernels.testing.registry import SPECS

GENERATED = ROOT / "docs" / "generated"
BENCHMARKS = GENERATED / "benchmarks.md"
CARRIED_STATE = GENERATED / "carried_state.md"
INTRODUCTION = """# Benchmark results

Written by `python -m benchmarks.report` from the files in `benchmarks/results`; do not edit. The method, the baselines
and the missed targets are described in [Benchmarks](../benchmarks.md).

"""


def main() -> None:
    folders = [path for path in sorted(RESULTS.iterdir()) if path.is_dir() and any(path.glob("*.json"))]
    text, only_cpus = INTRODUCTION, True
    for folder in folders:
        results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        sections = (f"### {heading}\n\n{body}" for heading, body in device(folder.name, results).items())
        text += f"## {machine(folder.name, results)}\n\n" + "\n".join(sections) + "\n"
        only_cpus &= all(content["machine"]["device"] == "cpu" for content in results.values())
    if only_cpus:
        text += "On a GPU: not yet measured (`make gpu-bench` does it).\n"
    kernels = (json.loads((RESULTS / name).read_text()) for name in ("kernels.json", "cuda_kernels.json"))
    pages = {
        BENCHMARKS: text.rstrip() + "\n",
        GENERATED / "compiled_kernels.md": compiled_kernels.page(*kernels),
        GENERATED / "kernel_costs.md": kernel_costs.page(json.loads((RESULTS / "instructions.json").read_text())),
        CARRIED_STATE: scaling.page(),
        GENERATED / "lower_bounds.md": lower_bounds.page(),
        RESULTS / "floors_h200.json": lower_bounds.content(),
    }
    for path, content in pages.items():
        with atomic_write(path) as temporary:
            temporary.write_text(content)
        print(path)


def device(name: str, results: dict[str, Any]) -> dict[str, str]:
    """Markdown by heading of one device's results; writes its plots."""

    def named(prefix: str) -> dict[str, Any]:
        return {stem.removeprefix(prefix): r["rows"] for stem, r in results.items() if stem.startswith(prefix)}

    def image(stem: str, caption: str, plot: Callable[[Path], None]) -> str:
        path = GENERATED / f"{stem}_{name}.png"
        plot(path)
        return f"![{caption}]({path.name})\n"

    throughput = results.get("throughput", {"rows": None})["rows"]
    found = generation.sections(throughput, name)
    steps = [training.step(model, rows) for model, rows in named("train_").items()]
    steps += [training.data(model, row) for model, rows in named("data_").items() for row in rows]
    if "digits" in results:
        steps.append(training.digits(results["digits"]["rows"]))
    if steps:
        found["Training"] = "\n".join(steps)
    if models := named("plug_in_"):
        found["accelerate in a VAR repository"] = accelerated(list(models.values()))
    of_packaged = named("shortcuts_")
    if "shortcuts" in results:
        found["Shortcuts"] = shortcuts.shortcuts(results["shortcuts"]["rows"], of_packaged)
    found |= {f"Shortcuts, {model}": shortcuts.quality(rows) for model, rows in of_packaged.items()}
    if loading := named("loading_"):
        found["Memory of loading and generation"] = shortcuts.memory([row for rows in loading.values() for row in rows])
    found |= {f"Quality, {model}": quality.quality(rows) for model, rows in named("parity_").items()}
    found |= {f"Editing, {model}": editing.editing(rows) for model, rows in named("editing_").items()}
    if op_rows := {op: results[op]["rows"] for op in SPECS if op in results}:
        matmuls = {row["dtype"]: row["gflops"] for row in results.get("products", {"rows": ()})["rows"]}
        roofline = image("roofline", ops.CAPTION, partial(plots.roofline, op_rows, matmuls))
        plot = image("ops", "every op and its baselines, as a share of a copy's speed", partial(plots.ops, op_rows))
        found["Ops against the roofline"] = ops.summary(op_rows, matmuls) + "\n" + roofline
        found["Every op and its baselines"] = ops.comparison(op_rows, matmuls) + "\n" + plot
    return found | {"Measured commits": commits(results)}


def commits(results: Mapping[str, Any]) -> str:
    measured: dict[str, list[str]] = {}
    for stem, content in results.items():
        measured.setdefault(content["machine"]["commit"], []).append(f"`{stem}`")
    return table(("commit", "result files"), ((commit, ", ".join(stems)) for commit, stems in measured.items()))


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
    """VAR models before and after `accelerate`."""
    implementations, rows = ("before", "accelerated", "torch.compile", "mvar"), []
    for model in models:
        for part in ("training", "generation"):
            ms = model[part]["median_ms"]
            times = (
                f"{ms[s] / 1e3:.2f}" + f" ({ms['before'] / ms[s]:.2f}×)" * (s != "before") for s in implementations
            )
            rows.append((f"{model['model']}, d{model['depth']}", part, model[part]["batch"], *times))
    return (
        "`mvar_kernels.accelerate` on VAR models with random weights at 256×256, float32; in the last column, mvar "
        "with the same weights. A training step is forward and backward; a generation has guidance and a small "
        "decoder. Seconds; in brackets the speed-up:\n\n"
    ) + table(("model", "", "batch", *implementations), rows)
