"""Every op against its rivals, side by side: `python -m benchmarks.ops [op …]`. Forward."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import interleaved, require_allocator, write
from benchmarks.rivals import RIVALS
from mvar_kernels.backends import BackendError, backends
from mvar_kernels.ops.adaln.spec import SPECS as ADALN
from mvar_kernels.ops.mamba2.spec import SPECS as MAMBA2
from mvar_kernels.ops.sample_tokens.spec import SPECS as SAMPLE
from mvar_kernels.ops.scale_attention.spec import SPECS as ATTENTION
from mvar_kernels.specs import Case, Inputs, Spec

SPECS = (*ADALN, *ATTENTION, *MAMBA2, *SAMPLE)
DTYPES = (torch.float32, torch.bfloat16)
WRONG = 16  # roundings of the input's dtype, at the output's largest value, that no side may be off by


def sides_of(spec: Spec, case: Case, inputs: Inputs) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Our backends that take the op, its rivals, and torch.compile of the first rival."""
    sides: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for backend, reason in backends().items():
        if reason is None and backend != "reference":
            try:
                spec.call(inputs, case, backend)
            except BackendError:
                continue
            sides[f"mvar {backend}"] = lambda backend=backend: spec.call(inputs, case, backend)  # type: ignore[misc]
    rivals = RIVALS.get(spec.op, {})
    for name, rival in rivals.items():
        sides[name] = lambda rival=rival: rival(inputs, case)  # type: ignore[misc]
    if rivals and spec.op != "sample_tokens":  # a draw has no deterministic answer to hold the compiled one against
        compiled = torch.compile(next(iter(rivals.values())), dynamic=False)
        sides["torch.compile"] = lambda: compiled(inputs, case)
    return sides


def check(spec: Spec, case: Case, inputs: Inputs, sides: dict[str, Any]) -> None:
    """Refuse to time a wrong answer: every side against the float64 reference (drawn tokens: ours, exactly)."""
    if spec.op == "sample_tokens":
        expected = spec.reference(inputs, case)[0]
        for name, run in sides.items():
            if name.startswith("mvar") and not torch.equal(run()[0], expected):
                raise SystemExit(f"{spec.op}, {case.name}: {name} draws other tokens than the reference")
        return
    exact = spec.reference({n: t.double() for n, t in inputs.items()}, case)
    eps = torch.finfo(next(iter(inputs.values())).dtype).eps
    for name, run in sides.items():
        for got, want in zip(run(), exact, strict=True):
            error = float((got.double() - want).abs().max() / want.abs().max())
            if not error <= WRONG * eps:
                raise SystemExit(f"{spec.op}, {case.name}: {name} is off by {error:.1e}")


def copy(moved_bytes: int) -> Callable[[], Tensor]:
    """A copy of as many bytes as the op must move at least, half read and half written: the memory floor."""
    source = torch.ones(moved_bytes // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@torch.no_grad()
def main() -> None:
    require_allocator()
    torch.set_float32_matmul_precision("medium")  # torch's better float32 products on the CPU, for every side
    chosen = sys.argv[1:] or [spec.op for spec in SPECS if spec.bench]
    if unknown := set(chosen) - {spec.op for spec in SPECS}:
        raise SystemExit(f"unknown ops: {', '.join(sorted(unknown))}")
    runs = [(s, c, d) for s in SPECS if s.op in chosen for c in s.bench for d in DTYPES]
    for op in chosen:
        rows = []
        for spec, case, dtype in tqdm([r for r in runs if r[0].op == op], desc=op, disable=None):
            generator = torch.Generator().manual_seed(0)
            inputs = {
                n: t.to(torch.float32 if n in spec.keeps_dtype else dtype)
                for n, t in spec.inputs(case, generator).items()
            }
            sides = sides_of(spec, case, inputs)
            check(spec, case, inputs, sides)
            moved, flops = spec.work(case, dtype.itemsize)
            rows.append(
                {
                    "case": case.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "moved_bytes": moved,
                    "flops": flops,
                    "median_ms": interleaved(sides | {"copy": copy(moved)}, rounds=9, seconds=2.0),
                }
            )
        print(write(f"cpu/{op}", rows))
        for row in rows:
            times = ", ".join(f"{name} {ms:.3f}" for name, ms in row["median_ms"].items())
            print(f"  {row['case']} {row['dtype']}, ms: {times}")


if __name__ == "__main__":
    main()
