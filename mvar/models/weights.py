"""Effective weights of a module, independent of wrappers and parametrizations.

Copies for inference and weight files contain the layers that the configuration builds, and nothing else. A module is
therefore compared with these layer by layer: torch.compile, DDP, FSDP2, parametrizations, weight norm and pruning are
supported, and other differences are reported with the name of the layer.
"""

import copy
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
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

from mvar.models.sharding import is_sharded
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model, from_config

Module = TypeVar("Module", bound=Model | Tokenizer)

ENCODER = "encoder"
"""Part of a tokenizer that generation does not use."""
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""torch's hooks that compute a weight before each forward pass."""
REMEDY = (
    "restore the layer of the configuration: merge an adapter (peft: merge_and_unload()), "
    "load the weights from before quantization, or call remove_parametrizations"
)


def unwrapped(module: nn.Module, *kinds: type[nn.Module]) -> Any:
    """Return the model or tokenizer inside torch.compile, DataParallel, DistributedDataParallel, AveragedModel or
    peft's PeftModel, whose adapters are layers of the model.

    Raises:
        TypeError: any other class, such as FullyShardedDataParallel, which flattens weights.
    """
    inner = _unwrapped(module) if isinstance(module, nn.Module) else module
    if isinstance(inner, kinds):
        return inner
    expected = " or ".join(f"mvar.{kind.__name__}" for kind in kinds)
    name = type(inner).__name__
    if name == "InferenceModel":  # compared by name, as inference imports models
        advice = ", which is for inference alone: load it without dtype"
    elif name == "FullyShardedDataParallel":  # compared by name, as torch can be built without torch.distributed
        advice = ", which flattens weights: use fully_shard, or load its full state dict into an unwrapped model"
    else:
        advice = ": unwrap it, or merge its adapters" if isinstance(inner, nn.Module) else ""
    raise TypeError(f"expected an {expected}, got a {name}{advice}")


