"""A model and a decoder made ready for inference, once: dtype, layout, packed weights."""

import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mvar.autoencoder import UpLevel
from mvar.errors import message
from mvar.layers import FeedForward, Mamba2, steps_apart
from mvar.model import Model
from mvar.modulation import JoinedModulation
from mvar.packed import PackedFeedForward, PackedLinear, packs
from mvar.sharding import is_sharded
from mvar.tokenizer import Tokenizer
from mvar.weights import ENCODER, REMEDY, own_layer, skeleton, weights
from mvar_kernels.dispatch import fastest_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Parameters of the recurrence, which is computed in float32: rounding them would move every decay.
FLOAT32_PARAMETERS = ("dt_bias", "dt_proj.weight", "A_log", "D", "scale_mul_1H11")
SETTINGS = (int, float, str, tuple, type(None))


def prepared_model(model: Model, dtype: torch.dtype | None) -> Model:
    """A copy of the model for inference in `dtype`, made once and anew when the model's weights or layers have changed.

    Changes are seen by torch's version counters: those of optimisers, load_state_dict and in-place operations are;
    writes through `.data`, which torch does not count, are not.

    A model with layers of its own (:func:`mvar.weights.own_layer`) is used itself. ValueError where that is impossible:
    it has another dtype, or is sharded. `dtype` None: the device's fastest, or for such a model its own.
    """
    copy: Model = _cached(model, dtype, _copy_model)
    return copy


def prepared_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype | None, compiled: bool = False) -> Tokenizer:
    """A copy that decodes in `dtype` and channels last, by torch.compile if asked for, made once likewise.

    The quantizer stays in float32. The encoder is of no use here: it has no storage.
    """
    copy: Tokenizer = _cached(tokenizer, dtype, _compiled_tokenizer if compiled else _copy_tokenizer)
    return copy


def release(module: nn.Module) -> None:
    """Drop a module's copies, and with them the graphs of them. They are made anew when they are needed."""
    with _lock:
        _copies.pop(module, None)


def counts_changes(module: nn.Module) -> bool:
    """Whether torch counts the versions of its weights: not of those made in inference mode."""
    return not any(t.is_inference() for t in _tensors(module))


def used_itself(module: Model | Tokenizer) -> str | None:
    """Which layer of its own makes generation use the module itself and no copy, in words, or None."""
    with _lock:
        return _known(module).own_layer


def own_dtype(module: nn.Module) -> torch.dtype:
    """The one that its floating-point weights have, or the first of them."""
    return next(t.dtype for t in _tensors(module) if t.is_floating_point())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class _Copies:
    """The copies of a module by maker and dtype, and what they were made from: weights, layers, hooks, settings."""

    def __init__(self, module: Model | Tokenizer) -> None:
        self.weights = [(weakref.ref(t), *_version(t)) for t in _tensors(module)]
        self.layers = _layers(module)
        self.own_layer = own_layer(module)
        self.made: dict[tuple[Callable[..., nn.Module], torch.dtype], Any] = {}

    def are_of(self, module: nn.Module) -> bool:
        now = _tensors(module)
        known = (
            (ref() is t and tuple(rest) == _version(t)) for (ref, *rest), t in zip(self.weights, now, strict=False)
        )
        return len(now) == len(self.weights) and all(known) and _layers(module) == self.layers


def _version(t: Tensor) -> tuple[int, int]:
    if t.is_inference():
        return 0, 0
    return 0 if is_sharded(t) else t.data_ptr(), t._version


def _layers(module: nn.Module) -> list[Any]:
    """What a change of layers, hooks or settings changes."""
    return [
        (
            weakref.ref(layer),
            type(layer),
            list(layer._forward_hooks),
            list(layer._forward_pre_hooks),
            [(k, v if isinstance(v, SETTINGS) else id(v)) for k, v in vars(layer).items() if _is_setting(k, v)],
        )
        for layer in module.modules()
    ]


def _is_setting(name: str, value: object) -> bool:
    return not name.startswith("_") and name != "training" and not isinstance(value, Tensor)


_lock = threading.RLock()
_copies: weakref.WeakKeyDictionary[nn.Module, _Copies] = weakref.WeakKeyDictionary()


def _known(module: Model | Tokenizer) -> _Copies:
    """Its copies, none of them if there is no telling that the weights are still the same."""
    try:
        counted = counts_changes(module)
    except ValueError as error:  # torch's, of a parameter that has no values yet
        lazy = next((name for name, t in module.named_parameters() if is_lazy(t)), "a weight")
        raise ValueError(f"{type(module).__name__}: {lazy} has no values yet: {message(error)}; {REMEDY}") from error
    if not counted:
        return _Copies(module)
    known = _copies.get(module)
    if known is None or not known.are_of(module):
        known = _copies[module] = _Copies(module)
    return known


def _cached(module: Any, dtype: torch.dtype | None, make: Callable[[Any, torch.dtype], nn.Module]) -> Any:
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}; got {dtype}")
    # Of several threads one makes the copy. Tensors made in inference mode could not be used outside it.
    with _lock, torch.inference_mode(False), torch.no_grad():
        known = _known(module)
        if known.own_layer is not None:
            _check_usable(module, dtype or own_dtype(module), known.own_layer)
            return module
        dtype = dtype or fastest_dtype(next(module.parameters()).device)
        if (make, dtype) not in known.made:
            known.made[make, dtype] = make(module, dtype)
        return known.made[make, dtype]


