"""A module's weights as its layers compute with them, whatever wraps the module or its layers.

A copy for inference and a file hold the plain layers that the configuration builds, and nothing else. So the module is
compared with those, layer by layer: what torch.compile, DDP, FSDP2, parametrizations, weight norm and pruning made of a
weight is looked through, and a layer that is of another kind is named.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import getattr_static
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from mvar.model import Model, from_config
from mvar.sharding import is_sharded
from mvar.tokenizer import Tokenizer

Module = TypeVar("Module", bound=Model | Tokenizer)

ENCODER = "encoder"
"""Of a tokenizer: generation does not use it."""
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
REWEIGHTING = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks of torch's own that compute a weight before each forward pass."""
REMEDY = (
    "put back the layer that the configuration builds: merge an adapter (peft: merge_and_unload()), "
    "load the weights from before quantization, or remove_parametrizations"
)


def unwrapped(module: nn.Module, *kinds: type[Model] | type[Tokenizer]) -> Any:
    """The model or tokenizer inside what torch.compile, DataParallel or DistributedDataParallel made of it.

    TypeError where there is none: of FullyShardedDataParallel, which flattens weights, and of any other class.
    """
    inside = _unwrapped(module) if isinstance(module, nn.Module) else module
    if isinstance(inside, kinds):
        return inside
    expected = " or ".join(f"mvar.{kind.__name__}" for kind in kinds)
    name = type(inside).__name__
    if name == "FullyShardedDataParallel":  # by name: torch can be built without torch.distributed
        advice = ", which flattens weights: shard with fully_shard, or load its full state dict into a plain model"
    else:
        advice = (
            ": take it out of what wraps it, or merge what was added to it" if isinstance(inside, nn.Module) else ""
        )
    raise TypeError(f"expected an {expected}, got a {name}{advice}")


class _Uninitialised(TorchFunctionMode):
    """Leaves alone what torch.nn.init would fill. Filling a tensor without storage imports torch._dynamo, which took
    1.6 of the 2.0 s of loading the digits' tokenizer (AMD EPYC, Zen 3)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules that are built here have their parameters and buffers on the meta device."""
    with torch.device("meta"), _Uninitialised():
        yield


def skeleton(module: Module) -> Module:
    """What the module's configuration builds, without storage."""
    with without_storage():
        made = from_config(module.config) if isinstance(module, Model) else Tokenizer(module.config)
    return made.eval().requires_grad_(False)  # type: ignore[return-value]


def own_layer(module: Model | Tokenizer) -> str | None:
    """The first layer in which the module is more than its weights and configuration, in words, or None.

    That is a layer of another class, setting or structure, one with hooks, or one with a method of its own. Hooks of
    the whole module, its forward and a tokenizer's encoder do not count: generation does not run them.
    """
    for name, layer, plain in _pairs(module, skeleton(module)):
        if _is_below(name, ENCODER):
            continue
        reason = _other_kind(layer, plain) or _other_settings(layer, plain) or _other_weights(layer, plain)
        if reason is None and name:
            reason = _other_calls(layer, plain)
        if reason is not None:
            return f"{name or 'it'} {reason}"
    return None


def weights(module: Model | Tokenizer, plain: nn.Module | None = None, *, omit: str | None = None) -> dict[str, Tensor]:
    """All parameters and buffers under their plain names, detached: parametrized, weight-normed and pruned ones as
    they take part in the forward pass, sharded ones whole (then all processes must call it alike).

    Args:
        plain: what :func:`skeleton` made of it, where it is at hand.
        omit: leave out this layer.

    Raises ValueError naming a layer that has none of these weights.
    """
    found: dict[str, Tensor] = {}
    for name, layer, expected in _pairs(module, plain or skeleton(module)):
        if omit is not None and _is_below(name, omit):
            continue
        if (reason := _other_kind(layer, expected) or _other_weights(layer, expected)) is not None:
            raise ValueError(f"{type(module).__name__}: {name or 'it'} {reason}; {REMEDY}")
        for key in _names(expected):
            found[f"{name}.{key}" if name else key] = _effective(layer, key)
    return found


def surplus(module: Model | Tokenizer) -> str | None:
    """The first weight that a plain module of this configuration does not have, or None: a file would lose it."""
    plain = dict(_named(skeleton(module)))
    for name, layer in _named(module):
        counterpart = plain.get(name)
        if counterpart is None:
            if extra := next(iter(layer.state_dict()), None):
                return f"{name}.{extra}"
        elif not _reweighted(layer):
            for key in _names(layer):
                if key not in layer._non_persistent_buffers_set and getattr(counterpart, key, None) is None:
                    return f"{name}.{key}" if name else key
    return None


