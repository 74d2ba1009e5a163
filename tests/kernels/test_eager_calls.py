"""Tests of eager calls, which bypass PyTorch's dispatcher unless a mode, subclass or transform needs to see them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mvar_kernels as mk
from mvar_kernels import custom_op
from mvar_kernels.dispatch import OPS, unavailable
from mvar_kernels.testing.contract import evaluate, prepared
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Spec

BACKENDS = [name for name in ("reference", "cpu") if unavailable(name) is None]


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    ("spec", "backend"),
    [(spec, name) for spec in SPECS.values() for name in BACKENDS if name in OPS[spec.op].modules],
    ids=lambda value: getattr(value, "op", value),
)
def test_eager_call_matches_dispatched_call(spec: Spec, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares outputs and gradients bitwise."""
    case = spec.cases[1]
    inputs = prepared(spec, case, torch.float32)
    direct = evaluate(spec, case, inputs, backend)
    monkeypatch.setattr(custom_op, "_is_eager", lambda tensors: False)
    dispatched = evaluate(spec, case, inputs, backend)
    assert direct.keys() == dispatched.keys()
    assert all(torch.equal(direct[name], dispatched[name]) for name in direct)


@pytest.mark.parametrize(
    ("context", "eager"),
    [
        (nullcontext, True),
        (torch.no_grad, True),
        (torch.inference_mode, True),
        (lambda: torch.autocast("cpu", torch.bfloat16), True),
        (DispatchMode, False),
        (FunctionMode, False),
        (lambda: torch.device("cpu"), False),
        (torch.profiler.profile, False),
        (forward_ad.dual_level, False),
        (torch._C._AutoDispatchBelowAutograd, True),
    ],
)
def test_modes_and_contexts(context: Callable[[], AbstractContextManager[Any]], eager: bool) -> None:
    t = torch.ones(2)
    with context():
        assert custom_op._is_eager([t, None]) == eager


@pytest.mark.parametrize(
    ("t", "eager"),
    [
        (torch.ones(2), True),
        (nn.Parameter(torch.ones(2)), True),
        (nn.Buffer(torch.ones(2)), True),
        (torch.ones(2).as_subclass(Subclass), False),
        (torch.ones(2, device="meta"), False),
        (torch.ones(2).to_sparse(), False),
        (torch.view_as_complex(torch.ones(2, 2)).conj().imag, False),
        (torch._efficientzerotensor((2,)), False),
    ],
)
def test_tensor_types(t: Tensor, eager: bool) -> None:
    assert custom_op._is_eager([torch.ones(1), t]) == eager


def test_negated_view() -> None:
    """The memory of a negated view holds the values before negation."""
    x = torch.view_as_complex(torch.randn(2, 3, 8, 2)).conj().imag
    assert x.is_neg()
    scale, shift = torch.randn(2, 2, 8).unbind(0)
    assert torch.equal(mk.adaln(x, scale, shift), mk.adaln(x.clone(), scale, shift))


def test_profiler_shows_ops() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        mk.adaln(x, *torch.randn(2, 2, 8).unbind(0)).sum().backward()
    assert {"mvar::adaln", "mvar::adaln_backward"} <= {event.name for event in profile.events()}


def test_torch_func_and_jit_trace() -> None:
    found: list[bool] = []

    def f(x: Tensor) -> Tensor:
        found.append(custom_op._is_eager([x]))
        return x.sum()

    torch.func.grad(f)(torch.ones(2))
    torch.vmap(f)(torch.ones(2, 2))
    torch.jit.trace(f, torch.ones(2), check_trace=False)
    assert found == [False] * 3


def test_is_grads_batched() -> None:
    """With is_grads_batched=True, gradients are batched tensors of type Tensor, which have no storage."""
    found: list[bool] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            found.append(custom_op._is_eager([grad]))
            return grad

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Probe.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert found == [False]


def test_below_autograd() -> None:
    """Inside another operator's kernel, nothing is recorded, as with torch's own ops."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert not mk.adaln(x, *torch.randn(2, 2, 8).unbind(0)).requires_grad


def test_unused_input_is_not_saved_for_backward() -> None:
    """It may be modified in place before the backward."""
    x, scale, shift = (torch.randn(*size, requires_grad=True) for size in ((2, 3, 8), (2, 8), (2, 8)))
    changed = shift.clone()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = mk.adaln(x, scale, changed)
    assert changed.data_ptr() not in {t.data_ptr() for t in kept}
    changed.data.copy_(0)
    with torch.no_grad():
        changed.mul_(2)
    (of_shift,) = torch.autograd.grad(out.sum(), shift)
    assert torch.equal(of_shift, torch.full_like(shift, 3.0))


@pytest.mark.parametrize("eager", [True, False])
def test_grad_fn_name(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not eager:
        monkeypatch.setattr(custom_op, "_is_eager", lambda tensors: False)
    out = mk.adaln(torch.randn(2, 3, 8, requires_grad=True), *torch.randn(2, 2, 8).unbind(0))
    assert out.grad_fn is not None and "adaln" in out.grad_fn.name()


def test_gradgradcheck() -> None:
    """The backward of an eager call is differentiable with create_graph=True."""
    x, scale, shift = (t.requires_grad_() for t in torch.randn(3, 2, 4, 6, dtype=torch.float64).unbind(0))
    torch.autograd.gradgradcheck(lambda *t: mk.adaln(t[0], t[1][:, 0], t[2][:, 0]), (x, scale, shift))
