"""Cached copies of models and tokenizers for inference: dtype, memory layout, prepacked weights."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mvar.inference.dtypes import fastest_dtype
from mvar.inference.model import InferenceModel
from mvar.models.autoencoder import UpLevel
from mvar.models.sharding import is_sharded
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model, ScaleTransformer
from mvar.models.weights import ENCODER, REMEDY, custom_layer, plain_module, weights
from mvar.utils.errors import message

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTING_TYPES = (int, float, str, tuple, type(None))


def prepared_model(model: Model, dtype: torch.dtype | None) -> ScaleTransformer:
    """Return a copy of the model for inference in `dtype`, cached until the model's weights or layers change.

    Changes are detected by torch's version counters, which optimizers, load_state_dict and in-place operations
    increment; writes through `.data` do not.

    A model with custom layers (:func:`mvar.models.weights.custom_layer`) is returned unchanged.

    Args:
        dtype: None for the device's fastest, or for a model with custom layers its own.

    Raises:
        ValueError: a model with custom layers has another dtype or is sharded.
    """
    copy: ScaleTransformer = _cached(model, dtype, _prepare_model)
    return copy


def prepared_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype | None, compiled: bool = False) -> Tokenizer:
    """Return a copy of the tokenizer for decoding in `dtype` and channels last, cached as in :func:`prepared_model`.

    The quantizer stays in float32. The encoder is on the meta device.

    Args:
        compiled: run the decoder through torch.compile.
    """
    copy: Tokenizer = _cached(tokenizer, dtype, _prepare_compiled_tokenizer if compiled else _prepare_tokenizer)
    return copy


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
        self.custom_layer = custom_layer(module)
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
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}; got {dtype}")
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
    return InferenceModel(plain, dtype).eval().requires_grad_(False)


def _normal_tensor(t: Tensor) -> Tensor:
    """Return the tensor, or a copy of an inference tensor, which could not be used outside of inference mode."""
    return t.clone() if t.is_inference() else t


def _prepare_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype) -> Tokenizer:
    copy = plain_module(tokenizer)
    state = {
        name: _normal_tensor(t if name.startswith("quantize.") or not t.is_floating_point() else t.to(dtype))
        for name, t in weights(tokenizer, copy, omit=ENCODER).items()
    }
    missing, unexpected = copy.load_state_dict(state, assign=True, strict=False)
    if unexpected or any(not name.startswith(ENCODER + ".") for name in missing):
        raise RuntimeError(f"tokenizer: state dict: missing {missing}, unexpected {unexpected}")
    for module in (copy.post_quant_conv, copy.decoder):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for level in copy.decoder.modules():
        if isinstance(level, UpLevel) and isinstance(level.upsample, nn.Sequential):
            level.upsample = fuse_upsample_conv(level.upsample.conv)  # type: ignore[assignment, arg-type]
    return copy


def _prepare_compiled_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype) -> Tokenizer:
    copy = _prepare_tokenizer(tokenizer, dtype)
    copy.decoder.compile(dynamic=False)
    return copy


def fuse_upsample_conv(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Fuse nearest-neighbor upsampling by 2 and `conv` (3×3) into one transposed convolution of stride 2.

    In one dimension the upsampled row is s₀ s₀ s₁ s₁ …, so that two of the three taps w read the same source pixel:

        out[2i]   = w₀·s[i−1] + (w₁+w₂)·s[i]
        out[2i+1] = (w₀+w₁)·s[i] + w₂·s[i+1]

    4 multiplications per pixel instead of 9. VAR's upsampling layers at 256×256 take 46 % of their time in float32 and
    49 % in bfloat16 (two AMD Zen 5 cores).
    """
    fold = conv.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # (taps of the result, taps of conv)
    weight = torch.einsum("ocij,ki,lj->cokl", conv.weight, fold, fold)
    in_channels, out_channels = weight.shape[:2]
    fused = nn.ConvTranspose2d(
        in_channels, out_channels, kernel_size=4, stride=2, padding=1, dtype=weight.dtype, device="meta"
    )
    fused.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    fused.bias = conv.bias
    return fused
