"""Hold one op on one backend in one dtype to the contract: `python -m mvar_kernels.check OP BACKEND DTYPE CASE …`.

A process of its own, for a fault in a kernel can end it. It prints a case's name when it begins and a line of JSON (see
`Row`) when it is done, each at once, so that whoever started it knows where it ended. Exit status `BROKEN`: the GPU
answers no more to this process, and the cases after the last row were not tried.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's deterministic algorithms, below

import torch

from mvar_kernels.backends import BackendError, interpreted
from mvar_kernels.catalogue import SPECS
from mvar_kernels.contract import LAYOUTS, device_of, evaluate, prepared, shares
from mvar_kernels.specs import Case, Spec

BROKEN = 99
BEGINS = "begins: "


@dataclass(frozen=True)
class Row:
    """What came of one case.

    shares: the share of its tolerance that each output and gradient uses up, infinite for what is wrong altogether.
    fault: what else is wrong; refused: why the backend does not take the case.
    """

    op: str
    backend: str
    dtype: str
    case: str
    shares: Mapping[str, float] = field(default_factory=dict)
    fault: str | None = None
    refused: str | None = None
    seconds: float = 0.0

    @property
    def worst(self) -> float:
        """The largest share; infinite where there is a fault."""
        return math.inf if self.fault is not None else max(self.shares.values(), default=0.0)

    @property
    def right(self) -> bool:
        return self.worst <= 1


def check(spec: Spec, case: Case, backend: str, dtype: torch.dtype) -> tuple[dict[str, float], str | None]:
    """The shares of tolerance of all outputs and gradients, in every layout of the inputs, and a fault or None."""
    inputs = prepared(spec, case, dtype, device_of(backend))
    originals = {n: t.clone() for n, t in inputs.items()}
    on_cpu = {n: t.cpu() for n, t in inputs.items()}
    same = evaluate(spec, case, on_cpu, None)
    exact = evaluate(spec, case, {n: t.double() for n, t in on_cpu.items()}, None)
    got = evaluate(spec, case, inputs, backend)
    found, faults = shares(spec, got, same, exact), []
    if not (backend == "triton" and interpreted()):  # a run takes seconds there, and has one answer
        again = evaluate(spec, case, inputs, backend)
        if differ := [n for n in got if not torch.equal(got[n], again[n])]:
            faults.append(f"another answer in a second run: {', '.join(differ)}")
        for layout in LAYOUTS:
            moved = evaluate(spec, case, {n: layout(t) for n, t in inputs.items()}, backend)
            found |= {f"{n}, {layout.__name__}": share for n, share in shares(spec, moved, same, exact).items()}
    if written := [n for n, t in inputs.items() if not torch.equal(t, originals[n])]:
        faults.append(f"inputs written to: {', '.join(written)}")
    return found, "; ".join(faults) or None


def tried(spec: Spec, case: Case, backend: str, dtype: torch.dtype) -> tuple[Row, bool]:
    """The case's row, whatever is raised, and whether the device still answers."""
    start, found, fault, refused, answers = time.monotonic(), dict[str, float](), None, None, True
    try:
        found, fault = check(spec, case, backend, dtype)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except BackendError as error:
        refused = str(error)
    except Exception as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        answers = _answers()
    name = str(dtype).removeprefix("torch.")
    return Row(spec.op, backend, name, case.name, found, fault, refused, time.monotonic() - start), answers


def _answers() -> bool:
    """Whether the GPU still does what it is asked: after an illegal access it never again does in this process."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=SPECS)
    parser.add_argument("backend")
    parser.add_argument("dtype", help="such as bfloat16")
    parser.add_argument("cases", nargs="+", metavar="case", help="names in the op's spec.py")
    options = parser.parse_args()
    spec = SPECS[options.op]
    cases = {case.name: case for case in spec.cases}
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN, so that an unwritten output shows
    for name in options.cases:
        print(f"{BEGINS}{name}", flush=True)
        row, answers = tried(spec, cases[name], options.backend, getattr(torch, options.dtype))
        print(json.dumps(asdict(row)), flush=True)
        if not answers:
            sys.exit(BROKEN)


if __name__ == "__main__":
    main()
