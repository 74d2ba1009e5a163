"""docs/generated/kernel_costs.md: what each launch costs, as `benchmarks.count_instructions` counts it, and a time."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.analysis.flops import OURS, ROWS, work
from benchmarks.analysis.kernel_times import ARCH, H100, bound_us, estimate_us, limits_us
from benchmarks.common.markdown import table, three_digits
from mvar.models.config import SCHEDULES, ModelConfig

Row = Mapping[str, Any]
Pass = tuple[str, str, str]  # op, case, forward or backward

SUMMARY = (
    "op,case,pass,launches,instructions per token and head,moved MB,least MB,estimate µs,lower bound µs,share"
).split(",")
DETAILS = (
    "case,pass,kernel,constants,programs,waves,warps,registers,stack,shared KB,resident warps,instructions per token "
    "and head,in loops,moved MB,memory accesses,tensor cores,estimate µs,by"
).split(",")


def page(counted: Mapping[str, Any]) -> str:
    labels = {name: [row for row in content["rows"] if row["arch"] == ARCH] for name, content in _labels(counted)}
    names = " → ".join(f"`{name}`" for name in labels)
    versions = " → ".join(dict.fromkeys(content["triton"] for _, content in _labels(counted)))
    details = "".join(
        f"\n## {op}, `{name}`\n\n{table(DETAILS, map(_launch, of_op))}"
        for name, rows in labels.items()
        for op, of_op in groupby(rows, lambda row: str(row["op"]))
    )
    return f"""# What each kernel costs

Counted in the machine code for {ARCH} that Triton {versions} makes, bfloat16, without a GPU: nothing here was run or
timed. Written by `python -m benchmarks.count_instructions --write benchmarks/results/instructions.json` and `python -m
benchmarks.report`. Commits, or other labels: {names}.

Training is a batch of 32 images of 256×256 (680 tokens each), the last scale that of 8 images with guidance (16 rows of
256 tokens). Ops without heads are counted per token.

- **Instructions** of a launch: each loop's in the machine code times its iterations in a program, and all others once,
  times warps and programs. Iterations follow from the launch; of a search in the logits they are an estimate. Code
  that is rarely run, as for a first chunk, counts as if it always were: an upper bound. The slow paths of divisions and
  square roots are left out.
- **Moved**: each argument that a launch reads or writes, once, of packed rows the columns that it takes. Tensors that
  fit in the L2 cache (50 MB) need not be moved at all, and what several programs read is not counted again. Kernels of
  PyTorch, as the sums of partial gradients, are not counted.
- **Resident warps** fit on a multiprocessor at a time; **waves** are programs over all that are resident at a time.
- **Estimate** for an H100: the largest of three, plus {H100.launch_us:g} µs for each launch. Memory at
  {H100.bytes_per_s / 1e12:g} TB/s; instructions at {H100.multiprocessors} multiprocessors · 4 ·
  {H100.clock / 1e9:g} GHz · {H100.issue:g}; tensor cores at {H100.flops_per_s / 1e12:g} TFLOP/s, half of it in tf32,
  {H100.mma_sync:g} of it by mma.sync (HMMA in the tables; HGMMA is wgmma). The {H100.issue:g} is assumed, not measured:
  the share of cycles in which a scheduler issues an instruction, between 0.45 and 0.55 where matmuls alternate with
  arithmetic and 8 to 16 warps are resident. What a last wave that is partly empty and the latency of few waves cost
  comes on top.
- **Lower bound** and **least**: the bytes and FLOPs of the op's spec at these rates (roofline). **Share** is the lower
  bound over the estimate of all launches.

## Training step

The ops of all layers, forward and backward, and the linear layers at {H100.flops_per_s / 1e12:g} TFLOP/s. Left out:
loss, optimizer, GELU, casts and everything else of PyTorch's.

{_steps(labels)}
## Ops

