"""A model and a decoder made ready for inference, once: dtype, layout, packed weights."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvar.autoencoder import UpLevel
from mvar.layers import FeedForward
from mvar.model import Model
from mvar.modulation import JoinedModulation
from mvar.packed import PackedFeedForward, PackedLinear, packs
from mvar.tokenizer import Tokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Parameters of the recurrence, which is computed in float32: rounding them would move every decay.
FLOAT32_PARAMETERS = ("dt_bias", "A_log", "D", "scale_mul_1H11")


def prepared_model(model: Model, dtype: torch.dtype) -> Model:
    """A copy of the model for inference in `dtype`, made once and anew when the model's weights have changed.

    Changes are seen by torch's version counters: those of optimisers, load_state_dict and in-place operations are;
    writes through `.data`, which torch does not count, are not.
    """
    copy: Model = _cached(model, dtype, _copy_model)
    return copy


def prepared_tokenizer(tokenizer: Tokenizer, dtype: torch.dtype, compiled: bool = False) -> Tokenizer:
    """A copy that decodes in `dtype` and channels last, by torch.compile if asked for, made once likewise.

    The quantizer stays in float32. The encoder is of no use here: it has no storage.
    """
    copy: Tokenizer = _cached(tokenizer, dtype, _compiled_tokenizer if compiled else _copy_tokenizer)
    return copy


def release(module: nn.Module) -> None:
    """Drop a module's copies, and with them the graphs of them. They are made anew when they are needed."""
    _copies.pop(module, None)


def counts_changes(module: nn.Module) -> bool:
    """Whether torch counts the versions of its weights: not of those made in inference mode."""
    return not any(t.is_inference() for t in _weights(module))


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@dataclass
class _Copies:
    """The copies of a module by maker and dtype, and the weights they were made from: tensor, address, version."""

    weights: list[tuple[weakref.ref[Tensor], int, int]]
    made: dict[tuple[Callable[..., nn.Module], torch.dtype], Any]

    def are_of(self, tensors: list[Tensor]) -> bool:
        now = [(t, t.data_ptr(), t._version) for t in tensors]
        same = (ref() is t and rest == known for (ref, *known), (t, *rest) in zip(self.weights, now, strict=False))
        return len(now) == len(self.weights) and all(same)


_copies: weakref.WeakKeyDictionary[nn.Module, _Copies] = weakref.WeakKeyDictionary()


def _cached(module: nn.Module, dtype: torch.dtype, make: Callable[[Any, torch.dtype], nn.Module]) -> Any:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}; got {dtype}")
    if not counts_changes(module):
        return make(module, dtype)  # no telling whether they changed
    tensors = _weights(module)
    known = _copies.get(module)
    if known is None or not known.are_of(tensors):
        known = _Copies([(weakref.ref(t), t.data_ptr(), t._version) for t in tensors], {})
        _copies[module] = known
    if (make, dtype) not in known.made:
        known.made[make, dtype] = make(module, dtype)
    return known.made[make, dtype]


def _copy_model(model: Model, dtype: torch.dtype) -> Model:
    with torch.device("meta"):
        copy = type(model)(model.config)
    state = {
        name: t.to(dtype) if t.is_floating_point() and not name.endswith(FLOAT32_PARAMETERS) else t
        for name, t in model.state_dict().items()
    }
    copy.load_state_dict(state, assign=True)
    del state  # of which the copy need not keep everything
    copy.eval().requires_grad_(False)
    _join_modulation(copy)
    for block in copy.typed_blocks():
        block.attn.mat_qkv.bias = nn.Parameter(block.attn.joined_bias(), requires_grad=False)
    if packs(model.lvl_1L.device, dtype):
        _pack(copy)
    return copy


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
    with torch.device("meta"):
        copy = Tokenizer(tokenizer.config)
    state = {
        name: t.to(torch.float32 if name.startswith("quantize.") else dtype)
        for name, t in tokenizer.state_dict().items()
        if not name.startswith("encoder.")
    }
    copy.load_state_dict(state, assign=True, strict=False)
    for module in (copy.post_quant_conv, copy.decoder):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    copy.eval().requires_grad_(False)
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
    doubling = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1, device="meta")
    doubling.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    doubling.bias = conv.bias
    return doubling
