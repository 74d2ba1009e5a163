"""README tables from the result files alone: `python -m benchmarks.report`."""

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS
from mvar.files import replacing

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: made by `python -m benchmarks.report` -->\n", "<!-- end of benchmarks -->\n"


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    with replacing(README) as aside:
        aside.write_text(before + BEGIN + "\n" + tables(RESULTS / "cpu") + "\n" + END + after)


def tables(folder: Path) -> str:
    """Markdown of all results of one device."""
    ops = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    whole = {name: ops.pop(name) for name in list(ops) if name.startswith("generate_")}
    parts = [_machine(content["machine"]) for content in [*whole.values(), *ops.values()][:1]]
    parts += [_generation(name.removeprefix("generate_"), content["rows"]) for name, content in whole.items()]
    parts += [_ops(ops)] if ops else []
    return "\n".join(parts)


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}. "
        "Medians of interleaved runs.\n"
    )


def _generation(model: str, rows: dict[str, Any]) -> str:
    lines = [
        f"Generation, {model} at 256×256 with guidance, against the public algorithm in plain PyTorch:\n",
        "| batch | dtype | public algorithm, s | mvar, s | ratio | peak memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for run in rows["runs"]:
        ms, memory = run["median_ms"], run["peak_memory_gib"]
        lines.append(
            f"| {run['batch']} | {run['dtype']} | {ms['public algorithm'] / 1e3:.2f} | {ms['mvar'] / 1e3:.2f} "
            f"| {run['ratio']:.1f} | {memory['theirs']:.1f} → {memory['ours']:.1f} |"
        )
    for run in rows["runs"]:
        if run["breakdown"] is not None:
            lines += ["", _breakdown(run)]
    agreement = rows["agreement"]
    lines += [
        "",
        f"Greedy tokens: {agreement['greedy_tokens_equal_to_public']:.2%} as the public algorithm's in float32; "
        f"{agreement['greedy_tokens_bf16_equal_to_fp32']:.1%} of bfloat16's as float32's (one that differs changes all "
        f"that come after it). The bfloat16 decoder: {agreement['decoder_bf16_psnr_db']:.1f} dB PSNR.\n",
    ]
    return "\n".join(lines)


def _breakdown(run: dict[str, Any]) -> str:
    parts = run["breakdown"]["parts_ms"]
    spent = ", ".join(f"{part} {ms:.0f}" for part, ms in parts.items())
    floors = ", ".join(f"{part} {ms:.0f}" for part, ms in run["breakdown"]["floor_ms"].items())
    return (
        f"Where {run['dtype']}'s {run['breakdown']['total_ms']:.0f} ms go: {spent}. "
        f"Floors at {run['breakdown']['peak_gflops']:.0f} GFLOP/s: {floors}."
    )


def _ops(ops: dict[str, Any]) -> str:
    lines = [
        "Ops, forward, ms:\n",
        "| op | case | dtype | mvar | others | copy of as many bytes |",
        "|---|---|---|---|---|---|",
    ]
    for name, content in ops.items():
        for row in content["rows"]:
            times = dict(row["median_ms"])
            copy = times.pop("copy")
            ours = {side: times.pop(side) for side in list(times) if side.startswith("mvar")}
            best = min(ours.values(), default=None)
            mine = ", ".join(f"{ms:.3f}" for ms in ours.values()) or "–"
            others = ", ".join(f"{s} {ms:.3f}" + (f" ({ms / best:.1f}×)" if best else "") for s, ms in times.items())
            lines.append(f"| `{name}` | {row['case']} | {row['dtype']} | {mine} | {others} | {copy:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