def _check_usable(module: Model | Tokenizer, dtype: torch.dtype, reason: str) -> None:
    """Raise ValueError unless the module itself can generate in `dtype`."""
    kind = "model" if isinstance(module, Model) else "tokenizer"
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if is_sharded(value):
            raise ValueError(f"{kind}: {reason}, so that it would be used itself, and it is sharded; {REMEDY}")
        if value.is_meta:
            raise ValueError(f"{kind}: {name} has no storage, it is on the meta device")
        if value.is_floating_point() and value.dtype != dtype:
            raise ValueError(
                f"dtype: the {kind} is used itself, as {reason}: expected {value.dtype}, which {name} has, got {dtype}"
            )


def _copy_model(model: Model, dtype: torch.dtype) -> Model:
    copy = skeleton(model)
    state = weights(model, copy)
    if steps_apart(model.lvl_1L.device, dtype):
        _split_steps(copy, state)
    for name, t in state.items():
        state[name] = _as(t, torch.float32 if name.endswith(FLOAT32_PARAMETERS) else dtype)
    copy.requires_grad_(False).load_state_dict(state, assign=True)
    del state  # of which the copy need not keep everything
    _join_modulation(copy)
    for block in copy.typed_blocks():
        block.attn.mat_qkv.bias = nn.Parameter(block.attn.joined_bias(), requires_grad=False)
    if packs(model.lvl_1L.device, dtype):
        _pack(copy)
    return copy


def _split_steps(skeleton: Model, state: dict[str, Tensor]) -> None:
    """Make of each mixer's in_proj one without the rows of dt, and a dt_proj of these."""
    for name, layer in skeleton.named_modules():
        if not isinstance(layer, Mamba2):
            continue
        columns, features = layer.dt_bias.numel(), layer.in_proj.in_features
        rest = layer.in_proj.out_features - columns
        layer.in_proj = nn.Linear(features, rest, bias=False, dtype=torch.float32, device="meta")
        layer.dt_proj = nn.Linear(features, columns, bias=False, dtype=torch.float32, device="meta")
        whole = state[f"{name}.in_proj.weight"]
        state[f"{name}.in_proj.weight"], state[f"{name}.dt_proj.weight"] = whole.split([rest, columns])


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point weights in `dtype`, all of them as ordinary tensors."""
    t = t.to(dtype) if t.is_floating_point() else t
    return t.clone() if t.is_inference() else t


def _pack(model: Model) -> None:
    """Pack layer after layer, the largest first; each one's weight goes before the next one is packed."""
    layers = [name for name, module in model.named_modules() if isinstance(module, FeedForward | nn.Linear)]
    for name in sorted(layers, key=lambda name: name.startswith("joined_modulation."), reverse=True):
        if name.endswith((".fc1", ".fc2")):
            continue  # gone with their FeedForward
        layer = model.get_submodule(name)
        packed = PackedFeedForward(layer) if isinstance(layer, FeedForward) else PackedLinear(cast(nn.Linear, layer))
        model.set_submodule(name, packed)


def _join_modulation(model: Model) -> None:
    shared = model.config.shared_adaln
    layers = [model.shared_ada_lin] if shared else [block.ada_lin for block in model.typed_blocks()]
    offsets = [block.ada_gss.flatten(0, 2) for block in model.typed_blocks()] if shared else []
    *linears, head = (cast(nn.Linear, cast(nn.Sequential, layer)[-1]) for layer in (*layers, model.head_nm.ada_lin))
    model.joined_modulation = JoinedModulation(linears, head, offsets)
    for module in model.modules():
        for name in ("ada_lin", "ada_gss", "shared_ada_lin"):  # joined: their storage may go
            if hasattr(module, name):
                delattr(module, name)


def _copy_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype) -> Tokenizer:
    copy = skeleton(tokenizer)
    state = {
        name: _as(t, torch.float32 if name.startswith("quantize.") else dtype)
        for name, t in weights(tokenizer, copy, omit=ENCODER).items()
    }
    left_out, unknown = copy.load_state_dict(state, assign=True, strict=False)
    if unknown or any(not name.startswith(ENCODER + ".") for name in left_out):
        raise RuntimeError(f"a copy without {left_out}, with {unknown}")
    for module in (copy.post_quant_conv, copy.decoder):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, module in list(copy.decoder.named_modules()):
        if isinstance(module, UpLevel) and isinstance(module.upsample, nn.Sequential):
            copy.decoder.set_submodule(f"{name}.upsample", doubling_convolution(module.upsample.conv))  # type: ignore[arg-type]
    return copy


def _compiled_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype) -> Tokenizer:
    copy = _copy_tokenizer(tokenizer, dtype)
    copy.decoder.compile(dynamic=False)
    return copy


def doubling_convolution(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Nearest-neighbour doubling and then `conv` (3×3), as one transposed convolution of stride 2.

    In one dimension the doubled row is s₀ s₀ s₁ s₁ …, so of the taps w at an even place two fall on one source pixel,
    and at an odd place the other two:

        out[2i]   = w₀·s[i−1] + (w₁+w₂)·s[i]
        out[2i+1] = (w₀+w₁)·s[i] + w₂·s[i+1]

    4 products a pixel instead of 9. VAR's upsampling layers at 256×256 take 46 % of the time they took in float32 and
    49 % in bfloat16 (two AMD Zen 5 cores).
    """
    fold = conv.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # [tap of the result][tap of conv]
    weight = torch.einsum("ocij,ki,lj->cokl", conv.weight, fold, fold)
    in_channels, out_channels = weight.shape[:2]
    doubling = nn.ConvTranspose2d(
        in_channels, out_channels, kernel_size=4, stride=2, padding=1, dtype=weight.dtype, device="meta"
    )
    doubling.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    doubling.bias = conv.bias
    return doubling
