"""Check an op on a backend in a dtype: `python -m mvar_kernels.testing.check [options] OP BACKEND DTYPE CASE …`.

Run in a process of its own, as a faulty kernel can end the process. Prints the name of each case when it starts and its
`Result` as a line of JSON when it is done, each flushed, so that the parent process knows which case ended the process.
Exit status `BROKEN`: the GPU no longer works in this process, and the cases after the last line were not run.
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

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by torch.use_deterministic_algorithms

import torch
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.dispatch import BackendError, interpreted
from mvar_kernels.testing.contract import LAYOUTS, cotangents, device_of, error_ratios, evaluate, prepared
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case, Inputs, Spec

BROKEN = 99
PR_SET_PDEATHSIG = 1  # of prctl(2)
STARTS = "starts: "


@dataclass(frozen=True)
class Result:
    """The result of one case.

    shares: error / tolerance of each output and gradient, infinite for a wrong shape or dtype or a value that is not
    finite. fault: what else is wrong. refused: why the backend does not support the case. compiled, cached: how many
    Triton kernels were compiled, and how many were in Triton's cache.
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
        """The largest error / tolerance; infinite if there is a fault."""
        return math.inf if self.fault is not None else max(self.shares.values(), default=0.0)

    @property
    def right(self) -> bool:
        return self.worst <= 1


@dataclass(frozen=True)
class CheckOptions:
    """How a case is checked.

    reruns: of the same inputs, whose results must be identical. layouts: of the inputs, besides their own.
    cuda_graph: replay the forward from a CUDA graph, too. reference_on_device: compute the reference on the kernel's
    device instead of the CPU, which saves seconds in large cases.
    """

    reruns: int = 1
    layouts: Sequence[Callable[[Tensor], Tensor]] = LAYOUTS
    cuda_graph: bool = False
    reference_on_device: bool = False


def compare(
    spec: Spec, case: Case, backend: str, dtype: torch.dtype, options: CheckOptions
) -> tuple[dict[str, float], str | None]:
    """error / tolerance of all outputs and gradients in every layout of the inputs, and a fault or None."""
    device = device_of(backend)
    inputs = prepared(spec, case, dtype, device, made_on=device.type if options.reference_on_device else "cpu")
    originals = {n: t.clone() for n, t in inputs.items()}
    of_reference = {n: t if options.reference_on_device else t.cpu() for n, t in inputs.items()}
    same = evaluate(spec, case, of_reference, None)
    exact = evaluate(spec, case, {n: t.double() for n, t in of_reference.items()}, None)
    got = evaluate(spec, case, inputs, backend)
    ratios, faults = error_ratios(spec, case, got, same, exact), []
    grads = cotangents(case, [got[name] for name in spec.outputs]) if options.reruns else None
    for run in range(options.reruns):
        again = evaluate(spec, case, inputs, backend, grads)
        if differ := [n for n in got if not torch.equal(got[n], again[n])]:
            faults.append(f"another answer in run {run + 2}: {', '.join(differ)}")
            break
    for layout in options.layouts:
        other = evaluate(spec, case, {n: layout(t) for n, t in inputs.items()}, backend)
        found = error_ratios(spec, case, other, same, exact)
        ratios |= {f"{n}, {layout.__name__}": ratio for n, ratio in found.items()}
    if options.cuda_graph:
        replayed = _replayed(spec, case, inputs, backend)
        if differ := [n for n in replayed if not torch.equal(got[n], replayed[n])]:
            faults.append(f"another answer from a CUDA graph: {', '.join(differ)}")
    if written := [n for n, t in inputs.items() if not torch.equal(t, originals[n])]:
        faults.append(f"inputs written to: {', '.join(written)}")
    return ratios, "; ".join(faults) or None


def _replayed(spec: Spec, case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """The outputs of a CUDA graph's second replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            outs = spec.call(inputs, case, backend)
        for _ in range(2):
            graph.replay()
    return dict(zip(spec.outputs, outs, strict=True))


def check_case(
    spec: Spec, case: Case, backend: str, dtype: torch.dtype, options: CheckOptions = CheckOptions()
) -> tuple[Result, bool]:
    """The case's result, whatever is raised, and whether the device still works."""
    start, ratios, fault, refused, works = time.monotonic(), dict[str, float](), None, None, True
    cache_hits = _record_cache_hits() if backend == "triton" else []
    try:
        ratios, fault = compare(spec, case, backend, dtype, options)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except BackendError as error:
        refused = str(error)
    except Exception as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        works = device_works()
    name = str(dtype).removeprefix("torch.")
    result = Result(spec.op, backend, name, case.name, ratios, fault, refused, time.monotonic() - start)
    return replace(result, compiled=cache_hits.count(False), cached=cache_hits.count(True)), works


def _record_cache_hits() -> list[bool]:
    """A list to which Triton appends, for each kernel from now on, whether it was in Triton's cache."""
    from triton import knobs

    hits: list[bool] = []

    def record(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    knobs.compilation.listener = record
    return hits


def benchmark_cases(spec: Spec) -> tuple[Case, ...]:
    """The cases of the GPU's benchmarks, at a batch of 2."""
    return tuple(case.at_batch(2) for case in spec.bench_cuda)


def device_works() -> bool:
    """Whether the GPU still works in this process: after an illegal access it never does again."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def end_with_parent() -> None:
    """On Linux: have this process killed when its parent process ends."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark-cases", action="store_true", help="cases of the GPU's benchmarks, at batch 2")
    parser.add_argument("--reruns", type=int, default=1, metavar="N", help="runs to compare bit by bit (default: 1)")
    parser.add_argument("--cuda-graph", action="store_true", help="replay the forward from a CUDA graph, too")
    parser.add_argument("--stages", type=int, metavar="N", help="of the software pipeline of every Triton kernel")
    parser.add_argument("op", choices=SPECS)
    parser.add_argument("backend")
    parser.add_argument("dtype", help="such as bfloat16")
    parser.add_argument("cases", nargs="+", metavar="case", help="names in the op's spec.py")
    args = parser.parse_args()
    end_with_parent()
    spec = SPECS[args.op]
    cases = {case.name: case for case in (benchmark_cases(spec) if args.benchmark_cases else spec.cases)}
    if args.backend == "triton" and interpreted():  # takes seconds, and is deterministic
        options = CheckOptions(reruns=0, layouts=())
    else:
        options = CheckOptions(
            args.reruns,
            layouts=() if args.benchmark_cases else LAYOUTS,
            cuda_graph=args.cuda_graph and torch.cuda.is_available(),
            # Sampled tokens are compared with the CPU's.
            reference_on_device=args.benchmark_cases and bool(spec.grads),
        )
    if args.stages is not None:
        chosen = tiling.chosen
        tiling.chosen = lambda *arguments: replace(chosen(*arguments), stages=args.stages)
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN, so that unwritten outputs are noticed
    for name in args.cases:
        print(f"{STARTS}{name}", flush=True)
        result, works = check_case(spec, cases[name], args.backend, getattr(torch, args.dtype), options)
        print(json.dumps(asdict(result)), flush=True)
        if not works:
            sys.exit(BROKEN)


if __name__ == "__main__":
    main()
