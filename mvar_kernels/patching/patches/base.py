"""What a patch is: the same computation as a module of the VAR family, on the kernels.

A patch is a mixin: `accelerate` sets the class of a module to a subclass of the patch and of the module's own class
(api.py), so that `super().forward` is the original forward, which runs wherever the kernels do not support a call. A
patch defines the attributes by which a module is recognized, the sizes and options that it does not support, and the
calls by which it is compared with the original.

Some submodules are read but not called, or called with other inputs, so that hooks on them would have no effect. Every
call checks that they have not changed since the comparison, and otherwise runs the original forward.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

Randn = Callable[..., Tensor]
"""randn(*shape): normal inputs of the comparison, the same for original and patched module."""


class Patch:
    """A mixin in front of the original class."""

    ops: ClassVar[str]
    """the ops that run instead"""
    attributes: ClassVar[tuple[str, ...]]
    """by which a module is recognized"""
    required: ClassVar[tuple[str, ...]]
    """arguments that the original forward must have"""
    optional: ClassVar[tuple[str, ...]] = ()
    """arguments that the patch takes where the original has them; a call with others runs the original forward"""
    bypassed: ClassVar[tuple[str, ...]] = ()
    """submodules that are not called, or with other inputs"""
    continued: ClassVar[tuple[str, ...]] = ()
    """submodules whose own patch is called: the comparison needs it, too"""
    unpatched: ClassVar[dict[str, str]] = {}
    """submodules that stay as they are, and why"""

    # Of the subclass of a patch and an original class (api.py):
    original: ClassVar[type]
    original_forward: ClassVar[Any]
    checked: ClassVar[dict[str, tuple[type, bool]]]
    """name → :func:`kind_of` of the bypassed submodules at the time of the comparison"""
    names: ClassVar[tuple[str, ...]]
    """of the original forward's arguments"""
    defaults: ClassVar[dict[str, Any]]
    """of the original forward's arguments that have one"""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module looks like one that this patch replaces."""
        return all(hasattr(module, name) for name in cls.attributes)

    @classmethod
    def overrides(cls, original: type) -> dict[str, Any]:
        """Methods of the patched class that are made from those of the original class."""
        return {}

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """Why this module cannot be patched: a size or an option that the kernels do not support; or None."""
        raise NotImplementedError

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        """Outputs of calls by which original and patched module are compared, in evaluation and in training mode."""
        raise NotImplementedError

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        """Outputs of calls on up to `length` tokens, in evaluation mode: some programs prune the tokens of the largest
        scales (FastVAR, SkipVAR)."""
        raise NotImplementedError

    def is_valid(self: Any) -> bool:
        """Whether forward and bypassed submodules are as they were at the comparison. Takes 2 µs."""
        if self.original.forward is not self.original_forward or has_global_hooks():
            return False
        children = self._modules
        for name, kind in self.checked.items():
            child = children.get(name)
            if child is None or kind_of(child) != kind or has_hooks(child):
                return False
        return True

    def supported_arguments(self: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by name, or None where the call needs the original forward: the patch is not valid,
        arguments are missing, or arguments that the patch does not take are not at their default."""
        if not self.is_valid() or len(args) > len(self.names):
            return None
        values = {**self.defaults, **dict(zip(self.names, args, strict=False)), **options}
        for name, value in values.items():
            if name not in self.required and name not in self.optional and value is not self.defaults.get(name):
                return None
        return values if all(name in values for name in self.required) else None


