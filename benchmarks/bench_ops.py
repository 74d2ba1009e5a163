"""Every op beside its baselines: `python -m benchmarks.bench_ops [op …] [--passes forward backward]`.

On the GPU if there is one, else on the CPU. A wrong answer is not timed. On a GPU calls are timed as CUDA graphs of
ten, so that the device is timed and not the host; a baseline that synchronizes runs eagerly, and the row says so.
Third-party kernels that were fetched (fetch_third_party.py) are timed as well. Rows that this machine and commit have
are kept until they are measured again.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from tqdm import tqdm

from benchmarks.analysis import roofline
from benchmarks.baselines import third_party
from benchmarks.baselines.ops import BASELINES
from benchmarks.common.environment import DEVICE, REHEARSAL, argument_parser, set_allocator
from benchmarks.common.limits import first_line
from benchmarks.common.op_calls import Run, all_forwards, correct_calls, runs_of
from benchmarks.common.results import load, save
from benchmarks.common.timing import CALLS, graphed, interleaved, use_side_stream
from mvar_kernels.precision import float32_matmuls
from mvar_kernels.testing.check import device_works
from mvar_kernels.testing.registry import SPECS

FAILED = "MVAR_OPS_FAILED"  # in the environment of a process that continues one that has lost its GPU
Row = dict[str, Any]


def measure(run: Run, seconds: float, *, compiled: bool = True) -> Row:
    spec, case, dtype, backward = run
    right, wrong = correct_calls(run, partial(all_forwards, compiled=compiled))
    moved, flops = (spec.work_backward if backward else spec.work)(case, dtype.itemsize)
    implementations: dict[str, Callable[[], Any]] = {**right, "copy": roofline.copy(moved)}
    calls = dict.fromkeys(implementations, 1)
    baselines = BASELINES.get(spec.op, {}).items()
    uncaptured = [name for name, baseline in baselines if baseline.synchronizes and name in right]
    if DEVICE.type == "cuda":
        for name in set(implementations) - set(uncaptured):
            try:
                implementations[name], calls[name] = graphed(implementations[name]), CALLS
            except RuntimeError as error:
                wrong[name] = f"cannot be captured: {error}".splitlines()[0]
                del implementations[name]
    median_ms = interleaved(implementations, rounds=9, seconds=seconds)
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": run.direction,
        "moved_bytes": moved,
        "flops": flops,
        "median_ms": {name: ms / calls[name] for name, ms in median_ms.items()},
        "uncaptured": uncaptured,
        "wrong": wrong,
    }


def key(row: Row) -> tuple[str, ...]:
    """Case, dtype and pass: unique among an op's rows."""
    return row["case"], row["dtype"], row["pass"]


def continue_after(op: str, ops: Sequence[str], failed: Sequence[str]) -> None:
    """Run the ops after this one in a new process, which is given what failed."""
    if rest := ops[list(ops).index(op) + 1 :]:
        flags = [argument for argument in sys.argv[1:] if argument not in SPECS]
        os.environ[FAILED] = "\n".join(failed)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.bench_ops", *rest, *flags])


@torch.no_grad()
# On a CPU torch's fastest true float32; on a GPU, where cases are in 16 bits, TF32 for what baselines leave in float32.
@float32_matmuls(DEVICE, fast=True)
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(SPECS)}; default: all")
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per row, at least (default: 2)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes seconds per row")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(SPECS):
        parser.error(f"unknown ops: {', '.join(sorted(unknown))}")
    set_allocator()
    use_side_stream()
    torch._functorch.config.donated_buffer = False  # a compiled backward is timed many times
    third_party.add_to_path()
    failed: list[str] = os.environ.pop(FAILED, "").splitlines()
    if not REHEARSAL and load(roofline.NAME) is None:
        try:
            roofline.save_rates()
        except Exception as error:
            failed.append(f"products: {first_line(error)}")
    with third_party.short_autotuning() if DEVICE.type == "cuda" else nullcontext():
        for op in options.ops or SPECS:
            rows: dict[tuple[str, ...], Row] = {key(known): known for known in load(op) or []}
            for run in tqdm(runs_of(SPECS[op], options.passes), desc=op, disable=None):
                torch.compiler.reset()
                try:
                    row = measure(run, options.seconds, compiled=not options.eager)
                except Exception as error:  # other rows are not affected
                    failed.append(f"{op}, {run.case.name}: {first_line(error)}")
                    if not device_works():
                        continue_after(op, options.ops or list(SPECS), failed)
                    continue
                rows[key(row)] = row
                save(op, list(rows.values()))
                times = ", ".join(f"{name} {ms:.4g}" for name, ms in row["median_ms"].items())
                tqdm.write(f"{op}, {' '.join(key(row))}, ms: {times}")
                failed += [f"{op}, {run.case.name}: {name}" for name in row["wrong"] if name.startswith("mvar")]
    if failed:
        raise SystemExit(f"wrong or failed, and not timed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
