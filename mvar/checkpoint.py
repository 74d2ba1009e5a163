"""Reading and writing weights: official .pth files, and safetensors of our own with the configuration inside."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mvar.config import SCHEDULES, ModelConfig
from mvar.errors import message
from mvar.files import expanded, replacing
from mvar.model import Model, from_config
from mvar.state_dict import CheckpointError, read
from mvar.tokenizer import HITS_KEY, Tokenizer, TokenizerConfig
from mvar.weights import surplus, unwrapped, weights, without_storage

CONFIGS: Mapping[str, type[Any]] = {"model": ModelConfig, "tokenizer": TokenizerConfig}
HUB = "hf://"
CONFIG_KEY, CLASS_NAMES_KEY = "mvar_config", "mvar_class_names"  # in the metadata of our own files
# Buffers of the published files that follow from the configuration and that we do not keep.
DERIVED = ("attn_bias_for_masking",)

STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)

Module = TypeVar("Module", bound=nn.Module)


@torch.inference_mode(False)  # else what is loaded could not be trained
def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """An M-VAR or VAR model in evaluation mode, float32, from an official or an own file, or from hf://owner/repository/file.

    Checkpoints of trainers are read too: state dicts under any names in them ("trainer" and "var_wo_ddp" as VAR's have,
    "model", "state_dict", "ema", which goes first), with or without "module." and "_orig_mod." in the names.
    Every size is read off the file: M-VAR from its mixers, q/k norm from whether `scale_mul_1H11` is there, patch
    numbers from `blocks.0.attn.patch_nums` or (VAR) from
    `lvl_1L`, the rest from shapes; our own files carry their configuration, and
    `class_names` where the model had them.

    Raises:
        OSError: no such file, or it could not be fetched.
        CheckpointError: truncated, a pickle that is more than weights, a missing or unknown name, a wrong
            shape, or a value that is not finite.
    """
    state, stored, metadata = _read(path, "model")

    def config(stored: dict[str, Any]) -> ModelConfig:
        return ModelConfig(**stored) if stored else ModelConfig.from_state_dict(state)

    model = _filled(path, _built(path, lambda stored: from_config(config(stored)), "model", stored), state, device)
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
    """A tokenizer in evaluation mode, float32, from an official or an own file.

    The official file serves several resolutions and does not say which: `resolution` (256, 512 or 1024)
    or `patch_nums` does; without them, 10 scales mean 256×256 and 14 mean 1024×1024.

    Raises:
        as :func:`load_model`.
    """
    if resolution is not None:
        patch_nums = schedule(resolution, patch_nums)
    state, stored, _ = _read(path, "tokenizer")

    def config(stored: dict[str, Any]) -> TokenizerConfig:
        given = {} if patch_nums is None else {"patch_nums": tuple(patch_nums)}
        return TokenizerConfig(**(stored | given)) if stored else TokenizerConfig.from_state_dict(state, patch_nums)

    return _filled(path, _built(path, lambda stored: Tokenizer(config(stored)), "tokenizer", stored), state, device)


def save(path: str | Path, module: Model | Tokenizer, *, dtype: torch.dtype | None = None) -> None:
    """Write safetensors with the configuration inside; floating weights in `dtype`, None as they are.

    Wrapped, sharded, parametrized and pruned modules are written as the plain ones that :func:`load_model` and
    :func:`load_tokenizer` make of the file. Hooks are not in it.

    Raises:
        TypeError: no model or tokenizer, a wrapper that cannot be looked through, or another `dtype` than those of
            :data:`STORED`.
        ValueError: a layer whose weights would not come back, or that are not finite in `dtype`, by its name.
        OSError: the file cannot be written.
    """
    module = unwrapped(module, Model, Tokenizer)
    found = weights(module)
    if (extra := surplus(module)) is not None:
        raise ValueError(f"{extra} is no weight of this configuration, and would be lost: remove it first")
    state = own_memory({name: t.cpu() for name, t in converted(found, dtype).items()})
    metadata = {CONFIG_KEY: json.dumps(asdict(module.config))}
    if isinstance(module, Model) and module.class_names is not None:
        if not _are_names(module.class_names, module.config.num_classes):
            expected = f"a list or tuple of {module.config.num_classes} names"
            raise ValueError(f"class_names: expected {expected}, got {module.class_names!r}")
        metadata[CLASS_NAMES_KEY] = json.dumps(module.class_names)
    with replacing(path) as aside:
        try:
            save_file(state, aside, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {message(error)}") from error


def converted(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The floating weights in `dtype`, None as they are. Raises as :func:`save`."""
    if dtype not in (None, *STORED):
        names = ", ".join(str(known).removeprefix("torch.") for known in STORED)
        raise TypeError(f"dtype: expected one of {names} or None, got {dtype}")
    found = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    for name, t in found.items():
        if t.is_floating_point() and not bool(t.float().isfinite().all()):
            raise ValueError(f"{name}: not all values are finite in {str(t.dtype).removeprefix('torch.')}")
    return found


