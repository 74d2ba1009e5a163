"""How every op is registered with PyTorch: what `torch.library.custom_op` leaves out, for all ops in one place.

To PyTorch a custom op is opaque: forward-mode differentiation gives no tangent and no error, `torch.func`'s transforms
raise, and there are no second derivatives. The ops here then compute with their reference backend, which is plain
PyTorch and composes with all of these; another backend asked for by name raises instead.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl, not_list_of_tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mvar_kernels.backends import BackendError

# A kernel of one of these keys goes before the one that custom_op registers for all of them ("Autograd").
_AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")
_KERNEL_KEYS = ("CPU", "CUDA")  # likewise, before "CompositeExplicitAutograd"
_VMAP_KEYS = ("FuncTorchBatched", "Batched")  # torch.vmap, and autograd.grad with is_grads_batched
_SAVED = object()  # stands for a tensor of an op's inputs that is saved apart from them


def custom_op(name: str, *, reference_gradients: bool = False) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function whose last argument is `backend`, as torch.library.custom_op does. It mutates nothing.

    Its outputs are made contiguous, as fakes promise, whatever the strides that a backend gives. Under forward-mode
    differentiation (torch.autograd.forward_ad, torch.func.jvp, jacfwd) and under torch.func's grad, vjp and vmap, in
    any nesting, the op computes with backend "reference".

    reference_gradients: differentiate the reference, to any order; else a formula is to be registered, if there is one.

    Raises (from the op):
        BackendError: under one of these, a backend other than "auto" and "reference".
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(function)
        def kernel(*inputs: Any) -> Any:
            outputs = function(*inputs)
            if isinstance(outputs, Tensor):
                return outputs.contiguous()
            return type(outputs)([output.contiguous() for output in outputs])

        op = torch.library.custom_op(name, mutates_args=())(kernel)
        opaque = make_autograd_impl(op._opoverload, op)  # as the one that custom_op registers
        reference = _reference(name, function)

        def autograd(keyset: Any, *inputs: Any) -> Any:
            if torch._C._are_functorch_transforms_active() or _has_tangents(inputs):
                return reference(*inputs)
            return opaque(keyset, *inputs)

        for key in _KERNEL_KEYS:
            op._lib.impl(op._name, _untraced(kernel), key)
        for key in _AUTOGRAD_KEYS:
            op._lib.impl(op._name, autograd, key, with_keyset=True)
        for key in _VMAP_KEYS:
            op._lib.impl(op._name, reference, key)
        if reference_gradients:
            _register_gradients(op, reference)
        return op

    return register


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
            public = name.removeprefix("mvar::").removesuffix("_backward")
            raise BackendError(
                f"{public}: backend {backend!r} asked for, but: forward-mode differentiation, torch.func's transforms "
                "and second derivatives are the reference's alone; ask for 'auto' or 'reference'"
            )
        return function(*others, "reference")

    return reference


def _has_tangents(inputs: tuple[Any, ...]) -> bool:
    if forward_ad._current_level < 0:
        return False
    tensors = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
