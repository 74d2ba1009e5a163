"""Count what each Triton kernel costs, without a GPU: `python -m benchmarks.count_instructions [op …]`.

The kernels are compiled with the tiles that are launched if none were tuned, in bfloat16, for the sizes of d16, d24 and
d30: training with batch 32, forward and backward, and the last scale of a generation of 8 images with guidance (16
rows of 256 tokens); group_norm_silu on the sizes of its GPU benchmark. What is counted, and how:
analysis/kernel_costs.py. With --write the rows go into a result file under a label, beside those of its first label,
with which docs/generated/kernel_costs.md compares them.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.analysis import kernel_costs, kernel_times, lower_bounds
from benchmarks.common.environment import argument_parser
from benchmarks.common.results import machine
from mvar.models.config import SCHEDULES, ModelConfig
from mvar.utils.files import atomic_write
from mvar_kernels.dispatch import interpreted
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case
from tests.kernels import compile_ahead

DEPTHS = (16, 24, 30)
CASES = {"training": (32, True), "last scale": (8, False)}
"""Images, and whether it is a training step or a step of a generation with guidance."""
DECODER = ("group_norm_silu",)
SAMPLING = {"guidance": 0.0, "top_k": 900, "top_p": 0.96, "ties": False, "offset": 0.0, "ruled_out": False}
ITEMSIZE = torch.bfloat16.itemsize


class Run(NamedTuple):
    """token_heads: tokens of all rows, times heads where the op has them, or positions of all images."""

    op: str
    name: str
    case: Case
    train: bool
    token_heads: int


def runs(ops: list[str], depths: list[int]) -> Iterator[Run]:
    """The ops as the model calls them. No tokens are sampled in training, and of all models alike."""
    for op in set(ops) & set(DECODER):
        for case in SPECS[op].bench_cuda:
            yield Run(op, case.name, case, False, math.prod(case.sizes[d] for d in "BHW"))
    of_model = [op for op in ops if op not in DECODER]
    for op, depth, (name, (images, train)) in itertools.product(of_model, depths, CASES.items()):
        config = ModelConfig(depth=depth, patch_nums=SCHEDULES[256])
        rows, new = (images, len(config.scales)) if train else (2 * images, 1)
        case = lower_bounds.cases(config, rows, images, config.scales, new)[op]
        if op in lower_bounds.SAMPLING:
            case = replace(case, options={**case.options, **SAMPLING})
        elif op == "scale_attention":
            case = replace(case, options={**case.options, "norm": config.qk_norm, "packed": True})
        elif op == "mamba2_mixer":
            case = replace(case, keeps_dtype=("dt",))  # as the model calls it in 16 bits
        if not (op in lower_bounds.SAMPLING and (train or depth != depths[0])):
            tokens = case.sizes["B"] * sum(config.scales[-new:])
            yield Run(op, f"d{depth} {name}", case, train, tokens * case.sizes.get("H", 1))


def rows_of(run: Run, arch: str) -> list[dict[str, Any]]:
    """One of each launch of the op: of its forward and, in training, of its backward."""
    spec = SPECS[run.op] if run.train else replace(SPECS[run.op], grads=())
    launches, forward_launches = list[compile_ahead.Launch](), 0

    def forward(inputs: Any) -> Any:
        nonlocal forward_launches
        outs = spec.call(inputs, run.case, "triton")
        forward_launches = len(launches)
        return outs

    with compile_ahead.inputs_allowed(), compile_ahead.compiling(arch, 0, {}, launches):
        inputs = compile_ahead.inputs_of(spec, run.case, torch.bfloat16)
        compile_ahead.run_case(spec, inputs, forward)
    rows = []
    for i, launch in enumerate(launches):
        backward = i >= forward_launches
        moved, flops = (spec.work_backward if backward else spec.work)(run.case, ITEMSIZE)
        rows.append(
            {
                "arch": arch,
                "op": run.op,
                "case": run.name,
                "pass": "backward" if backward else "forward",
                "token_heads": run.token_heads,
                "op_bytes": moved,
                "op_flops": flops,
                **asdict(kernel_costs.cost(launch, arch)),
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    accesses = ", ".join(f"{number} {kind}" for kind, number in row["accesses"].items())
    loops = "".join(f" + {size} × {times:g}" for size, times in row["loops"])
    spills = f", {row['stack_bytes']} B stack" if row["stack_bytes"] else ""
    return (
        f"{row['op']}, {row['case']}, {row['pass']}, {row['kernel']}, {row['arch']}: "
        f"{row['warp_instructions'] / row['token_heads']:.1f} warp instructions per token and head = "
        f"({row['outside']}{loops}) × {row['warps']} warps × {row['programs']} programs, "
        f"{(row['read_bytes'] + row['written_bytes']) / 1e6:.1f} MB, {row['registers']} registers{spills}, "
        f"{row['shared_bytes']} B shared, {row['resident_warps']} resident warps, {accesses}, "
        f"tensor cores {', '.join(row['tensor_core_flops']) or 'unused'}"
    )


def write(path: Path, label: str, rows: list[dict[str, Any]]) -> None:
    """Replace the label's rows. A new label replaces all but the file's first, which later ones are compared with."""
    labels = json.loads(path.read_text())["labels"] if path.exists() else {}
    if label not in labels:
        labels = dict(itertools.islice(labels.items(), 1))
    labels[label] = {"triton": triton.__version__, "rows": rows}
    parts = []
    for name, content in labels.items():
        one_a_line = ",\n".join(f"   {json.dumps(row)}" for row in content["rows"])
        parts.append(f'  {json.dumps(name)}: {{"triton": "{content["triton"]}", "rows": [\n{one_a_line}\n  ]}}')
    with atomic_write(path) as temporary:
        temporary.write_text('{\n "labels": {\n' + ",\n".join(parts) + "\n }\n}\n")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("ops", nargs="*", choices=[*SPECS, []], help="(default: all)")
    parser.add_argument("--arch", choices=compile_ahead.ARCHITECTURES, default=kernel_times.ARCH)
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS), help="(default: 16 24 30)")
    parser.add_argument("--write", type=Path, help="the result file, benchmarks/results/instructions.json")
    parser.add_argument("--label", help="of the rows in it (default: the commit)")
    options = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    rows = []
    for run in runs(options.ops or list(SPECS), options.depths):
        for row in rows_of(run, options.arch):
            print(line(row), flush=True)
            rows.append(row)
    if options.write:
        write(options.write, options.label or machine()["commit"], rows)


if __name__ == "__main__":
    main()