def _is_below(name: str, layer: str) -> bool:
    return name == layer or name.startswith(layer + ".")


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, WRAPPERS):
            module = module.module
        elif "_orig_mod" in module._modules:  # torch.compile's OptimizedModule, whose class is private
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def _named(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """named_modules, without wrappers and parametrizations."""
    yield name, module
    for child, inner in module.named_children():
        if child != "parametrizations":
            yield from _named(_unwrapped(inner), f"{name}.{child}" if name else child)


def _pairs(
    module: nn.Module | None, plain: nn.Module, name: str = ""
) -> Iterator[tuple[str, nn.Module | None, nn.Module]]:
    """Each layer, beside the plain one; below a layer of another kind there is nothing to compare."""
    yield name, module, plain
    if _other_kind(module, plain) is None:
        for child, expected in plain.named_children():
            inner = getattr(module, child, None)
            inner = _unwrapped(inner) if isinstance(inner, nn.Module) else None
            yield from _pairs(inner, expected, f"{name}.{child}" if name else child)


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    """What decides how modules of this class compute. Dynamic subclasses, of parametrize and FSDP2, leave it alone."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if isinstance(value, FunctionType | property) and not name.startswith("__"):
                yield name, getattr_static(kind, name)


def _other_kind(layer: nn.Module | None, plain: nn.Module) -> str | None:
    kind = type(plain)
    if layer is None:
        return f"is missing, a {kind.__name__}"
    if any(getattr_static(type(layer), name, None) is not method for name, method in _methods(kind)):
        return f"is a {type(layer).__name__} of {type(layer).__module__}, not a {kind.__name__}"
    children = [list(m._modules) for m in (layer, plain)]
    if isinstance(plain, nn.Sequential | nn.ModuleList) and children[0] != children[1]:
        return f"has the layers {', '.join(children[0])}, not {', '.join(children[1])}"
    return None


def _other_settings(layer: nn.Module | None, plain: nn.Module) -> str | None:
    for name, value in vars(plain).items():
        if name in ("training", "class_names") or name.startswith("_"):
            continue
        if (got := getattr(layer, name, None)) != value:
            return f"has {name} {got!r}, not {value!r}"
    return None


def _other_weights(layer: nn.Module | None, plain: nn.Module) -> str | None:
    """Weights of another class, such as quantized ones, of another shape, or on no device."""
    for name in _names(plain):
        if _is_reweighted(layer, name):
            continue
        value, expected = getattr(layer, name, None), getattr(plain, name)
        if not isinstance(value, Tensor):
            return f"has no {name}"
        if type(value) not in (Tensor, nn.Parameter) and not is_sharded(value):
            return f"has a {type(value).__name__} as its {name}, not a plain tensor"
        if value.is_floating_point() != expected.is_floating_point():
            return f"has a {name} in {value.dtype}"
        if value.shape != expected.shape:
            return f"has a {name} of shape {tuple(value.shape)}, not {tuple(expected.shape)}"
        if value.is_meta:
            return f"has a {name} without storage, on the meta device"
    return None


def _other_calls(layer: nn.Module | None, plain: nn.Module) -> str | None:
    assert layer is not None
    if any(name in vars(layer) for name, _ in _methods(type(plain))):
        return "has a method replaced on the instance"
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    if any(not isinstance(hook, REWEIGHTING) and not _is_sharding(hook) for hook in hooks):
        return "has a forward hook"
    return None


def _is_sharding(hook: Callable[..., Any]) -> bool:
    """FSDP2's, which gathers weights or scatters them again."""
    return getattr(hook, "__module__", "").startswith("torch.distributed.")


def _names(plain: nn.Module) -> list[str]:
    """Parameters and buffers of the layer itself."""
    own = {**plain._parameters, **plain._buffers}
    return [name for name, value in own.items() if value is not None]


def _reweighted(layer: nn.Module) -> bool:
    hooks = layer._forward_pre_hooks.values()
    return parametrize.is_parametrized(layer) or any(isinstance(hook, REWEIGHTING) for hook in hooks)


def _is_reweighted(layer: nn.Module | None, name: str) -> bool:
    return layer is not None and _reweighted(layer) and name not in layer._parameters and name not in layer._buffers


@torch.no_grad()
def _effective(layer: nn.Module | None, name: str) -> Tensor:
    assert layer is not None
    if _is_reweighted(layer, name):
        if parametrize.is_parametrized(layer, name):
            # A copy, since spectral norm counts the calls in training mode.
            value = copy.deepcopy(layer.parametrizations[name]).eval()()  # type: ignore[index, union-attr]
        else:
            shallow = copy.copy(layer)  # where the hooks write
            shallow.training = False
            for hook in layer._forward_pre_hooks.values():
                if isinstance(hook, REWEIGHTING):
                    hook(shallow, ())
            value = getattr(shallow, name)
    else:
        value = getattr(layer, name)
    value = value.detach()
    return value.full_tensor() if is_sharded(value) else value