def schedule(resolution: int, patch_nums: Sequence[int] | None = None) -> tuple[int, ...]:
    """The token maps' side lengths: those given, or the published ones of a resolution."""
    if patch_nums is not None:
        return tuple(patch_nums)
    if resolution not in SCHEDULES:
        raise ValueError(f"resolution: expected one of {', '.join(map(str, SCHEDULES))}, got {resolution}")
    return SCHEDULES[resolution]


def _read(path: str | Path, part: str) -> tuple[dict[str, Tensor], object, Mapping[str, str]]:
    """The tensors of one part of a file, the stored configuration, empty if there is none, and all metadata."""
    file = _local(str(path))
    state, metadata = read(file, part)
    try:
        return state, json.loads(metadata.get(CONFIG_KEY, "{}")), metadata
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: its stored configuration is no JSON: {error}") from error


def _local(path: str) -> Path:
    """The file itself, or for hf://owner/repository/file its copy in the Hugging Face cache, fetched if need be."""
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
        raise OSError(f"{path}: could not be fetched: {message(error)}") from error


def _built(path: str | Path, make: Callable[[dict[str, Any]], Module], kind: str, stored: object) -> Module:
    """The module without storage, from the stored configuration or one read off the weights."""
    try:
        if not isinstance(stored, dict):
            raise TypeError(f"its stored configuration is no table of names: {stored!r}")
        for other, config in CONFIGS.items():
            if other != kind and stored and stored.keys() == {field.name for field in fields(config)}:
                raise ValueError(f"it is a {other}'s file")
        with without_storage():
            return make(stored)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no usable sizes for a {kind}: {message(error)}") from error


def _class_names(path: str | Path, metadata: Mapping[str, str], num_classes: int) -> tuple[str, ...] | None:
    if CLASS_NAMES_KEY not in metadata:
        return None
    try:
        names = json.loads(metadata[CLASS_NAMES_KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its stored class names are no JSON: {error}") from error
    if not _are_names(names, num_classes):
        raise CheckpointError(f"{path}: its stored class names are no list of {num_classes} names")
    return tuple(names)


def _are_names(names: object, count: int) -> bool:
    return isinstance(names, list | tuple) and len(names) == count and all(isinstance(n, str) for n in names)


def _filled(path: str | Path, module: Module, state: dict[str, Tensor], device: str | torch.device) -> Module:
    """The module with these weights, after a check of every name, shape, kind and value."""
    expected = module.state_dict()
    found = state.keys() - {name for name in state if name.endswith(DERIVED)}
    if missing := sorted(expected.keys() - found):
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]!r}")
    if unknown := sorted(found - expected.keys()):
        raise CheckpointError(f"{path}: {len(unknown)} unknown weights, the first is {unknown[0]!r}")
    # No arithmetic is there for float8.
    state = {n: t.float() if t.is_floating_point() and t.element_size() == 1 else t for n, t in state.items()}
    for name, value in expected.items():
        got, shape = state[name], list(value.shape)
        if name == HITS_KEY and got.dim() == 2:
            shape[0] = got.shape[0]  # statistics of one schedule, dropped by another
        if list(got.shape) != shape:
            raise CheckpointError(f"{path}: {name}: expected shape {tuple(shape)}, got {tuple(got.shape)}")
        if got.layout != torch.strided or got.is_meta or got.is_floating_point() != value.is_floating_point():
            raise CheckpointError(f"{path}: {name}: expected dense {_kind(value)} values, got {got.dtype} {got.layout}")
        if got.is_complex() or not bool(got.isfinite().all()):
            raise CheckpointError(f"{path}: {name}: not all values are finite real numbers")
    values = {n: t.to(device, torch.float32 if t.is_floating_point() else t.dtype) for n, t in state.items()}
    module.load_state_dict(own_memory(values), strict=True, assign=True)
    return module.eval()


def own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, each tensor contiguous and alone in its memory: copied where it is not."""
    seen: set[int] = set()
    apart = {}
    for name, t in state.items():
        storage = t.untyped_storage()
        alone = t.is_contiguous() and storage.nbytes() == t.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        apart[name] = t if alone and not t.is_inference() else t.clone(memory_format=torch.contiguous_format)
    return apart


def _kind(value: Tensor) -> str:
    return "floating-point" if value.is_floating_point() else "whole-number"


def _check_schedule(path: str | Path, model: Model) -> None:
    """The buffers that repeat the schedule must all say the same."""
    scales = torch.tensor(model.config.scales, dtype=torch.int64, device="cpu")
    levels = torch.arange(len(scales), dtype=torch.int64, device="cpu").repeat_interleave(scales)[None]
    for name, value in model.named_buffers():
        agreed = {"patch_nums": scales, "lvl_1L": levels}.get(name.rsplit(".")[-1])
        if agreed is not None and not torch.equal(value.cpu().long(), agreed):
            raise CheckpointError(f"{path}: {name}: does not follow from the patch numbers {model.config.patch_nums}")
