"""Cached copies of models and tokenizers for inference: dtype, memory layout, prepacked weights."""

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mvar.inference.dtypes import fastest_dtype
from mvar.inference.model import InferenceModel, check_dtype
from mvar.inference.tokenizer import InferenceTokenizer
from mvar.models.sharding import is_sharded
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model, ScaleTransformer
from mvar.models.weights import ENCODER, REMEDY, custom_layer, plain_module, weights
from mvar.utils.errors import message

SETTING_TYPES = (int, float, str, tuple, type(None))


def prepared_model(model: Model | InferenceModel, dtype: torch.dtype | None, name: str = "model") -> ScaleTransformer:
    """Return a copy of the model for inference in `dtype`, cached until the model's weights or layers change.

    Changes are detected by torch's version counters, which optimizers, load_state_dict and in-place operations
    increment; writes through `.data` do not.

    An :class:`InferenceModel`, and a model with custom layers (:func:`mvar.models.weights.custom_layer`), is returned
    unchanged.

    Args:
        dtype: None for the device's fastest, or for a model that is returned unchanged its own.
        name: of the model, for messages.

    Raises:
        ValueError: a model that is returned unchanged has another dtype or, with custom layers, is sharded.
    """
    if isinstance(model, InferenceModel):
        _check_dtype(model, dtype, name)
        return model
    prepared: ScaleTransformer = _cached(model, dtype, _prepare_model)
    return prepared


def prepared_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype | None, compiled: bool = False) -> Tokenizer:
    """Return an :class:`InferenceTokenizer` in `dtype` without encoder, cached as in :func:`prepared_model`.

    The quantizer stays in float32. An :class:`InferenceTokenizer` is returned unchanged, unless `compiled`.

    Args:
        compiled: run the decoder through torch.compile.
    """
    if isinstance(tokenizer, InferenceTokenizer):
        _check_dtype(tokenizer, dtype, "tokenizer")
        if not compiled:
            return tokenizer
    prepared: Tokenizer = _cached(tokenizer, dtype, _prepare_compiled_tokenizer if compiled else _prepare_tokenizer)
    return prepared


def _check_dtype(module: InferenceModel | InferenceTokenizer, dtype: torch.dtype | None, name: str) -> None:
    if dtype not in (None, module.dtype):
        raise ValueError(f"dtype: the {name} was loaded in {module.dtype} for inference, got {dtype}")


def release(module: nn.Module) -> None:
    """Drop the copies of a module and their CUDA graphs."""
    with _lock:
        _copies.pop(module, None)


def has_version_counters(module: nn.Module) -> bool:
    """Whether torch tracks versions of all weights, which it does not for inference tensors."""
    return not any(t.is_inference() for t in _tensors(module))


def custom_layer_of(module: Model | Tokenizer) -> str | None:
    """Cached :func:`mvar.models.weights.custom_layer`: if not None, generation uses the module without a copy."""
    with _lock:
        return _copies_of(module).custom_layer


