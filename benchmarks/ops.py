"""Every op against its rivals, side by side: `python -m benchmarks.ops [op …] [--passes forward backward]`.

On the GPU if there is one, else on the CPU. No answer that is wrong is timed. GPU sides run as CUDA graphs of ten
calls, so that what is timed is the device; a side that waits for the device runs as it is, and is named. Kernels of
other projects that were fetched (peers.py) are timed, too. Rows that this machine and commit have stay until they are
measured anew.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from tqdm import tqdm

from benchmarks import peers, products
from benchmarks.measure import (
    CALLS,
    DEVICE,
    REHEARSAL,
    graphed,
    interleaved,
    kept,
    require_allocator,
    use_own_stream,
    write,
)
from benchmarks.products import DTYPES
from benchmarks.rivals import RIVALS
from mvar_kernels.dispatch import THIRD_PARTY, BackendError, backends
from mvar_kernels.precision import float32_matmuls
from mvar_kernels.testing.check import device_works
from mvar_kernels.testing.contract import prepared
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case, Inputs, Spec

JUDGED_BATCH = 2
FAILED = "MVAR_OPS_FAILED"  # in the environment of a process that goes on for one that has lost its GPU
WRONG = 16  # roundings of the input's dtype that a side may be off by, besides twice what the reference is off by
Results = tuple[Tensor, ...]
Row = dict[str, Any]
Forward = Callable[[Inputs], Results]


def benchmarked(spec: Spec) -> tuple[Case, ...]:
    """The cases to time on this device; in a rehearsal its first one with several elements."""
    if REHEARSAL:
        return spec.cases[1:2]
    return spec.bench if DEVICE.type == "cpu" else spec.bench_cuda


class Run(NamedTuple):
    spec: Spec
    case: Case
    dtype: torch.dtype
    backward: bool


def runs_of(spec: Spec, passes: Sequence[str]) -> list[Run]:
    """The op's cases on this device, in every dtype and pass."""
    cases = benchmarked(spec)
    directions = [name == "backward" for name in passes if name == "forward" or spec.grads]
    return [Run(spec, *rest) for rest in product(cases, DTYPES[DEVICE.type], directions)]


def forwards(spec: Spec, case: Case, inputs: Inputs, *, compiled: bool = True) -> dict[str, Forward]:
    """Our backends that take the op, its rivals, and if wanted torch.compile of the first rival."""
    sides: dict[str, Forward] = {}
    for backend, reason in backends().items():
        if reason is None and backend != "reference":
            try:
                spec.call(inputs, case, backend)
            except BackendError:
                continue
            except Exception:
                pass  # said when the side is checked
            name = backend if backend in THIRD_PARTY else f"mvar {backend}"
            sides[name] = lambda t, backend=backend: spec.call(t, case, backend)  # type: ignore[misc]
    rivals = RIVALS.get(spec.op, {})
    for name, rival in rivals.items():
        if (rival.compiled and not compiled) or (rival.gpu and DEVICE.type == "cpu"):
            continue
        if rival.takes is None or rival.takes(inputs, case):
            sides[name] = lambda t, rival=rival: rival.run(t, case)  # type: ignore[misc]
    # A draw has no deterministic answer to hold the compiled one against.
    if compiled and rivals and spec.op != "sample_tokens":
        first = next(iter(rivals.values()))
        whole = torch.compile(first.run, dynamic=False)
        sides["torch.compile"] = lambda t: whole(t, case)
    return sides


def gradients(spec: Spec, inputs: Inputs, forward: Forward, cotangents: Results) -> Callable[[], Results]:
    """The backward pass alone, of a forward pass done once."""
    leaves = {name: t.detach().requires_grad_(name in spec.grads) for name, t in inputs.items()}
    wanted = [leaves[name] for name in spec.grads if name in leaves]
    with torch.enable_grad():
        outs = forward(leaves)
    return lambda: torch.autograd.grad(outs, wanted, cotangents, retain_graph=True)


