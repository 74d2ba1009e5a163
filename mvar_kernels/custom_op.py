"""How every op is registered with PyTorch, and how it is called.

An op's inputs are a NamedTuple of tensors and options. Its fields are the schema of `torch.ops.mvar.<op>` and of
`torch.ops.mvar.<op>_backward`, so that an op is registered by naming that class, and the outputs with their shapes.

To PyTorch a custom op is opaque: forward-mode differentiation gives no tangent and no error, `torch.func`'s transforms
raise, and there are no second derivatives. The ops here then compute with their reference backend, which is plain
PyTorch and composes with all of these; another backend requested by name raises instead.

An eager call, with nothing but autograd between it and the kernel, does not go through the dispatcher.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl, not_list_of_tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionMeta
from torch.library import CustomOpDef
from torch.nn import Parameter
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mvar_kernels.dispatch import BackendError, Op

# A kernel of one of these keys goes before the one that custom_op registers for all of them ("Autograd").
_AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")
_KERNEL_KEYS = ("CPU", "CUDA")  # likewise, before "CompositeExplicitAutograd"
_VMAP_KEYS = ("FuncTorchBatched", "Batched")  # torch.vmap, and autograd.grad with is_grads_batched
_SAVED = object()  # placeholder of a tensor that is in ctx.saved_tensors
_SCHEMA: Mapping[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    bool: "bool",
    tuple[int, ...]: "int[]",
}
_PLAIN_KEYS = {
    "CPU",
    "CUDA",
    "ADInplaceOrView",
    "AutogradCPU",
    "AutogradCUDA",
    "AutocastCPU",
    "AutocastCUDA",
}
Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
Outputs = tuple[Tensor, ...]


class RegisteredOp(Generic[Inputs]):
    """`torch.ops.mvar.<op>(*inputs, backend)` and its backward, made of an op's kernels; called with the inputs.

    Args:
        op: the kernels.
        inputs: the NamedTuple that every kernel of the op takes.
        fake: outputs of the right shapes, dtypes and device, without values.
        differentiable: the op has a backward: kernels give a gradient of every tensor of the inputs that there is.
        constants: names of tensors of which they give none.
        saved_as: inputs that are replaced for the backward: by an output, given by its number, or by an input, given
            by its name, of which no backward reads more than the shape.
        reference_gradients: no kernel has a backward, and gradients are the reference's.

    Outputs are contiguous. Under forward-mode differentiation (torch.autograd.forward_ad, torch.func.jvp, jacfwd) and
    under torch.func's grad, vjp and vmap, in any nesting, the op computes with backend "reference".

    Raises (from a call):
        BackendError: under one of these, a backend other than "auto" and "reference".
    """

    def __init__(
        self,
        op: Op,
        inputs: type[Inputs],
        fake: Callable[[Inputs], Outputs],
        *,
        outputs: int,
        differentiable: bool = True,
        constants: tuple[str, ...] = (),
        saved_as: Mapping[str, int | str] | None = None,
        reference_gradients: bool = False,
    ) -> None:
        hints = get_type_hints(inputs)
        self.op, self._inputs, self._one = op, inputs, outputs == 1
        self._tensors = [i for i, hint in enumerate(hints.values()) if hint in (Tensor, Tensor | None)]
        self._lists = [i for i, hint in enumerate(hints.values()) if hint == tuple[int, ...]]
        place = {name: i for i, name in enumerate(hints)}
        self._constants = [place[name] for name in constants]
        self._outputs_as = {place[name]: by for name, by in (saved_as or {}).items() if isinstance(by, int)}
        self._inputs_as = {place[name]: place[by] for name, by in (saved_as or {}).items() if isinstance(by, str)}
        fields = ", ".join(f"{_SCHEMA[hint]} {name}" for name, hint in hints.items())
        results = "Tensor" if self._one else f"({', '.join(['Tensor'] * outputs)})"

        def forward(*arguments: Any) -> Any:
            found = self._forward(*self._unpacked(arguments))
            return found[0] if self._one else found

        def faked(*arguments: Any) -> Any:
            found = fake(self._unpacked(arguments)[0])
            return found[0] if self._one else found

        custom = _custom_op(op.name, forward, f"({fields}, str backend) -> {results}", reference_gradients)
        custom.register_fake(faked)
        self._overload = custom._opoverload
        self._eager: Any = None
        if not differentiable:
            return

        def backward(grads: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
            return self._backward(grads, *self._unpacked(arguments))

        def faked_backward(grads: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
            given = [arguments[i] for i in self._tensors if i not in self._constants]
            return [t.new_empty(t.shape) for t in given if t is not None]

        schema = f"(Tensor[] grads, {fields}, str backend) -> Tensor[]"
        custom_backward = _custom_op(f"{op.name}_backward", backward, schema, True)
        custom_backward.register_fake(faked_backward)
        self._backward_overload = custom_backward._opoverload
        custom.register_autograd(self._gradients, setup_context=self._save)

        # Under eager autograd the same two functions run; named as the op, which anomaly mode and profilers print.
        def eager_forward(ctx: Any, *arguments: Any) -> Outputs:
            found = self._forward(self._inputs(*arguments[:-1]), arguments[-1])
            self._save(ctx, arguments, found)
            return found

        functions = {"forward": staticmethod(eager_forward), "backward": staticmethod(self._gradients)}
        self._eager = FunctionMeta(op.name, (torch.autograd.Function,), functions)

    def __call__(self, inputs: Inputs, backend: str) -> Outputs:
        if not torch.compiler.is_compiling() and _is_eager(tensors := [inputs[i] for i in self._tensors]):
            recorded = torch.is_grad_enabled() and not _below_autograd()
            if not recorded or not any([t is not None and t.requires_grad for t in tensors]):
                return self._forward(inputs, backend)
            if self._eager is not None:
                outputs: Outputs = self._eager.apply(*inputs, backend)
                return outputs
        found: Any = self._overload(*inputs, backend)
        return (found,) if self._one else tuple(found)

    def _unpacked(self, arguments: Sequence[Any]) -> tuple[Inputs, str]:
        """Inputs and backend from a call's arguments, in which tuples have become lists."""
        values = list(arguments[:-1])
        for i in self._lists:
            values[i] = tuple(values[i])
        return self._inputs(*values), arguments[-1]

    def _present(self, inputs: Sequence[Any]) -> list[Tensor]:
        return [inputs[i] for i in self._tensors if inputs[i] is not None]

    def _forward(self, inputs: Inputs, backend: str) -> Outputs:
        found = self.op.choose(backend, inputs[self._tensors[0]].device, inputs).forward(inputs)
        return tuple([output.contiguous() for output in found])

    def _backward(self, grads: Sequence[Tensor], inputs: Inputs, backend: str) -> list[Tensor]:
        kernel = self.op.choose(backend, inputs[self._tensors[0]].device, inputs, backward=True)
        assert kernel.backward is not None
        return [grad.contiguous() for grad in kernel.backward(grads, inputs)]

    def _save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        kept = list(inputs)
        for i, other in self._inputs_as.items():
            kept[i] = None if kept[i] is None else inputs[other]
        for i, number in self._outputs_as.items():
            kept[i] = output if self._one else output[number]
        ctx.save_for_backward(*self._present(kept))
        for i in self._tensors:
            kept[i] = None if kept[i] is None else _SAVED
        ctx.kept = kept

    def _gradients(self, ctx: Any, *grads: Any) -> Any:
        tensors = iter(ctx.saved_tensors)
        arguments = [next(tensors) if value is _SAVED else value for value in ctx.kept]
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not _is_eager([*grads, *self._present(arguments)])
        ):
            found = iter(self._backward_overload(list(grads), *arguments))
        else:
            found = iter(self._backward(grads, *self._unpacked(arguments)))
        wanted = [value is _SAVED and i not in self._constants for i, value in enumerate(ctx.kept)]
        return tuple([next(found) if this else None for this in wanted])


