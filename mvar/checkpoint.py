"""Loading and saving weights: official .pth files, and safetensors files of mvar that contain the configuration."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mvar.models.config import SCHEDULES, ModelConfig
from mvar.models.tokenizer import HITS_KEY, Tokenizer, TokenizerConfig
from mvar.models.transformer import Model, from_config
from mvar.models.weights import extra_weight, unwrapped, weights, without_storage
from mvar.utils.errors import message
from mvar.utils.files import atomic_write, expanded
from mvar.utils.state_dict import CheckpointError, read

CONFIGS: Mapping[str, type[Any]] = {"model": ModelConfig, "tokenizer": TokenizerConfig}
HUB = "hf://"
CONFIG_KEY, CLASS_NAMES_KEY = "mvar_config", "mvar_class_names"  # in the metadata of safetensors
# Buffers of the published files that follow from the configuration and are not loaded.
DERIVED_BUFFERS = ("attn_bias_for_masking",)

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)

Module = TypeVar("Module", bound=nn.Module)


@torch.inference_mode(False)  # inference tensors could not be trained
def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """Load an M-VAR or VAR model in float32 and evaluation mode.

    Reads official files, files of :func:`save`, and trainers' checkpoints: state dicts under any names ("trainer" and
    "var_wo_ddp" as VAR's, "model", "state_dict", "ema", which takes precedence), with or without "module." and
    "_orig_mod." in the names of weights.

    Files of :func:`save` contain the configuration, and `class_names` if the model had them. For others the
    configuration is inferred: M-VAR from its mixers, q/k norm from the presence of `scale_mul_1H11`, patch numbers from
    `blocks.0.attn.patch_nums` or (VAR) `lvl_1L`, and sizes from shapes.

    Args:
        path: a file, or hf://owner/repository/file on the Hugging Face Hub.
        device: device of the weights.

    Raises:
        OSError: the file does not exist or could not be downloaded.
        CheckpointError: a truncated file, a pickle with other objects than weights, a missing or unknown name, a wrong
            shape, or a value that is not finite.
    """
    state, stored, metadata = _read(path, "model")

    def config(stored: dict[str, Any]) -> ModelConfig:
        return ModelConfig(**stored) if stored else ModelConfig.from_state_dict(state)

    model = _build(path, lambda stored: from_config(config(stored)), "model", stored)
    model = _load_weights(path, model, state, device)
    _check_schedule(path, model)
    model.class_names = _class_names(path, metadata, model.config.num_classes)
    return model


@torch.inference_mode(False)
def load_tokenizer(
    path: str | Path,
    *,
    resolution: int | None = None,
    patch_nums: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> Tokenizer:
    """Load a tokenizer in float32 and evaluation mode, from an official file or a file of :func:`save`.

    Args:
        path, device: as in :func:`load_model`.
        resolution: 256, 512 or 1024, with the published token maps, as the official file is used with several. None to
            infer it from the number of scales: 256×256 from 10, 1024×1024 from 14.
        patch_nums: side lengths of the token maps, instead of `resolution`.

    Raises:
        OSError, CheckpointError: as :func:`load_model`.
    """
    if resolution is not None:
        patch_nums = schedule(resolution, patch_nums)
    state, stored, _ = _read(path, "tokenizer")

    def config(stored: dict[str, Any]) -> TokenizerConfig:
        override = {} if patch_nums is None else {"patch_nums": tuple(patch_nums)}
        return TokenizerConfig(**(stored | override)) if stored else TokenizerConfig.from_state_dict(state, patch_nums)

    tokenizer = _build(path, lambda stored: Tokenizer(config(stored)), "tokenizer", stored)
    return _load_weights(path, tokenizer, state, device)


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
    module = unwrapped(module, Model, Tokenizer)
    state = weights(module)
    if (extra := extra_weight(module)) is not None:
        raise ValueError(f"{extra} is not a weight of this configuration and would not be saved: remove it first")
    state = with_own_storage({name: t.cpu() for name, t in converted(state, dtype).items()})
    metadata = {CONFIG_KEY: json.dumps(asdict(module.config))}
    if isinstance(module, Model) and module.class_names is not None:
        if not _are_names(module.class_names, module.config.num_classes):
            expected = f"a list or tuple of {module.config.num_classes} names"
            raise ValueError(f"class_names: expected {expected}, got {module.class_names!r}")
        metadata[CLASS_NAMES_KEY] = json.dumps(module.class_names)
    with atomic_write(path) as temporary:
        try:
            save_file(state, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {message(error)}") from error


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


def schedule(resolution: int, patch_nums: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return `patch_nums`, or the published side lengths of the token maps for a resolution."""
    if patch_nums is not None:
        return tuple(patch_nums)
    if resolution not in SCHEDULES:
        raise ValueError(f"resolution: expected one of {', '.join(map(str, SCHEDULES))}, got {resolution}")
    return SCHEDULES[resolution]