def fault(got: Results, same: Results, exact: Results, eps: float) -> str | None:
    """What is wrong with an answer, or None. `same`: the reference in the dtype of `got`."""
    for value, reference, want in zip(got, same, exact, strict=True):
        error, allowed = (float((t.double() - want).abs().max() / want.abs().max()) for t in (value, reference))
        if not error <= WRONG * eps + 2 * allowed:
            return f"off by {error:.1e} of the largest value, the reference by {allowed:.1e}"
    return None


def fault_of_draw(got: Results, expected: Results) -> str | None:
    return None if torch.equal(got[0].cpu(), expected[0].cpu()) else "draws other tokens than the reference"


def preparations(
    spec: Spec, case: Case, inputs: Inputs, cotangents: Results | None, *, compiled: bool
) -> dict[str, Callable[[], Callable[[], Results]]]:
    """What makes a run of each side on these inputs: its forward or, with cotangents, its backward alone."""

    def prepare(forward: Forward) -> Callable[[], Results]:
        return partial(forward, inputs) if cotangents is None else gradients(spec, inputs, forward, cotangents)

    sides = forwards(spec, case, inputs, compiled=compiled)
    return {name: partial(prepare, forward) for name, forward in sides.items()}


def checked(run: Run, *, compiled: bool = True) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The sides whose answer is right, compiled, and what is wrong with the others: not timed.

    Answers are judged at a batch of 2 at most, whose float64 reference a GPU has memory for beside other work.
    """
    spec, case, dtype, backward = run
    judged = case.at_batch(min(case.sizes["B"], JUDGED_BATCH))
    inputs = prepared(spec, judged, dtype, DEVICE, made_on=DEVICE.type)
    doubles = {n: t.double() for n, t in inputs.items()}
    cotangents = _cotangents(spec, judged, inputs) if backward else None
    if cotangents is None:
        same, exact = (spec.reference(t, judged) for t in (inputs, doubles))
    else:
        wide, reference = tuple(t.double() for t in cotangents), partial(_reference, spec, judged)
        same, exact = (gradients(spec, t, reference, c)() for t, c in ((inputs, cotangents), (doubles, wide)))
    makers, wrong = preparations(spec, judged, inputs, cotangents, compiled=compiled), dict[str, str]()
    sides: dict[str, Callable[[], Any]] = {}

    def enter(name: str, judge: Callable[[Results], str | None]) -> None:
        """A side that raises does not stop the others."""
        try:
            call = makers[name]()
            found = judge(call())
        except Exception as error:
            found = first_line(error)
        if found is None:
            sides[name] = call
        else:
            sides.pop(name, None)
            wrong[name] = found
            print(f"{spec.op}, {case.name}: {name}: {found}")

    def judge(name: str, got: Results) -> str | None:
        if spec.op != "sample_tokens":
            return fault(got, same, exact, torch.finfo(dtype).eps)
        # Another's draw has no answer to hold it against.
        return fault_of_draw(got, same) if name.startswith("mvar") else None

    for name in makers:
        enter(name, partial(judge, name))
    if judged.sizes != case.sizes:
        right = list(sides)
        inputs = prepared(spec, case, dtype, DEVICE, made_on=DEVICE.type)
        cotangents = _cotangents(spec, case, inputs) if backward else None
        makers = preparations(spec, case, inputs, cotangents, compiled=compiled)
        for name in right:
            enter(name, lambda got: None)
    return sides, wrong


def _reference(spec: Spec, case: Case, inputs: Inputs) -> Results:
    return spec.reference(inputs, case)


def _cotangents(spec: Spec, case: Case, inputs: Inputs) -> Results:
    """Random numbers in the shapes and dtypes of the outputs, which the reference tells on the meta device."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    outs = spec.reference({n: t.to("meta") for n, t in inputs.items()}, case)
    return tuple(torch.randn(o.shape, generator=generator, device=DEVICE).to(o.dtype) for o in outs)


