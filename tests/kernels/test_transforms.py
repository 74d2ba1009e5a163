"""Tests of every op and the model under forward-mode AD, torch.func and higher derivatives.

Each op must give the same results as its reference, which PyTorch differentiates, or raise BackendError.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import mvar
import mvar_kernels as mk
from mvar import TokenizerConfig
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case, Inputs, Spec

Function = Callable[[Inputs], tuple[Tensor, ...]]
FIRST = next(iter(SPECS))
each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))


def case_of(spec: Spec) -> Case:
    """Return a case with a temperature if the op has one, with sizes of at most 8."""
    case = next((case for case in spec.cases if case.options.get("norm")), spec.cases[1])
    return replace(case, sizes={dim: min(size, 8) for dim, size in case.sizes.items()})


def inputs_of(spec: Spec) -> Inputs:
    inputs = spec.inputs(case_of(spec), torch.Generator().manual_seed(1))
    return {name: t.float() for name, t in inputs.items()}


def function_of(spec: Spec, backend: str | None) -> Function:
    """Return a function from the inputs to the floating-point outputs of the op, or to zeros if it has none.

    With backend None, the function calls the reference.
    """

    def function(inputs: Inputs) -> tuple[Tensor, ...]:
        case = case_of(spec)
        outs = spec.reference(inputs, case) if backend is None else spec.call(inputs, case, backend)
        floats = tuple(out for out in outs if out.is_floating_point())
        return floats or tuple(out * 0.0 for out in outs)

    return function


def assert_close(got: object, wanted: object) -> None:
    """Compare to 1e-3 of the largest value: in float32, a second derivative contains the temperature of 100 squared."""
    for one, other in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        if other is None:  # integers have no tangent
            assert one is None
            continue
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(other.abs().max()) + 1e-6)


def total(function: Function) -> Callable[[Inputs], Tensor]:
    return lambda inputs: sum(out.sin().sum() for out in function(inputs))  # type: ignore[return-value]


def like(inputs: Inputs) -> Inputs:
    return {name: (3 * t.detach() + 1).cos() for name, t in inputs.items()}


def jvp(function: Function, inputs: Inputs) -> object:
    return torch.func.jvp(function, (inputs,), (like(inputs),))


def dual(function: Function, inputs: Inputs) -> object:
    with forward_ad.dual_level():
        tangents = like(inputs)
        outs = function({name: forward_ad.make_dual(t, tangents[name]) for name, t in inputs.items()})
        return [(found.primal, found.tangent) for found in map(forward_ad.unpack_dual, outs)]


def grad(function: Function, inputs: Inputs) -> object:
    return torch.func.grad(total(function))(inputs)


def hessian_vector(function: Function, inputs: Inputs) -> object:
    return torch.func.jvp(torch.func.grad(total(function)), (inputs,), (like(inputs),))


def vmap(function: Function, inputs: Inputs) -> object:
    return torch.func.vmap(function)({name: torch.stack([t, t * 0.5], 0) for name, t in inputs.items()})


def per_sample_gradients(function: Function, inputs: Inputs) -> object:
    return torch.func.vmap(torch.func.grad(total(function)))({n: torch.stack([t, t * 0.5]) for n, t in inputs.items()})


TRANSFORMS = (jvp, dual, grad, hessian_vector, vmap, per_sample_gradients)
each_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)


@each_op
@each_transform
def test_transform(spec: Spec, transform: Callable[[Function, Inputs], object]) -> None:
    inputs = inputs_of(spec)
    wanted = transform(function_of(spec, None), inputs)
    assert_close(transform(function_of(spec, "auto"), inputs), wanted)


@each_op
def test_transform_with_named_backend_raises(spec: Spec) -> None:
    if mk.backends()["cpu"] is not None:
        pytest.skip("the C++ extension was not built")
    for transform in TRANSFORMS:
        with pytest.raises(mk.BackendError, match=f"^{spec.op}: backend 'cpu' requested, but: forward-mode"):
            transform(function_of(spec, "cpu"), inputs_of(spec))


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.grads], ids=lambda s: s.op)
def test_second_derivative(spec: Spec) -> None:
    """The first backward uses the kernel; the second one, and batched gradients, use the reference."""

    def second(function: Function) -> list[Tensor]:
        leaves = {name: t.requires_grad_() for name, t in inputs_of(spec).items()}
        every = list(leaves.values())
        first = torch.autograd.grad(total(function)(leaves), every, create_graph=True)
        weighted = sum((g * w).sum() for g, w in zip(first, like(leaves).values(), strict=True))
        assert isinstance(weighted, Tensor)
        flat = torch.cat([out.flatten() for out in function(leaves)])
        batch = torch.autograd.grad(flat, every, torch.eye(len(flat))[:2], is_grads_batched=True)
        return [*torch.autograd.grad(weighted, every), *batch]

    assert_close(second(function_of(spec, "auto")), second(function_of(spec, None)))
    if mk.backends()["cpu"] is None:
        with pytest.raises(mk.BackendError, match=f"^{spec.op}: backend 'cpu' requested"):
            second(function_of(spec, "cpu"))


def test_dual_level_without_tangents() -> None:
    spec = SPECS[FIRST]
    with forward_ad.dual_level():
        function_of(spec, "reference" if mk.backends()["cpu"] else "cpu")(inputs_of(spec))


def test_compiled_jvp() -> None:
    spec = SPECS[FIRST]
    inputs = inputs_of(spec)
    torch.compiler.reset()
    compiled = torch.compile(lambda t: jvp(function_of(spec, "auto"), t), fullgraph=True, backend="aot_eager")
    assert_close(compiled(inputs), jvp(function_of(spec, None), inputs))


def test_forward_mode_of_compiled_function() -> None:
    """The function is compiled and run before it is differentiated, so that the graph contains the op."""
    spec = SPECS[FIRST]
    inputs = inputs_of(spec)
    torch.compiler.reset()
    compiled = torch.compile(function_of(spec, "auto"), backend="aot_eager")
    compiled(inputs)
    assert_close(dual(compiled, inputs), dual(function_of(spec, None), inputs))


def test_jvp_of_model() -> None:
    """The tangent of the loss equals the dot product of its gradient and the direction, for inputs and weights."""
    config = TokenizerConfig((1, 2, 3), num_codes=16, code_dim=8, ch=32, ch_mult=(1, 2), num_res_blocks=1)
    model, _ = mvar.build(num_classes=4, seed=0, tokenizer=config, depth=1, bidirectional=True)
    labels, generator = torch.tensor([1, 3]), torch.Generator().manual_seed(3)
    weights = {n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    leaves = weights | {"inputs": torch.randn(2, 13, 8, generator=generator)}

    def loss(leaves: Inputs) -> Tensor:
        rest = {name: t for name, t in leaves.items() if name != "inputs"}
        logits: Tensor = torch.func.functional_call(model, rest, (labels, leaves["inputs"]))
        return logits.square().mean()

    direction = like(leaves)
    _, tangent = torch.func.jvp(loss, (leaves,), (direction,))
    for t in leaves.values():
        t.requires_grad_()
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()))
    along = sum((g.double() * direction[n]).sum() for n, g in zip(leaves, grads, strict=True))
    assert isinstance(along, Tensor)
    torch.testing.assert_close(tangent.double(), along, rtol=1e-4, atol=0)
