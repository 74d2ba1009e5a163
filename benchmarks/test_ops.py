"""Each op, case, dtype and backend under pytest-benchmark: `pytest benchmarks --benchmark-only -k adaln`.

The cases and the check of each answer are those of bench_ops. `--benchmark-save` and `--benchmark-compare` compare two
states of a kernel; published numbers come from bench_ops, which interleaves.
"""

from typing import Any

import pytest
import torch

from benchmarks.common.environment import DEVICE
from benchmarks.common.op_calls import Forward, Run, correct_calls, runs_of
from mvar_kernels.dispatch import NAMES, unavailable
from mvar_kernels.precision import float32_matmuls
from mvar_kernels.testing.contract import differentiable
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case, Inputs, Spec

pytest.importorskip("pytest_benchmark")
RUNS = [
    pytest.param(run, backend, id=f"{op}-{run.case.name}-{str(run.dtype)[6:]}-{backend}-{run.direction}")
    for op, spec in SPECS.items()
    for run in runs_of(spec, ("forward", "backward"))
    for backend in NAMES[1:]  # without "auto", which is one of the others
]


@pytest.mark.parametrize(("run", "backend"), RUNS)
def test_op(benchmark: Any, run: Run, backend: str) -> None:
    benchmark.group = run.spec.op
    if reason := unavailable(backend):
        pytest.skip(reason)
    if run.backward and not differentiable(run.spec, backend):
        pytest.skip(f"{run.spec.op} has no backward kernel")

    def forwards(spec: Spec, case: Case, inputs: Inputs) -> dict[str, Forward]:
        return {f"mvar {backend}": lambda t: spec.call(t, case, backend)}

    with torch.no_grad(), float32_matmuls(DEVICE, fast=True):
        right, wrong = correct_calls(run, forwards)
        for fault in wrong.values():
            (pytest.skip if fault.startswith("BackendError") else pytest.fail)(fault)
        (call,) = right.values()

        def synchronized() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(synchronized)
