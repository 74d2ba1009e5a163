"""Check an op on a backend in a dtype: `python -m mvar_kernels.testing.check [options] OP BACKEND DTYPE CASE …`.

Run in a process of its own, as a faulty kernel can end the process. Prints the name of each case when it starts and a
line of JSON (see `Row`) when it is done, each flushed, so that the parent process knows which case ended the process.
Exit status `BROKEN`: the GPU no longer works in this process, and the cases after the last row were not run.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's deterministic algorithms, below

import torch
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.dispatch import BackendError, interpreted
from mvar_kernels.testing.contract import LAYOUTS, cotangents, device_of, evaluate, prepared, shares
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case, Inputs, Spec

BROKEN = 99
PR_SET_PDEATHSIG = 1  # of prctl(2)
BEGINS = "begins: "


@dataclass(frozen=True)
class Row:
    """What came of one case.

    shares: the share of its tolerance that each output and gradient uses up, infinite for what is wrong altogether.
    fault: what else is wrong; refused: why the backend does not take the case. compiled, cached: Triton kernels that
    were compiled for it, and that were found in Triton's cache.
    """

    op: str
    backend: str
    dtype: str
    case: str
    shares: Mapping[str, float] = field(default_factory=dict)
    fault: str | None = None
    refused: str | None = None
    seconds: float = 0.0
    compiled: int = 0
    cached: int = 0

    @property
    def worst(self) -> float:
        """The largest share; infinite where there is a fault."""
        return math.inf if self.fault is not None else max(self.shares.values(), default=0.0)

    @property
    def right(self) -> bool:
        return self.worst <= 1


@dataclass(frozen=True)
class How:
    """How a case is tried: how often it is run again for the same bits, in which layouts of the inputs besides its own,
    whether its forward is also replayed from a CUDA graph, and whether the reference runs beside the kernel, which for
    large cases saves seconds, and not on the CPU."""

    again: int = 1
    layouts: Sequence[Callable[[Tensor], Tensor]] = LAYOUTS
    graph: bool = False
    reference_beside: bool = False


def check(spec: Spec, case: Case, backend: str, dtype: torch.dtype, how: How) -> tuple[dict[str, float], str | None]:
    """The shares of tolerance of all outputs and gradients, in every layout of the inputs, and a fault or None."""
    device = device_of(backend)
    inputs = prepared(spec, case, dtype, device, made_on=device.type if how.reference_beside else "cpu")
    originals = {n: t.clone() for n, t in inputs.items()}
    read = {n: t if how.reference_beside else t.cpu() for n, t in inputs.items()}
    same = evaluate(spec, case, read, None)
    exact = evaluate(spec, case, {n: t.double() for n, t in read.items()}, None)
    got = evaluate(spec, case, inputs, backend)
    found, faults = shares(spec, got, same, exact), []
    given = cotangents(case, [got[name] for name in spec.outputs]) if how.again else None
    for run in range(how.again):
        again = evaluate(spec, case, inputs, backend, given)
        if differ := [n for n in got if not torch.equal(got[n], again[n])]:
            faults.append(f"another answer in run {run + 2}: {', '.join(differ)}")
            break
    for layout in how.layouts:
        moved = evaluate(spec, case, {n: layout(t) for n, t in inputs.items()}, backend)
        found |= {f"{n}, {layout.__name__}": share for n, share in shares(spec, moved, same, exact).items()}
    if how.graph:
        replayed = _replayed(spec, case, inputs, backend)
        if differ := [n for n in replayed if not torch.equal(got[n], replayed[n])]:
            faults.append(f"another answer from a CUDA graph: {', '.join(differ)}")
    if written := [n for n, t in inputs.items() if not torch.equal(t, originals[n])]:
        faults.append(f"inputs written to: {', '.join(written)}")
    return found, "; ".join(faults) or None


def _replayed(spec: Spec, case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """The outputs of a CUDA graph's second replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            outs = spec.call(inputs, case, backend)
        for _ in range(2):
            graph.replay()
    return dict(zip(spec.outputs, outs, strict=True))


def tried(spec: Spec, case: Case, backend: str, dtype: torch.dtype, how: How = How()) -> tuple[Row, bool]:
    """The case's row, whatever is raised, and whether the device still answers."""
    start, found, fault, refused, answers = time.monotonic(), dict[str, float](), None, None, True
    hits = _noted() if backend == "triton" else []
    try:
        found, fault = check(spec, case, backend, dtype, how)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except BackendError as error:
        refused = str(error)
    except Exception as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        answers = device_answers()
    name = str(dtype).removeprefix("torch.")
    row = Row(spec.op, backend, name, case.name, found, fault, refused, time.monotonic() - start)
    return replace(row, compiled=hits.count(False), cached=hits.count(True)), answers


def _noted() -> list[bool]:
    """A list that gets, for each kernel that Triton prepares from now on, whether its cache had it."""
    from triton import knobs

    hits: list[bool] = []

    def note(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    knobs.compilation.listener = note
    return hits


def timed(spec: Spec) -> tuple[Case, ...]:
    """What is timed on a GPU, at a batch of 2."""
    return tuple(case.at_batch(2) for case in spec.bench_cuda)


def device_answers() -> bool:
    """Whether the GPU still does what it is asked: after an illegal access it never again does in this process."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends in whatever way, on Linux."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timed", action="store_true", help="cases of the GPU's benchmarks, at batch 2")
    parser.add_argument("--again", type=int, default=1, metavar="N", help="more runs, of the same bits (default: 1)")
    parser.add_argument("--graph", action="store_true", help="replay the forward from a CUDA graph, too")
    parser.add_argument("--stages", type=int, metavar="N", help="of the software pipeline of every Triton kernel")
    parser.add_argument("op", choices=SPECS)
    parser.add_argument("backend")
    parser.add_argument("dtype", help="such as bfloat16")
    parser.add_argument("cases", nargs="+", metavar="case", help="names in the op's spec.py")
    options = parser.parse_args()
    end_with_parent()
    spec = SPECS[options.op]
    cases = {case.name: case for case in (timed(spec) if options.timed else spec.cases)}
    # Interpreted, a run takes seconds, and one program after the other has one answer.
    once = options.backend == "triton" and interpreted()
    graph = options.graph and torch.cuda.is_available()
    # A sampled token has to be the CPU's.
    beside = options.timed and bool(spec.grads)
    how = How(options.again, () if options.timed else LAYOUTS, graph, beside)
    how = How(again=0, layouts=()) if once else how
    if options.stages is not None:
        chosen = tiling.chosen
        tiling.chosen = lambda *asked: replace(chosen(*asked), stages=options.stages)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN, so that an unwritten output shows
    for name in options.cases:
        print(f"{BEGINS}{name}", flush=True)
        row, answers = tried(spec, cases[name], options.backend, getattr(torch, options.dtype), how)
        print(json.dumps(asdict(row)), flush=True)
        if not answers:
            sys.exit(BROKEN)


if __name__ == "__main__":
    main()