{_summary(labels)}{details}"""


TRAINING_BATCH = 32
CALLS = {"scale_attention": 1, "mamba2_mixer": 1, "gated_adaln": 3}
"""Of each op in a layer; one adaln comes before the first."""


def _steps(labels: Mapping[str, Sequence[Row]]) -> str:
    rows = []
    for depth in dict.fromkeys(int(row["case"].split()[0][1:]) for row in next(iter(labels.values()))):
        config = ModelConfig(depth=depth, patch_nums=SCHEDULES[256])
        linear = 3 * work(OURS, config, TRAINING_BATCH // ROWS)["linear layers"].flops
        of_ops = [
            sum(
                (depth * CALLS[row["op"]] if row["op"] in CALLS else row["op"] == "adaln") * estimate_us(row) / 1e3
                for row in rows_of_label
                if row["case"] == f"d{depth} training"
            )
            for rows_of_label in labels.values()
        ]
        linear_ms = 1e3 * linear / H100.flops_per_s
        sums = " → ".join(three_digits(ms + linear_ms) for ms in of_ops)
        rows.append((f"d{depth}", " → ".join(map(three_digits, of_ops)), three_digits(linear_ms), sums))
    return table(("batch 32", "ops ms", "linear layers ms", "sum ms"), rows)


def _labels(counted: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    return list(counted["labels"].items())


def _passes(rows: Sequence[Row]) -> dict[Pass, list[Row]]:
    found: dict[Pass, list[Row]] = {}
    for row in rows:
        found.setdefault((row["op"], row["case"], row["pass"]), []).append(row)
    return found


def _summary(labels: Mapping[str, Sequence[Row]]) -> str:
    of_labels = [_passes(rows) for rows in labels.values()]
    keys = dict.fromkeys(key for passes in of_labels for key in passes)
    return table(SUMMARY, (_compared(key, [passes[key] for passes in of_labels if key in passes]) for key in keys))


def _compared(key: Pass, of_labels: Sequence[Sequence[Row]]) -> tuple[str, ...]:
    """A row of the summary, from the pass's launches under each label."""
    last = of_labels[-1][0]
    bound = bound_us(last["op_bytes"], last["op_flops"])

    def each(value: Callable[[Sequence[Row]], str]) -> str:
        return " → ".join(map(value, of_labels))

    return (
        *key,
        each(lambda rows: str(len(rows))),
        each(lambda rows: three_digits(sum(map(_instructions, rows)))),
        each(lambda rows: three_digits(sum(map(_megabytes, rows)))),
        three_digits(last["op_bytes"] / 1e6),
        each(lambda rows: three_digits(sum(map(estimate_us, rows)))),
        three_digits(bound),
        each(lambda rows: f"{bound / sum(map(estimate_us, rows)):.0%}"),
    )


def _launch(row: Row) -> tuple[object, ...]:
    limits = limits_us(row)
    resident = row["resident_warps"] // row["warps"] * H100.multiprocessors
    in_loops = sum(size * times for size, times in row["loops"])
    return (
        row["case"],
        row["pass"],
        row["kernel"].strip("_").removesuffix("_kernel"),
        row["tile"],
        row["programs"],
        three_digits(row["programs"] / resident),
        row["warps"],
        row["registers"],
        row["stack_bytes"],
        f"{row['shared_bytes'] / 1024:.1f}",
        row["resident_warps"],
        three_digits(_instructions(row)),
        f"{in_loops / (row['outside'] + in_loops):.0%}",
        three_digits(_megabytes(row)),
        ", ".join(f"{number} {kind}" for kind, number in row["accesses"].items()),
        ", ".join(row["tensor_core_flops"]) or "–",
        three_digits(estimate_us(row)),
        max(limits, key=limits.__getitem__),
    )


def _instructions(row: Row) -> float:
    return float(row["warp_instructions"] / row["token_heads"])


def _megabytes(row: Row) -> float:
    return float((row["read_bytes"] + row["written_bytes"]) / 1e6)
