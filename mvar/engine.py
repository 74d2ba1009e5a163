"""A model and a decoder made ready for inference, once: dtype, layout, packed weights."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mvar.autoencoder import UpLevel
from mvar.model import MVAR, FeedForward
from mvar.packed import PackedFeedForward, PackedLinear, PackedUpsample, packs
from mvar.tokenizer import Tokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Parameters of the recurrence, which is computed in float32: rounding them would move every decay.
FLOAT32_PARAMETERS = ("dt_bias", "A_log", "D", "scale_mul_1H11")


def prepared_model(model: MVAR, dtype: torch.dtype) -> MVAR:
    """A copy of the model for inference in `dtype`, made once and anew when the model's weights have changed.

    Changes are seen by torch's version counters: those of optimisers, load_state_dict and in-place operations are;
    writes through `.data`, which torch does not count, are not.
    """
    copy: MVAR = _cached(model, dtype, _copy_model)
    return copy


def prepared_decoder(tokenizer: Tokenizer, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`tokenizer.decode_features` with the decoder in `dtype` and channels last, made once likewise."""
    copy: Tokenizer = _cached(tokenizer, dtype, _copy_decoder)
    return copy.decode_features


_copies: WeakKeyDictionary[nn.Module, tuple[list[int], dict[torch.dtype, Any]]] = WeakKeyDictionary()


def _cached(module: nn.Module, dtype: torch.dtype, make: Callable[[Any, torch.dtype], nn.Module]) -> Any:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}; got {dtype}")
    tensors = [*module.parameters(), *module.buffers()]
    versions = [n for t in tensors for n in (t.data_ptr(), 0 if t.is_inference() else t._version)]
    known, copies = _copies.get(module, ([], {}))
    if known != versions:
        copies = {}
        _copies[module] = versions, copies
    if dtype not in copies:
        copies[dtype] = make(module, dtype)
    return copies[dtype]


def _copy_model(model: MVAR, dtype: torch.dtype) -> MVAR:
    with torch.device("meta"):
        copy = MVAR(model.config)
    state = {
        name: t.to(dtype) if t.is_floating_point() and not name.endswith(FLOAT32_PARAMETERS) else t
        for name, t in model.state_dict().items()
    }
    copy.load_state_dict(state, assign=True)
    copy.eval().requires_grad_(False)
    if packs(model.lvl_1L.device, dtype):
        for name, module in list(copy.named_modules()):
            if isinstance(module, FeedForward):
                copy.set_submodule(name, PackedFeedForward(module))
            elif isinstance(module, nn.Linear) and not name.endswith((".fc1", ".fc2")):
                copy.set_submodule(name, PackedLinear(module))
    return copy


def _copy_decoder(tokenizer: Tokenizer, dtype: torch.dtype) -> Tokenizer:
    with torch.device("meta"):
        copy = Tokenizer(tokenizer.config)
    # The encoder is of no use here: it stays without storage.
    state = {name: t.to(dtype) for name, t in tokenizer.state_dict().items() if not name.startswith("encoder.")}
    copy.load_state_dict(state, assign=True, strict=False)
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    copy.eval().requires_grad_(False)
    if packs(tokenizer.quantize.embedding.weight.device, dtype):
        for name, module in list(copy.decoder.named_modules()):
            if isinstance(module, UpLevel) and isinstance(module.upsample, nn.Sequential):
                copy.decoder.set_submodule(f"{name}.upsample", PackedUpsample(module.upsample.conv))  # type: ignore[arg-type]
    return copy
