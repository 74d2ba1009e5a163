"""Contract test of every op, backend, case and dtype, generated from the specs.

The tolerance is that of mvar_kernels/testing/contract.py. Without a GPU, Triton kernels run in Triton's interpreter and
CUDA kernels run on the CPU (tests/helpers/cuda_on_cpu).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from mvar_kernels.dispatch import OPS, THIRD_PARTY, Op, backends, interpreted
from mvar_kernels.testing import contract
from mvar_kernels.testing.contract import every_other, transposed
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case, Inputs, Spec
from tests.helpers import cuda_on_cpu
from tests.helpers.dispatched import dispatched

CUDA_ON_CPU = "cuda-on-cpu"
AVAILABLE = [name for name, reason in backends().items() if reason is None]
if not torch.cuda.is_available():
    AVAILABLE.append(CUDA_ON_CPU)
OPERATORS = {name: getattr(torch.ops.mvar, name).default for name in SPECS}


@contextmanager
def named(backend: str) -> Iterator[str]:
    """Yield the value of an op's `backend` argument that selects the backend."""
    if backend != CUDA_ON_CPU:
        yield backend
        return
    with cuda_on_cpu.installed():
        yield "cuda"


class ReasonFound(Exception):
    """Raised in place of running an op's kernel."""


def refusal(spec: Spec, backend: str, dtype: torch.dtype, case: Case) -> str | None:
    """Return why the backend does not support this case and dtype, or None, without running a kernel."""

    def ask(op: Op, name: str, device: torch.device, *inputs: Any, backward: bool = False) -> NoReturn:
        raise ReasonFound(op.unsupported_reason(name, device, *inputs, backward=backward))

    with named(backend) as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "choose", ask)
        try:
            spec.call(prepared(spec, case, dtype, backend), case, name)
        except ReasonFound as answer:
            return answer.args[0]
    raise AssertionError(f"{spec.op} did not ask which kernel to use")


def interprets(backend: str) -> bool:
    return backend == "triton" and interpreted()


def prepared(spec: Spec, case: Case, dtype: torch.dtype, backend: str = "reference") -> Inputs:
    """The case's inputs on the backend's device."""
    return contract.prepared(spec, case, dtype, contract.device_of(backend))


