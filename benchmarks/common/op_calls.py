"""The calls of an op that benchmarks time: mvar's backends and the baselines, each with its answer checked first."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.analysis.roofline import DTYPES
from benchmarks.baselines.ops import BASELINES
from benchmarks.common.environment import DEVICE, REHEARSAL
from benchmarks.common.limits import first_line
from mvar_kernels.dispatch import THIRD_PARTY, BackendError, backends
from mvar_kernels.testing.contract import prepared
from mvar_kernels.testing.spec import Case, Inputs, Spec

CHECKED_BATCH = 2  # at most, for whose float64 reference a GPU has memory
ROUNDINGS = 16  # of the input's dtype: the error allowed besides twice the reference's
Results = tuple[Tensor, ...]
Forward = Callable[[Inputs], Results]
Forwards = Callable[[Spec, Case, Inputs], dict[str, Forward]]
Call = Callable[[], Results]


class Run(NamedTuple):
    spec: Spec
    case: Case
    dtype: torch.dtype
    backward: bool

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"


def benchmark_cases(spec: Spec) -> tuple[Case, ...]:
    """The cases to time on this device; in a rehearsal the first one with several elements."""
    if REHEARSAL:
        return spec.cases[1:2]
    return spec.bench if DEVICE.type == "cpu" else spec.bench_cuda


def runs_of(spec: Spec, passes: Sequence[str]) -> list[Run]:
    """The op's cases on this device, in every dtype and pass."""
    directions = [name == "backward" for name in passes if name == "forward" or spec.grads]
    return [Run(spec, *rest) for rest in product(benchmark_cases(spec), DTYPES[DEVICE.type], directions)]


def all_forwards(spec: Spec, case: Case, inputs: Inputs, *, compiled: bool = True) -> dict[str, Forward]:
    """mvar's backends that take the op, its baselines, and if wanted torch.compile of the first baseline."""
    found: dict[str, Forward] = {}
    for backend, reason in backends().items():
        if reason is None and backend != "reference":
            try:
                spec.call(inputs, case, backend)
            except BackendError:
                continue
            except Exception:
                pass  # reported when its answer is checked
            name = backend if backend in THIRD_PARTY else f"mvar {backend}"
            found[name] = lambda t, backend=backend: spec.call(t, case, backend)  # type: ignore[misc]
    baselines = BASELINES.get(spec.op, {})
    for name, baseline in baselines.items():
        if (baseline.compiled and not compiled) or (baseline.gpu and DEVICE.type == "cpu"):
            continue
        if baseline.supports is None or baseline.supports(inputs, case):
            found[name] = lambda t, baseline=baseline: baseline.run(t, case)  # type: ignore[misc]
    # Sampling has no deterministic answer to check the compiled one against.
    if compiled and baselines and spec.op != "sample_tokens":
        whole = torch.compile(next(iter(baselines.values())).run, dynamic=False)
        found["torch.compile"] = lambda t: whole(t, case)
    return found


def gradients(spec: Spec, inputs: Inputs, forward: Forward, cotangents: Results) -> Call:
    """The backward pass alone, of a forward pass done once."""
    leaves = {name: t.detach().requires_grad_(name in spec.grads) for name, t in inputs.items()}
    wanted = [leaves[name] for name in spec.grads if name in leaves]
    with torch.enable_grad():
        outs = forward(leaves)
    return lambda: torch.autograd.grad(outs, wanted, cotangents, retain_graph=True)


class _Inputs(NamedTuple):
    """A case's inputs and, for a backward, gradients of its outputs."""

    inputs: Inputs
    cotangents: Results | None

    def call(self, spec: Spec, forward: Forward) -> Call:
        """Its forward or, with cotangents, its backward alone."""
        if self.cotangents is None:
            return partial(forward, self.inputs)
        return gradients(spec, self.inputs, forward, self.cotangents)

    def double(self) -> "_Inputs":
        wide = None if self.cotangents is None else tuple(t.double() for t in self.cotangents)
        return _Inputs({name: t.double() for name, t in self.inputs.items()}, wide)


def _inputs(run: Run, case: Case) -> _Inputs:
    inputs = prepared(run.spec, case, run.dtype, DEVICE, made_on=DEVICE.type)
    if not run.backward:
        return _Inputs(inputs, None)
    generator = torch.Generator(DEVICE).manual_seed(0)
    outs = run.spec.reference({n: t.to("meta") for n, t in inputs.items()}, case)  # for shapes and dtypes
    return _Inputs(inputs, tuple(torch.randn(o.shape, generator=generator, device=DEVICE).to(o.dtype) for o in outs))


def correct_calls(run: Run, forwards: Forwards) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls whose answer is right, and what is wrong with the others, which are not timed.

    Answers are checked at a small batch; a call that raises does not stop the others.
    """
    spec, case = run.spec, run.case
    small = case.at_batch(min(case.sizes["B"], CHECKED_BATCH))
    given, wrong, right = _inputs(run, small), dict[str, str](), dict[str, Call]()
    same, exact = (each.call(spec, lambda t: spec.reference(t, small))() for each in (given, given.double()))

    def attempt(given: _Inputs, name: str, forward: Forward, check: Callable[[Results], str | None]) -> None:
        try:
            call = given.call(spec, forward)
            found = check(call())
        except Exception as error:
            found = first_line(error)
        if found is None:
            right[name] = call
            return
        right.pop(name, None)
        wrong[name] = found
        print(f"{spec.op}, {case.name}: {name}: {found}")

    for name, forward in forwards(spec, small, given.inputs).items():
        attempt(given, name, forward, partial(_fault, run, name, same, exact))
    if small.sizes != case.sizes:
        large, names = _inputs(run, case), list(right)
        for name, forward in forwards(spec, case, large.inputs).items():
            if name in names:
                attempt(large, name, forward, lambda got: None)
    return right, wrong


def _fault(run: Run, name: str, same: Results, exact: Results, got: Results) -> str | None:
    """What is wrong with an answer, or None. same, exact: the reference's, in the dtype of `got` and in float64."""
    if run.spec.op != "sample_tokens":
        return fault(got, same, exact, torch.finfo(run.dtype).eps)
    if not name.startswith("mvar") or torch.equal(got[0].cpu(), same[0].cpu()):  # baselines have other random numbers
        return None
    return "samples other tokens than the reference"


def fault(got: Results, same: Results, exact: Results, eps: float) -> str | None:
    for value, reference, expected in zip(got, same, exact, strict=True):
        error, of_reference = (
            float((t.double() - expected).abs().max() / expected.abs().max()) for t in (value, reference)
        )
        if not error <= ROUNDINGS * eps + 2 * of_reference:
            return f"off by {error:.1e} of the largest value, the reference by {of_reference:.1e}"
    return None


def call_of(run: Run, backend: str) -> Call:
    """The call of an mvar backend, its answer not checked."""
    return _inputs(run, run.case).call(run.spec, lambda t: run.spec.call(t, run.case, backend))
