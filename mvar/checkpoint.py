"""Loading and saving weights: official .pth files, and safetensors files of mvar that contain the configuration."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mvar.inference.model import InferenceModel
from mvar.inference.tokenizer import InferenceTokenizer
from mvar.models.config import SCHEDULES
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model, from_config
from mvar.models.weights import extra_weight, unwrapped, weights
from mvar.stored import CLASS_NAMES, CLASS_NAMES_KEY, CONFIG_KEY, StoredModel, StoredTokenizer, are_class_names
from mvar.utils.errors import message
from mvar.utils.files import atomic_write

ASSETS = Path(__file__).parent / "assets"
STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


@overload
def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> Model: ...


@overload
def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype,
    labels: Sequence[int] | Tensor | None = None,
) -> InferenceModel: ...


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    labels: Sequence[int] | Tensor | None = None,
) -> Model | InferenceModel:
    """Load an M-VAR or VAR model in float32 and evaluation mode, or for inference in one dtype.

    Reads official files, files of :func:`save`, and trainers' checkpoints: state dicts under any names ("trainer" and
    "var_wo_ddp" as VAR's, "model", "state_dict", "ema", which takes precedence), with or without "module." and
    "_orig_mod." in the names of weights.

    Files of :func:`save` contain the configuration, and `class_names` if the model had them. For others the
    configuration is inferred: M-VAR from its mixers, q/k norm from the presence of `scale_mul_1H11`, patch numbers from
    `blocks.0.attn.patch_nums` or (VAR) `lvl_1L`, and sizes from shapes.

    Args:
        path: a file, or hf://owner/repository/file on the Hugging Face Hub; or a folder of `save_pretrained`, or
            hf://owner/repository, whose config.json takes precedence over the configuration in the weights.
        device: device of the weights.
        dtype: float32, bfloat16 or float16 to load the model for inference alone, as an :class:`mvar.InferenceModel`:
            block by block, without a float32 copy, with a peak of memory little above its size. None for a model to
            train, or to use in several dtypes.
        labels: with `dtype`, the only classes that will be generated. The modulation of these and of the unconditional
            class is computed once and replaces the modulation layers, a third of M-VAR's weights, if that saves a
            quarter of them. None for all classes.

    Raises:
        OSError: the file does not exist or could not be downloaded.
        CheckpointError: a truncated file, a pickle with other objects than weights, a missing or unknown name, a wrong
            shape, or a value that is not finite.
        ValueError: another dtype, `labels` without one, or labels that are not classes.
    """
    stored = StoredModel(path, from_config)
    if dtype is not None:
        return stored.inference_model(device, dtype, labels)
    if labels is not None:
        raise ValueError("labels: expected with dtype only, as a model that can be trained keeps its modulation layers")
    return stored.model(device)


@overload
def load_tokenizer(
    path: str | Path,
    *,
    resolution: int | None = None,
    patch_nums: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> Tokenizer: ...


@overload
def load_tokenizer(
    path: str | Path,
    *,
    resolution: int | None = None,
    patch_nums: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype,
    encoder: bool = True,
) -> InferenceTokenizer: ...


def load_tokenizer(
    path: str | Path,
    *,
    resolution: int | None = None,
    patch_nums: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    encoder: bool = True,
) -> Tokenizer | InferenceTokenizer:
    """Load a tokenizer in float32 and evaluation mode, from an official file or a file of :func:`save`.

    Args:
        path, device: as in :func:`load_model`.
        resolution: 256, 512 or 1024, with the published token maps, as the official file is used with several. None to
            infer it from the number of scales: 256×256 from 10, 1024×1024 from 14.
        patch_nums: side lengths of the token maps, instead of `resolution`.
        dtype: float32, bfloat16 or float16 to load the tokenizer for inference alone, with a decoder in this dtype.
            Quantizer and encoder stay in float32.
        encoder: with `dtype`, False to leave out the encoder, which generation does not use.

    Raises:
        OSError, CheckpointError: as :func:`load_model`.
        ValueError: another dtype.
    """
    if dtype is None and not encoder:
        raise ValueError(
            "encoder: expected False with dtype only, as a tokenizer that can be trained keeps its encoder"
        )
    stored = StoredTokenizer(path, Tokenizer, patch_nums=token_maps(resolution, patch_nums))
    return stored.tokenizer(device) if dtype is None else stored.inference_tokenizer(device, dtype, encoder=encoder)


def load_packaged(model: str, tokenizer: str) -> tuple[Model, Tokenizer]:
    """Load a model and a tokenizer that are included in the package, by their names in mvar/assets."""
    return load_model(ASSETS / f"{model}.safetensors"), load_tokenizer(ASSETS / f"{tokenizer}.safetensors")


def save(path: str | Path, module: Model | Tokenizer, *, dtype: torch.dtype | None = None) -> None:
    """Save weights and configuration as safetensors, for :func:`load_model` and :func:`load_tokenizer`.

    Wrapped, sharded, parametrized and pruned modules are saved with their effective weights. Hooks are not saved.

    Args:
        path: the file.
        module: model or tokenizer.
        dtype: of floating-point weights, one of :data:`STORAGE_DTYPES`; None for their own.

    Raises:
        TypeError: not a model or tokenizer, an unsupported wrapper, or another `dtype`.
        ValueError: a layer's weights could not be loaded again or are not finite in `dtype`; the message has its name.
        OSError: the file cannot be written.
    """
    module = _trainable(module)
    names = class_names(module)
    state = weights(module)
    if (extra := extra_weight(module)) is not None:
        raise ValueError(f"{extra} is not a weight of this configuration and would not be saved: remove it first")
    state = with_own_storage({name: t.cpu() for name, t in converted(state, dtype).items()})
    metadata = {CONFIG_KEY: json.dumps(asdict(module.config))}
    if names is not None:
        metadata[CLASS_NAMES_KEY] = json.dumps(names)
    with atomic_write(path) as temporary:
        try:
            save_file(state, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {message(error)}") from error


def _trainable(module: Model | Tokenizer) -> Any:
    """The unwrapped module. TypeError: it was loaded for inference."""
    module = unwrapped(module, Model, Tokenizer)
    if isinstance(module, InferenceTokenizer):
        raise TypeError("got an InferenceTokenizer, which is for inference alone: load it without dtype")
    return module


def config_json(module: Model | Tokenizer) -> dict[str, Any]:
    """The content of config.json: the configuration, and `class_names` if a model has them."""
    names = class_names(module)
    return asdict(module.config) | ({} if names is None else {CLASS_NAMES: names})


def class_names(module: Model | Tokenizer) -> list[str] | tuple[str, ...] | None:
    """The class names of a model, if it has them. Raises ValueError unless they are one string per class."""
    if not isinstance(module, Model) or module.class_names is None:
        return None
    if not are_class_names(module.class_names, module.config.num_classes):
        expected = f"a list or tuple of {module.config.num_classes} names"
        raise ValueError(f"class_names: expected {expected}, got {module.class_names!r}")
    return module.class_names


def save_published(path: str | Path, module: Model | Tokenizer, *, dtype: torch.dtype | None = None) -> None:
    """Save :func:`published_state_dict` as .pth. Raises its errors, and OSError if the file cannot be written."""
    state = published_state_dict(module, dtype)
    # A file object, as torch.save(path) stores the name of the file.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of torch, while an OSError is handled
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def published_state_dict(module: Model | Tokenizer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """State dict for the published code (strict=True), including the attention mask that `Model` does not store.

    Raises:
        ValueError: the published code does not support this model.
        TypeError, ValueError: as :func:`save`.
    """
    module = _trainable(module)
    state = converted(weights(module), dtype)
    if isinstance(module, Model):
        if module.config.bidirectional:
            raise ValueError("a model with a bidirectional mixer has no published format; write .safetensors")
        level = module.lvl_1L
        visible = level.T >= level if module.architecture == "var" else level.T == level
        state["attn_bias_for_masking"] = torch.where(visible, 0.0, -torch.inf)[None, None].to(dtype)
    return state


def converted(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Convert floating-point weights to `dtype`; None for their own. Raises as :func:`save`."""
    if dtype not in (None, *STORAGE_DTYPES):
        names = ", ".join(str(known).removeprefix("torch.") for known in STORAGE_DTYPES)
        raise TypeError(f"dtype: expected one of {names} or None, got {dtype}")
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    for name, t in state.items():
        if t.is_floating_point() and not bool(t.float().isfinite().all()):
            raise ValueError(f"{name}: not all values are finite in {str(t.dtype).removeprefix('torch.')}")
    return state


def token_maps(resolution: int | None = None, patch_nums: Sequence[int] | None = None) -> Sequence[int] | None:
    """The side lengths of the token maps that a user gave, by themselves or by the resolution; None if neither."""
    return patch_nums if resolution is None else schedule(resolution, patch_nums)


def schedule(resolution: int, patch_nums: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return `patch_nums`, or the published side lengths of the token maps for a resolution."""
    if patch_nums is not None:
        return tuple(patch_nums)
    if resolution not in SCHEDULES:
        raise ValueError(f"resolution: expected one of {', '.join(map(str, SCHEDULES))}, got {resolution}")
    return SCHEDULES[resolution]


def with_own_storage(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that are not contiguous or share storage with others, and inference tensors."""
    seen: set[int] = set()
    result = {}
    for name, t in state.items():
        storage = t.untyped_storage()
        unshared = t.is_contiguous() and storage.nbytes() == t.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        result[name] = t if unshared and not t.is_inference() else t.clone(memory_format=torch.contiguous_format)
    return result