def _read(path: str | Path, part: str) -> tuple[dict[str, Tensor], object, Mapping[str, str]]:
    """Read the tensors of one part of a file, the stored configuration (empty if there is none) and the metadata."""
    file = _local_file(str(path))
    state, metadata = read(file, part)
    try:
        return state, json.loads(metadata.get(CONFIG_KEY, "{}")), metadata
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: stored configuration: invalid JSON: {error}") from error


def _local_file(path: str) -> Path:
    """Return the local file; for hf://owner/repository/file that in the Hugging Face cache, downloaded if missing."""
    if not path.startswith(HUB):
        return expanded(path)
    owner, _, rest = path.removeprefix(HUB).partition("/")
    repository, _, name = rest.partition("/")
    if not (owner and repository and name):
        raise ValueError(f"{path}: expected {HUB}owner/repository/file")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{repository}", name))
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(f"{path}: could not be downloaded: {message(error)}") from error


def _build(path: str | Path, make: Callable[[dict[str, Any]], Module], kind: str, stored: object) -> Module:
    """Build the module without storage, from the stored configuration or one inferred from the weights."""
    try:
        if not isinstance(stored, dict):
            raise TypeError(f"stored configuration: expected a dict, got {stored!r}")
        for other, config in CONFIGS.items():
            if other != kind and stored and stored.keys() == {field.name for field in fields(config)}:
                raise ValueError(f"it is the file of a {other}")
        with without_storage():
            return make(stored)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no valid configuration of a {kind}: {message(error)}") from error


def _class_names(path: str | Path, metadata: Mapping[str, str], num_classes: int) -> tuple[str, ...] | None:
    if CLASS_NAMES_KEY not in metadata:
        return None
    try:
        names = json.loads(metadata[CLASS_NAMES_KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: stored class names: invalid JSON: {error}") from error
    if not _are_names(names, num_classes):
        raise CheckpointError(f"{path}: stored class names: expected a list of {num_classes} names")
    return tuple(names)


def _are_names(names: object, count: int) -> bool:
    return isinstance(names, list | tuple) and len(names) == count and all(isinstance(n, str) for n in names)


def _load_weights(path: str | Path, module: Module, state: dict[str, Tensor], device: str | torch.device) -> Module:
    """Load the weights into the module, after validating all names, shapes, dtypes and values."""
    expected = module.state_dict()
    names = state.keys() - {name for name in state if name.endswith(DERIVED_BUFFERS)}
    if missing := sorted(expected.keys() - names):
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]!r}")
    if unknown := sorted(names - expected.keys()):
        raise CheckpointError(f"{path}: {len(unknown)} unknown weights, the first is {unknown[0]!r}")
    # torch has no arithmetic for float8.
    state = {n: t.float() if t.is_floating_point() and t.element_size() == 1 else t for n, t in state.items()}
    for name, value in expected.items():
        got, shape = state[name], list(value.shape)
        if name == HITS_KEY and got.dim() == 2:
            shape[0] = got.shape[0]  # statistics of another schedule are discarded
        if list(got.shape) != shape:
            raise CheckpointError(f"{path}: {name}: expected shape {tuple(shape)}, got {tuple(got.shape)}")
        if got.layout != torch.strided or got.is_meta or got.is_floating_point() != value.is_floating_point():
            raise CheckpointError(f"{path}: {name}: expected dense {_kind(value)} values, got {got.dtype} {got.layout}")
        if got.is_complex() or not bool(got.isfinite().all()):
            raise CheckpointError(f"{path}: {name}: not all values are finite real numbers")
    values = {n: t.to(device, torch.float32 if t.is_floating_point() else t.dtype) for n, t in state.items()}
    module.load_state_dict(with_own_storage(values), strict=True, assign=True)
    return module.eval()


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


def _kind(value: Tensor) -> str:
    return "floating-point" if value.is_floating_point() else "integer"


def _check_schedule(path: str | Path, model: Model) -> None:
    """Raise CheckpointError unless all buffers that repeat the schedule are equal to the configuration's."""
    scales = torch.tensor(model.config.scales, dtype=torch.int64, device="cpu")
    levels = torch.arange(len(scales), dtype=torch.int64, device="cpu").repeat_interleave(scales)[None]
    for name, value in model.named_buffers():
        expected = {"patch_nums": scales, "lvl_1L": levels}.get(name.rsplit(".")[-1])
        if expected is not None and not torch.equal(value.cpu().long(), expected):
            raise CheckpointError(f"{path}: {name}: does not follow from the patch numbers {model.config.patch_nums}")