def row(run: Run, seconds: float, *, compiled: bool = True) -> Row:
    spec, case, dtype, backward = run
    sides, wrong = checked(run, compiled=compiled)
    moved, flops = (spec.work_backward if backward else spec.work)(case, dtype.itemsize)
    sides["copy"] = copy(moved)
    calls = dict.fromkeys(sides, 1)
    uncaptured = [name for name, rival in RIVALS.get(spec.op, {}).items() if rival.waits and name in sides]
    if DEVICE.type == "cuda":
        for name in set(sides) - set(uncaptured):
            try:
                sides[name], calls[name] = graphed(sides[name]), CALLS
            except RuntimeError as error:
                wrong[name] = f"cannot be captured: {error}".splitlines()[0]
                del sides[name]
    median_ms = interleaved(sides, rounds=9, seconds=seconds)
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "backward" if backward else "forward",
        "moved_bytes": moved,
        "flops": flops,
        "median_ms": {name: ms / calls[name] for name, ms in median_ms.items()},
        "uncaptured": uncaptured,
        "wrong": wrong,
    }


def go_on_after(op: str, ops: Sequence[str], failed: Sequence[str]) -> None:
    """With the ops after this one in a new process, which is told what failed."""
    rest = ops[list(ops).index(op) + 1 :]
    if not rest:
        return
    flags = [argument for argument in sys.argv[1:] if argument not in SPECS]
    os.environ[FAILED] = "\n".join(failed)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.ops", *rest, *flags])


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def name(row: Row) -> tuple[str, ...]:
    """Of its case, dtype and pass: unique among an op's."""
    return row["case"], row["dtype"], row["pass"]


def line(op: str, row: Row) -> str:
    times = ", ".join(f"{name} {ms:.4g}" for name, ms in row["median_ms"].items())
    return f"{op}, {row['case']} {row['dtype']} {row['pass']}, ms: {times}"


def copy(moved_bytes: int) -> Callable[[], Tensor]:
    """A copy of as many bytes as the op must move at least, half read and half written: the memory floor."""
    source = torch.ones(moved_bytes // 8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@torch.no_grad()
# On a CPU torch's fastest true float32; on a GPU, where cases are in 16 bits, TF32 for what rivals leave in float32.
@float32_matmuls(DEVICE, fast=True)
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(SPECS)}; default: all")
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on timing each row, at least")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes seconds a row")
    parser.add_argument("--untimed", action="store_true", help="compile and check all sides, so that caches are warm")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(SPECS):
        parser.error(f"unknown ops: {', '.join(sorted(unknown))}")
    require_allocator()
    use_own_stream()
    torch._functorch.config.donated_buffer = False  # a compiled backward is timed many times
    peers.importable()
    failed: list[str] = os.environ.pop(FAILED, "").splitlines()
    if not (options.untimed or REHEARSAL) and kept(products.NAME) is None:
        try:
            products.main()
        except Exception as error:
            failed.append(f"products: {first_line(error)}")
    with peers.short_autotuning() if DEVICE.type == "cuda" else nullcontext():
        for op in options.ops or SPECS:
            rows: dict[tuple[str, ...], Row] = {name(known): known for known in kept(op) or []}
            for run in tqdm(runs_of(SPECS[op], options.passes), desc=op, disable=None):
                torch.compiler.reset()
                try:
                    if options.untimed:
                        checked(run)
                        continue
                    measured = row(run, options.seconds, compiled=not options.eager)
                except Exception as error:  # the rows before and after stand
                    failed.append(f"{op}, {run.case.name}: {first_line(error)}")
                    if not device_works():
                        go_on_after(op, options.ops or list(SPECS), failed)
                    continue
                rows[name(measured)] = measured
                write(op, list(rows.values()))
                tqdm.write(line(op, measured))
                failed += [f"{op}, {run.case.name}: {side}" for side in measured["wrong"] if side.startswith("mvar")]
    if failed:
        raise SystemExit(f"wrong or failed, and not timed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
