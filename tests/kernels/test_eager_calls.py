"""An eager call goes past PyTorch's dispatcher where nothing would be seen of it there, and there alone."""

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
from mvar_kernels.dispatch import unavailable
from mvar_kernels.testing.contract import evaluate, prepared
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Spec

BACKENDS = [name for name in ("reference", "cpu") if unavailable(name) is None]


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_both_ways_give_the_same_bits(spec: Spec, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, and gradients of all inputs that get one."""
    case = spec.cases[1]
    inputs = prepared(spec, case, torch.float32)
    past = evaluate(spec, case, inputs, backend)
    monkeypatch.setattr(custom_op, "_is_eager", lambda tensors: False)
    dispatched = evaluate(spec, case, inputs, backend)
    assert past.keys() == dispatched.keys()
    assert all(torch.equal(past[name], dispatched[name]) for name in past)


@pytest.mark.parametrize(
    ("context", "eager"),
    [
        (nullcontext, True),
        (torch.no_grad, True),
        (torch.inference_mode, True),
        (lambda: torch.autocast("cpu", torch.bfloat16), True),
        (Seen, False),
        (Functions, False),
        (lambda: torch.device("cpu"), False),
        (torch.profiler.profile, False),
        (forward_ad.dual_level, False),
        (torch._C._AutoDispatchBelowAutograd, True),
    ],
)
def test_what_wants_to_see_an_op_sees_it(context: Callable[[], AbstractContextManager[Any]], eager: bool) -> None:
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
def test_tensors_that_are_more_than_their_memory_are_dispatched(t: Tensor, eager: bool) -> None:
    assert custom_op._is_eager([torch.ones(1), t]) == eager


def test_a_negated_view_has_its_sign() -> None:
    """Whose memory holds the other sign."""
    x = torch.view_as_complex(torch.randn(2, 3, 8, 2)).conj().imag
    assert x.is_neg()
    scale, shift = torch.randn(2, 2, 8).unbind(0)
    assert torch.equal(mk.adaln(x, scale, shift), mk.adaln(x.clone(), scale, shift))


def test_a_profile_names_the_ops() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        mk.adaln(x, *torch.randn(2, 2, 8).unbind(0)).sum().backward()
    assert {"mvar::adaln", "mvar::adaln_backward"} <= {event.name for event in profile.events()}


def test_torch_func_and_tracers_are_dispatched() -> None:
    found: list[bool] = []

    def f(x: Tensor) -> Tensor:
        found.append(custom_op._is_eager([x]))
        return x.sum()

    torch.func.grad(f)(torch.ones(2))
    torch.vmap(f)(torch.ones(2, 2))
    torch.jit.trace(f, torch.ones(2), check_trace=False)
    assert found == [False] * 3


def test_a_batch_of_gradients_is_dispatched() -> None:
    """vmap's rows of torch.autograd.grad(is_grads_batched=True) are of torch's own type, and have no memory."""
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


def test_below_autograd_nothing_is_recorded() -> None:
    """As of torch's own ops, inside another operator's kernel."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert not mk.adaln(x, *torch.randn(2, 2, 8).unbind(0)).requires_grad


def test_what_no_backward_reads_is_not_kept() -> None:
    """It may be changed in place before the backward, and takes no memory."""
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
def test_a_node_has_the_op_s_name(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not eager:
        monkeypatch.setattr(custom_op, "_is_eager", lambda tensors: False)
    out = mk.adaln(torch.randn(2, 3, 8, requires_grad=True), *torch.randn(2, 2, 8).unbind(0))
    assert out.grad_fn is not None and "adaln" in out.grad_fn.name()


def test_gradients_of_gradients() -> None:
    """The backward of an eager call is differentiable where that is asked for, as the reference."""
    x, scale, shift = (t.requires_grad_() for t in torch.randn(3, 2, 4, 6, dtype=torch.float64).unbind(0))
    torch.autograd.gradgradcheck(lambda *t: mk.adaln(t[0], t[1][:, 0], t[2][:, 0]), (x, scale, shift))