def arguments_of(forward: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of a forward's arguments without `self`, and the defaults of those that have one."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return tuple(p.name for p in parameters), defaults


_names: dict[type, tuple[str, ...]] = {}  # not functools.cache, which torch.compile warns of and does not use


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's own forward, patched or not."""
    cls = type(module)
    if cls not in _names:
        _names[cls] = arguments_of(cls.original_forward if issubclass(cls, Patch) else cls.forward)[0]
    return _names[cls]


def roll_tokens(*modules: nn.Module) -> None:
    """Give modules of a copy a forward that takes no time, where a patch calls them as the original does."""
    for module in modules:
        module.forward = lambda x, *args, **options: x.roll(1, 1)


def scale_options(module: nn.Module) -> Iterator[dict[str, int]]:
    """Arguments of example calls: none, and each of 16 scales where the forward takes one, as FastVAR prunes by it."""
    yield {}
    for name in {"si", "scale_ind"}.intersection(argument_names(module)):
        yield from ({name: scale} for scale in range(16))


def has_global_hooks() -> bool:
    """Whether there are hooks for all modules, or transforms that patches do not support: torch.func, forward mode,
    torch.compile."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
        or _are_functorch_transforms_active()
        # A mask and the carried state are inspected outside of the graph, which `fullgraph=True` refuses.
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
    )


def kind_of(module: nn.Module) -> tuple[type, bool]:
    """A module's class, and whether it has a weight: a LayerNorm may have none."""
    return type(module), module._parameters.get("weight") is not None


def has_hooks(module: Any) -> bool:
    """Whether the module has hooks, or a forward on the instance."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def is_linear(layer: Any, inputs: int, outputs: int) -> bool:
    """Whether the layer is nn.Linear with these sizes, or an adapter of peft around one."""
    layer = getattr(layer, "base_layer", layer)
    return isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (inputs, outputs)


NORM_EXPECTED = "ln_wo_grad: expected a LayerNorm over the channels without weights, or an RMSNorm with a weight"


def norm_width(norm: Any) -> int | None:
    """Channels of a norm that :func:`norm_options` describes: LayerNorm without weights over the last dimension, or a
    class that is called RMSNorm and has a weight for each channel; else None."""
    if isinstance(norm, nn.LayerNorm):
        plain = not norm.elementwise_affine and len(norm.normalized_shape) == 1
        return norm.normalized_shape[0] if plain else None
    supported = "RMSNorm" in type(norm).__name__ and not getattr(norm, "use_quant", False)
    weight = norm._parameters.get("weight") if supported else None
    return weight.numel() if weight is not None and weight.dim() == 1 and _rms_eps(norm) is not None else None


def norm_options(norm: Any, dtype: torch.dtype) -> dict[str, Any]:
    """A norm of :func:`norm_width` as options of adaln and gated_adaln on tensors of this dtype."""
    if isinstance(norm, nn.LayerNorm):
        return {"eps": norm.eps}
    weight = norm.weight
    weight = weight.to(torch.promote_types(weight.dtype, dtype))
    return {"norm": "rms", "weight": weight, "eps": _rms_eps(norm)}


def normed_dtype(norm: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the norm's output for inputs of this dtype: an RMSNorm of PyTorch operations multiplies its weight
    with what it has rounded, so that a float32 weight gives float32; a fused one and a LayerNorm keep the dtype."""
    fused = isinstance(norm, nn.LayerNorm) or "Fused" in type(norm).__name__
    return dtype if fused else torch.promote_types(dtype, norm.weight.dtype)


def lacks_gradient(norm: Any) -> bool:
    """Whether the norm stops gradients where there would be some: HART's fused kernel writes to a new tensor."""
    return torch.is_grad_enabled() and type(norm).__name__ == "LlamaRMSNormFused"


def _rms_eps(norm: Any) -> float | None:
    """As Llama's code, T5's and torch name it; torch's may be None, for a number that depends on the dtype."""
    eps: float | None = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    return eps


def modulation_unsupported(module: Any, vectors: int, channels: int) -> str | None:
    """Why `ada_lin` does not compute this number of modulation vectors, or None."""
    last = module.ada_lin[-1] if isinstance(getattr(module, "ada_lin", None), nn.Sequential) else None
    if isinstance(last, nn.Linear) and last.out_features == vectors * channels:
        return None
    expected = f"expected a Sequential that ends in a linear layer of {vectors}·{channels} features"
    return f"ada_lin: {expected}" + ("" if hasattr(module, "ada_lin") else ", got none")