def own_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the first floating-point weight."""
    return next(t.dtype for t in _tensors(module) if t.is_floating_point())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class _Copies:
    """Copies of a module by function and dtype, with the weights, layers, hooks and settings of the original."""

    def __init__(self, module: Model | Tokenizer) -> None:
        self.weights = [(weakref.ref(t), *_version(t)) for t in _tensors(module)]
        self.layers = _layers(module)
        self.custom_layer = None if isinstance(module, InferenceTokenizer) else custom_layer(module)
        self.copies: dict[tuple[Callable[..., nn.Module], torch.dtype], Any] = {}

    def are_current(self, module: nn.Module) -> bool:
        tensors = _tensors(module)
        unchanged = (
            (ref() is t and tuple(version) == _version(t))
            for (ref, *version), t in zip(self.weights, tensors, strict=False)
        )
        return len(tensors) == len(self.weights) and all(unchanged) and _layers(module) == self.layers


def _version(t: Tensor) -> tuple[int, int]:
    if t.is_inference():
        return 0, 0
    return 0 if is_sharded(t) else t.data_ptr(), t._version


def _layers(module: nn.Module) -> list[Any]:
    """Snapshot of layers, hooks and settings, to detect changes."""
    return [
        (
            weakref.ref(layer),
            type(layer),
            list(layer._forward_hooks),
            list(layer._forward_pre_hooks),
            [(k, v if isinstance(v, SETTING_TYPES) else id(v)) for k, v in vars(layer).items() if _is_setting(k, v)],
        )
        for layer in module.modules()
    ]


def _is_setting(name: str, value: object) -> bool:
    return not name.startswith("_") and name != "training" and not isinstance(value, Tensor)


_lock = threading.RLock()
_copies: weakref.WeakKeyDictionary[nn.Module, _Copies] = weakref.WeakKeyDictionary()


def _copies_of(module: Model | Tokenizer) -> _Copies:
    """Return the cached copies, or an empty record after a change or without version counters."""
    try:
        tracked = has_version_counters(module)
    except ValueError as error:  # raised by torch for a lazy parameter
        lazy = next((name for name, t in module.named_parameters() if is_lazy(t)), "a weight")
        raise ValueError(f"{type(module).__name__}: {lazy} is not initialized: {message(error)}; {REMEDY}") from error
    if not tracked:
        return _Copies(module)
    cached = _copies.get(module)
    if cached is None or not cached.are_current(module):
        cached = _copies[module] = _Copies(module)
    return cached


def _cached(module: Any, dtype: torch.dtype | None, make: Callable[[Any, torch.dtype], nn.Module]) -> Any:
    check_dtype(dtype)
    # The lock ensures that only one thread makes the copy.
    with _lock, torch.inference_mode(False), torch.no_grad():
        cached = _copies_of(module)
        if cached.custom_layer is not None:
            _check_usable(module, dtype or own_dtype(module), cached.custom_layer)
            return module
        dtype = dtype or fastest_dtype(next(module.parameters()).device)
        if (make, dtype) not in cached.copies:
            cached.copies[make, dtype] = make(module, dtype)
        return cached.copies[make, dtype]


def _check_usable(module: Model | Tokenizer, dtype: torch.dtype, reason: str) -> None:
    """Raise ValueError unless the module can be used in `dtype` without a copy."""
    kind = "model" if isinstance(module, Model) else "tokenizer"
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if is_sharded(value):
            raise ValueError(f"{kind}: {reason}, which is not supported if it is sharded; {REMEDY}")
        if value.is_meta:
            raise ValueError(f"{kind}: {name} is on the meta device, without storage")
        if value.is_floating_point() and value.dtype != dtype:
            raise ValueError(
                f"dtype: the {kind} is used without a copy, as {reason}: expected {value.dtype} of {name}, got {dtype}"
            )


def _prepare_model(model: Model, dtype: torch.dtype) -> InferenceModel:
    plain = plain_module(model)
    plain.load_state_dict({name: _normal_tensor(t) for name, t in weights(model, plain).items()}, assign=True)
    return InferenceModel(plain, dtype)


def _normal_tensor(t: Tensor) -> Tensor:
    """Return the tensor, or a copy of an inference tensor, which could not be used outside of inference mode."""
    return t.clone() if t.is_inference() else t


def _prepare_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype) -> InferenceTokenizer:
    state = weights(tokenizer, omit=ENCODER)
    return InferenceTokenizer(tokenizer.config, ((name, _normal_tensor(t)) for name, t in state.items()), dtype)


def _prepare_compiled_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype) -> InferenceTokenizer:
    if isinstance(tokenizer, InferenceTokenizer):
        compiled = copy.copy(tokenizer)
        compiled._modules = tokenizer._modules | {"decoder": copy.copy(tokenizer.decoder)}
    else:
        compiled = _prepare_tokenizer(tokenizer, dtype)
    compiled.decoder.compile(dynamic=False)
    return compiled