class _SkipInit(TorchFunctionMode):
    """Skip torch.nn.init, as filling a meta tensor imports torch._dynamo: 1.6 of the 2.0 s of loading the digits'
    tokenizer (AMD EPYC, Zen 3)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def without_storage() -> Iterator[None]:
    """Context manager: modules are built on the meta device, without initialization."""
    with torch.device("meta"), _SkipInit():
        yield


def plain_module(module: Module) -> Module:
    """Build a module from the configuration of `module`, without storage."""
    with without_storage():
        plain = from_config(module.config) if isinstance(module, Model) else Tokenizer(module.config)
    return plain.eval().requires_grad_(False)  # type: ignore[return-value]


def custom_layer(module: Model | Tokenizer) -> str | None:
    """Describe the first layer that is not determined by the module's weights and configuration, or return None.

    Such a layer has another class, structure or setting, forward hooks, or a method replaced on the instance. Hooks and
    forward of the module itself and a tokenizer's encoder are ignored, as generation does not run them.
    """
    for name, layer, plain in _layer_pairs(module, plain_module(module)):
        if _is_inside(name, ENCODER):
            continue
        reason = _class_mismatch(layer, plain) or _setting_mismatch(layer, plain) or _weight_mismatch(layer, plain)
        if reason is None and name:
            reason = _call_mismatch(layer, plain)
        if reason is not None:
            return f"{name or 'it'} {reason}"
    return None


def weights(module: Model | Tokenizer, plain: nn.Module | None = None, *, omit: str | None = None) -> dict[str, Tensor]:
    """State dict of all parameters and buffers, detached, with the names of the unwrapped module.

    Parametrized, weight-normed and pruned weights are those of the forward pass. Sharded weights are gathered, a
    collective operation that all processes must call.

    Args:
        plain: :func:`plain_module` of `module`, to avoid building it again.
        omit: name of a layer to omit.

    Raises:
        ValueError: a layer does not have these weights.
    """
    state: dict[str, Tensor] = {}
    for name, layer, expected in _layer_pairs(module, plain or plain_module(module)):
        if omit is not None and _is_inside(name, omit):
            continue
        if (reason := _class_mismatch(layer, expected) or _weight_mismatch(layer, expected)) is not None:
            raise ValueError(f"{type(module).__name__}: {name or 'it'} {reason}; {REMEDY}")
        for key in _tensor_names(expected):
            state[f"{name}.{key}" if name else key] = _effective_weight(layer, key)
    return state


def fingerprint(module: Model | Tokenizer) -> str:
    """SHA-256 of all weights: names, shapes, dtypes and bits."""
    return digest_of(sorted(weights(module).items()))


def digest_of(items: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name, value in items:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def extra_weight(module: Model | Tokenizer) -> str | None:
    """Name of the first weight that the configuration does not have, which :func:`weights` omits, or None."""
    plain = dict(_named_layers(plain_module(module)))
    for name, layer in _named_layers(module):
        expected = plain.get(name)
        if expected is None:
            if extra := next(iter(layer.state_dict()), None):
                return f"{name}.{extra}"
        elif not _has_weight_hooks(layer):
            for key in _tensor_names(layer):
                if key not in layer._non_persistent_buffers_set and getattr(expected, key, None) is None:
                    return f"{name}.{key}" if name else key
    return None


def _is_inside(name: str, layer: str) -> bool:
    return name == layer or name.startswith(layer + ".")


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, WRAPPERS):
            module = module.module
        elif "_orig_mod" in module._modules:  # torch.compile's OptimizedModule, a private class
            module = module._orig_mod  # type: ignore[assignment]
        elif _is_peft_model(module):
            module = module.get_base_model()  # type: ignore[operator]
        else:
            return module


def _is_peft_model(module: nn.Module) -> bool:
    peft = sys.modules.get("peft")  # an optional package, imported by whoever made the module
    return peft is not None and isinstance(module, peft.PeftModel)


def _named_layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """named_modules without wrappers and parametrizations."""
    yield name, module
    for child, inner in module.named_children():
        if child != "parametrizations":
            yield from _named_layers(_unwrapped(inner), f"{name}.{child}" if name else child)


def _layer_pairs(
    module: nn.Module | None, plain: nn.Module, name: str = ""
) -> Iterator[tuple[str, nn.Module | None, nn.Module]]:
    """Yield name, layer and expected layer, except for children of a layer of another class."""
    yield name, module, plain
    if _class_mismatch(module, plain) is None:
        for child, expected in plain.named_children():
            inner = getattr(module, child, None)
            inner = _unwrapped(inner) if isinstance(inner, nn.Module) else None
            yield from _layer_pairs(inner, expected, f"{name}.{child}" if name else child)


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield methods and properties of a class; dynamic subclasses of parametrize and FSDP2 do not override them."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if isinstance(value, FunctionType | property) and not name.startswith("__"):
                yield name, getattr_static(kind, name)


def _class_mismatch(layer: nn.Module | None, plain: nn.Module) -> str | None:
    kind = type(plain)
    if layer is None:
        return f"is missing, a {kind.__name__}"
    if any(getattr_static(type(layer), name, None) is not method for name, method in _methods(kind)):
        return f"is a {type(layer).__name__} of {type(layer).__module__}, not a {kind.__name__}"
    children = [list(m._modules) for m in (layer, plain)]
    if isinstance(plain, nn.Sequential | nn.ModuleList) and children[0] != children[1]:
        return f"has the layers {', '.join(children[0])}, not {', '.join(children[1])}"
    return None


def _setting_mismatch(layer: nn.Module | None, plain: nn.Module) -> str | None:
    for name, value in vars(plain).items():
        if name in ("training", "class_names") or name.startswith("_"):
            continue
        if (got := getattr(layer, name, None)) != value:
            return f"has {name} {got!r}, not {value!r}"
    return None


def _weight_mismatch(layer: nn.Module | None, plain: nn.Module) -> str | None:
    """Describe a weight of another class (such as a quantized one), dtype or shape, or on the meta device."""
    for name in _tensor_names(plain):
        if _is_computed(layer, name):
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


def _call_mismatch(layer: nn.Module | None, plain: nn.Module) -> str | None:
    assert layer is not None
    if any(name in vars(layer) for name, _ in _methods(type(plain))):
        return "has a method replaced on the instance"
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    if any(not isinstance(hook, WEIGHT_HOOKS) and not _is_fsdp_hook(hook) for hook in hooks):
        return "has a forward hook"
    return None


def _is_fsdp_hook(hook: Callable[..., Any]) -> bool:
    """Whether it is a hook of FSDP2, which gathers or frees weights."""
    return getattr(hook, "__module__", "").startswith("torch.distributed.")


def _tensor_names(plain: nn.Module) -> list[str]:
    """Names of the layer's own parameters and buffers."""
    own = {**plain._parameters, **plain._buffers}
    return [name for name, value in own.items() if value is not None]


def _has_weight_hooks(layer: nn.Module) -> bool:
    hooks = layer._forward_pre_hooks.values()
    return parametrize.is_parametrized(layer) or any(isinstance(hook, WEIGHT_HOOKS) for hook in hooks)


def _is_computed(layer: nn.Module | None, name: str) -> bool:
    if layer is None or not _has_weight_hooks(layer):
        return False
    return name not in layer._parameters and name not in layer._buffers


@torch.no_grad()
def _effective_weight(layer: nn.Module | None, name: str) -> Tensor:
    assert layer is not None
    if _is_computed(layer, name):
        if parametrize.is_parametrized(layer, name):
            # A copy in evaluation mode: in training mode spectral norm updates its buffers.
            value = copy.deepcopy(layer.parametrizations[name]).eval()()  # type: ignore[index, union-attr]
        else:
            shallow = copy.copy(layer)  # the hooks set attributes
            shallow.training = False
            for hook in layer._forward_pre_hooks.values():
                if isinstance(hook, WEIGHT_HOOKS):
                    hook(shallow, ())
            value = getattr(shallow, name)
    else:
        value = getattr(layer, name)
    value = value.detach()
    return value.full_tensor() if is_sharded(value) else value