def evaluate(spec: Spec, case: Case, inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
    """Outputs and gradients; backend None is the plain PyTorch reference."""
    with named(backend or "reference") as name:
        return contract.evaluate(spec, case, inputs, backend and name)


def identity(spec: Spec, backend: str, case: Case, dtype: torch.dtype) -> str:
    return f"{spec.op}-{backend}-{case.name}-{str(dtype).removeprefix('torch.')}"


def params() -> Iterator[object]:
    for spec in SPECS.values():
        for backend in AVAILABLE:
            for dtype in spec.dtypes:
                # A backend that supports the first case must support all of them; these backends may support only some.
                partial = backend in (*THIRD_PARTY, "cuda", CUDA_ON_CPU)
                offered = partial or refusal(spec, backend, dtype, spec.cases[0]) is None
                for case in spec.cases if offered else ():
                    if not partial or refusal(spec, backend, dtype, case) is None:
                        name = identity(spec, backend, case, dtype)
                        slow = backend == CUDA_ON_CPU or (interprets(backend) and case is not spec.cases[0])
                        marks = pytest.mark.slow if slow else ()
                        yield pytest.param(spec, case, backend, dtype, id=name, marks=marks)


PARAMS = list(params())


def compare(
    spec: Spec,
    case: Case,
    got: dict[str, Tensor],
    same: dict[str, Tensor],
    exact: dict[str, Tensor],
    inputs: torch.dtype | None = None,
) -> None:
    assert got.keys() <= same.keys() == exact.keys() and set(spec.outputs) <= got.keys()
    ratios = contract.error_ratios(spec, case, got, same, exact, inputs)
    assert all(ratio <= 1 for ratio in ratios.values()), f"error over tolerance: {ratios}"


@pytest.mark.parametrize(("spec", "case", "backend", "dtype"), PARAMS)
def test_agrees_with_float64(spec: Spec, case: Case, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    inputs = prepared(spec, case, dtype, backend)
    # A run in Triton's interpreter takes seconds, so there is one per case and dtype: strided in float32, contiguous in
    # other dtypes. The interpreter runs programs sequentially on one thread, which is deterministic.
    slow = interprets(backend)
    if slow and dtype == torch.float32:
        inputs = {n: scattered(t) for n, t in inputs.items()}
    originals = {n: t.clone() for n, t in inputs.items()}
    got = evaluate(spec, case, inputs, backend)
    if not slow:
        again = evaluate(spec, case, inputs, backend)
        assert all(torch.equal(got[n], again[n]) for n in got), "not the same answer twice"
    assert all(torch.equal(inputs[n], originals[n]) for n in inputs), "an input was written to"
    on_cpu = {n: t.cpu() for n, t in inputs.items()}
    same = evaluate(spec, case, on_cpu, None)
    exact = evaluate(spec, case, {n: t.double() for n, t in on_cpu.items()}, None)
    compare(spec, case, got, same, exact)
    for layout in () if slow else (every_other, transposed):
        compare(spec, case, evaluate(spec, case, {n: layout(t) for n, t in inputs.items()}, backend), same, exact)


def scattered(t: Tensor) -> Tensor:
    """The same values with every stride doubled and the memory order reversed."""
    backwards = tuple(range(t.dim())[::-1])
    return every_other(t.permute(backwards)).permute(backwards)


def compiled() -> Iterator[object]:
    """Two cases of each op in float32, without interpreted kernels: the tests check the code around the kernel."""
    for p in PARAMS:
        spec, case, backend, dtype = p.values  # type: ignore[attr-defined]
        slow = backend == CUDA_ON_CPU or interprets(backend)
        if not slow and dtype == torch.float32 and case in spec.cases[1:3]:
            yield pytest.param(spec, case, backend, dtype, id=p.id)  # type: ignore[attr-defined]


COMPILED = list(compiled())


@pytest.mark.parametrize(("spec", "case", "backend", "dtype"), COMPILED)
def test_opcheck(spec: Spec, case: Case, backend: str, dtype: torch.dtype) -> None:
    """Checks the schema, fake tensors, autograd registration and AOT tracing with the arguments that the op passes."""
    wanted = contract.differentiable(spec, backend)
    inputs = {n: t.requires_grad_(n in wanted) for n, t in prepared(spec, case, dtype, backend).items()}
    arguments = dispatched(spec.op, lambda: spec.call(inputs, case, backend))[spec.op]
    assert any(isinstance(t, Tensor) and t.requires_grad for t in arguments) == bool(wanted)
    torch.library.opcheck(OPERATORS[spec.op], arguments)


@pytest.mark.parametrize(("spec", "case", "backend", "dtype"), COMPILED)
def test_compile_fullgraph(spec: Spec, case: Case, backend: str, dtype: torch.dtype) -> None:
    """torch.compile(fullgraph=True) of the public function gives the same outputs and gradients as eager mode."""
    inputs = prepared(spec, case, dtype, backend)
    torch.compiler.reset()
    compiled = torch.compile(lambda t: spec.call(t, case, backend), fullgraph=True, backend="aot_eager")
    eager = evaluate(spec, case, inputs, backend)

    class Compiled:
        call = staticmethod(lambda t, case, backend: compiled(t))
        op, outputs, grads = spec.op, spec.outputs, spec.grads

    got = evaluate(Compiled, case, inputs, backend)  # type: ignore[arg-type]
    assert all(torch.equal(got[n], eager[n]) for n in eager)


@pytest.mark.parametrize("op", SPECS)
def test_make_fx_symbolic(op: str) -> None:
    """make_fx of the public function and of its gradients gives the same results as eager mode."""
    from torch.fx.experimental.proxy_tensor import make_fx  # imports sympy

    spec = SPECS[op]
    case = spec.cases[1]
    inputs = prepared(spec, case, torch.float32)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        leaves = {n: t.detach().requires_grad_(n in spec.grads) for n, t in inputs.items()}
        outs = spec.call(leaves, case, "auto")
        wanted = [t for t in leaves.values() if t.requires_grad]
        return (*outs, *(torch.autograd.grad([out.sum() for out in outs], wanted) if wanted else ()))

    traced = make_fx(run, tracing_mode="symbolic")(inputs)
    for got, right in zip(traced(inputs), run(inputs), strict=True):
        torch.testing.assert_close(got, right)


def test_every_op_has_a_reference_and_a_spec() -> None:
    forwards = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mvar::")}
    assert {n for n in forwards if not n.endswith("_backward")} == set(SPECS)
    assert {p.values[0].op for p in PARAMS if p.values[2] == "reference"} == set(SPECS)  # type: ignore[attr-defined]


# The C++ kernels do not support float16, and Triton's interpreter computes bfloat16 incorrectly.
NOT_OFFERED = {("cpu", torch.float16), *([("triton", torch.bfloat16)] if interpreted() else [])}


def test_kernels_support_every_case() -> None:
    """Otherwise a backend that wrongly reports a case as unsupported would drop out of the tests above silently."""
    offered = {p.id for p in PARAMS}  # type: ignore[attr-defined]
    for spec in SPECS.values():
        for backend in {"reference", "cpu", "triton"}.intersection(AVAILABLE, OPS[spec.op].modules):
            for dtype in spec.dtypes:
                if (backend, dtype) not in NOT_OFFERED:
                    assert {identity(spec, backend, case, dtype) for case in spec.cases} <= offered


@pytest.mark.parametrize("op", SPECS)
def test_case_names_and_work(op: str) -> None:
    spec = SPECS[op]
    assert len({case.name for case in spec.cases}) == len(spec.cases)
    for case in spec.cases:
        moved, flops = spec.work(case, 2)
        doubled, same_flops = spec.work(case, 4)
        assert moved > 0 and flops > 0 and doubled > moved and same_flops == flops