# Looked up once, as every call of an op calls all of them.
_is_seen = (
    torch._C._len_torch_dispatch_stack,
    torch._C._is_torch_function_mode_enabled,
    torch._C._are_functorch_transforms_active,
    torch._C._autograd._profiler_enabled,
    torch._C._get_tracing_state,
)
_below_autograd = partial(torch._C._dispatch_tls_is_dispatch_key_excluded, torch._C.DispatchKey.AutogradOther)
_dispatch_keys = torch._C._dispatch_keys
_plain: dict[int, bool] = {}


def _is_eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would do no more than run the kernel, and autograd: no mode, transform, profiler or tracer
    is to see the call, and the tensors are ordinary ones with memory of their own.
    """
    for sees in _is_seen:
        if sees():
            return False
    if forward_ad._current_level >= 0:
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) is not Tensor and type(t) is not Parameter:
            return False
        keys = _dispatch_keys(t)
        raw = keys.raw_repr()
        if not (_plain[raw] if raw in _plain else _is_plain(raw, str(keys))):
            return False
    return True


def _is_plain(raw: int, keys: str) -> bool:
    """Whether these dispatch keys are those of a dense tensor of a CPU or a GPU: not of a negated view, say, nor of a
    row of vmap's batch. Found once for each set.
    """
    names = keys.removeprefix("DispatchKeySet(").removesuffix(")").split(", ")
    _plain[raw] = set(names) <= _PLAIN_KEYS
    return _plain[raw]


def _custom_op(name: str, function: Callable[..., Any], schema: str, reference_gradients: bool) -> CustomOpDef:
    """torch.library.custom_op, with the transforms that it leaves out.

    reference_gradients: differentiate the reference, to any order; else a formula is to be registered, if there is one.
    """
    op = torch.library.custom_op(f"mvar::{name}", function, mutates_args=(), schema=schema)
    opaque = make_autograd_impl(op._opoverload, op)  # as the one that custom_op registers
    reference = _reference(name, function)

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or _has_tangents(inputs):
            return reference(*inputs)
        return opaque(keyset, *inputs)

    for key in _KERNEL_KEYS:
        op._lib.impl(op._name, _untraced(function), key)
    for key in _AUTOGRAD_KEYS:
        op._lib.impl(op._name, autograd, key, with_keyset=True)
    for key in _VMAP_KEYS:
        op._lib.impl(op._name, reference, key)
    if reference_gradients:
        _register_gradients(op, reference)
    return op


def _untraced(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, which torch.compile never traces into. What custom_op makes of one does the same, but imports
    torch._dynamo for it at the first call: 2.0 of the 2.4 s of a first generation (AMD EPYC, Zen 3)."""
    disabled: Callable[..., Any] | None = None

    def call(*inputs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return kernel(*inputs)
        disabled = disabled or torch.compiler.disable(kernel)
        return disabled(*inputs)

    return call


def _register_gradients(op: CustomOpDef, reference: Callable[..., Any]) -> None:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.structure = tree_flatten(inputs, is_leaf=not_list_of_tensor)
        saved = [isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]
        ctx.save_for_backward(*(leaf for leaf, apart in zip(leaves, saved, strict=True) if apart))
        ctx.leaves = [_SAVED if apart else leaf for leaf, apart in zip(leaves, saved, strict=True)]

    def autograd(ctx: Any, *grads: Any) -> Any:
        def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(tensors)
            leaves = [next(rest) if leaf is _SAVED else leaf for leaf in ctx.leaves]
            return tuple(tree_leaves(reference(*tree_unflatten(leaves, ctx.structure))))

        found = iter(torch.func.vjp(outputs, *ctx.saved_tensors)[1](tuple(tree_leaves(grads))))
        return tree_unflatten([next(found) if leaf is _SAVED else None for leaf in ctx.leaves], ctx.structure)

    op.register_autograd(autograd, setup_context=setup)


def _reference(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The op's function on its reference backend, outside of PyTorch's dispatcher."""

    def reference(*inputs: Any) -> Any:
        *others, backend = inputs
        if backend not in ("auto", "reference"):
            raise BackendError(
                f"{name.removesuffix('_backward')}: backend {backend!r} requested, but: forward-mode differentiation, "
                "torch.func's transforms and second derivatives are the reference's alone; ask for 'auto' or "
                "'reference'"
            )
        return function(*others, "reference")

    return reference


def _has_tangents(inputs: tuple[Any, ...]) -> bool:
    if forward_ad._current_level < 0:
        return False
    tensors = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
