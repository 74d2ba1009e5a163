"""Loading and saving weights: official .pth files, and safetensors files of mvar that contain the configuration."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
WEIGHTS_FILE, CONFIG_FILE, CLASS_NAMES = "model.safetensors", "config.json", "class_names"
"""The files of a folder or a repository of `save_pretrained`, and the key of class names in its configuration."""
# Buffers of the published files that follow from the configuration and are not loaded.
DERIVED_BUFFERS = ("attn_bias_for_masking",)

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)

Module = TypeVar("Module", bound=nn.Module)
AnyModel = TypeVar("AnyModel", bound=Model)
AnyTokenizer = TypeVar("AnyTokenizer", bound=Tokenizer)


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """Load an M-VAR or VAR model in float32 and evaluation mode.

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

    Raises:
        OSError: the file does not exist or could not be downloaded.
        CheckpointError: a truncated file, a pickle with other objects than weights, a missing or unknown name, a wrong
            shape, or a value that is not finite.
    """
    return read_model(path, from_config, device)


@torch.inference_mode(False)  # inference tensors could not be trained
def read_model(
    path: str | Path,
    make: Callable[[ModelConfig], AnyModel],
    device: str | torch.device,
    download: Mapping[str, Any] | None = None,
) -> AnyModel:
    """:func:`load_model` of another class.

    Args:
        make: builds the model from its configuration.
        download: arguments of huggingface_hub.hf_hub_download.
    """
    stored = _read(path, "model", download or {})

    def config(given: dict[str, Any]) -> ModelConfig:
        return ModelConfig(**given) if given else ModelConfig.from_state_dict(stored.state)

    model = _build(stored, lambda given: make(config(given)), "model")
    model = _load_weights(path, model, stored.state, device)
    _check_schedule(path, model)
    model.class_names = _class_names(stored, model.config.num_classes)
    return model


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
    return read_tokenizer(path, Tokenizer, device, resolution=resolution, patch_nums=patch_nums)


@torch.inference_mode(False)
def read_tokenizer(
    path: str | Path,
    make: Callable[[TokenizerConfig], AnyTokenizer],
    device: str | torch.device,
    download: Mapping[str, Any] | None = None,
    *,
    resolution: int | None = None,
    patch_nums: Sequence[int] | None = None,
) -> AnyTokenizer:
    """:func:`load_tokenizer` of another class, see :func:`read_model`."""
    maps = patch_nums if resolution is None else schedule(resolution, patch_nums)
    stored = _read(path, "tokenizer", download or {})

    def config(given: dict[str, Any]) -> TokenizerConfig:
        override = {} if maps is None else {"patch_nums": tuple(maps)}
        return TokenizerConfig(**(given | override)) if given else TokenizerConfig.from_state_dict(stored.state, maps)

    tokenizer = _build(stored, lambda given: make(config(given)), "tokenizer")
    return _load_weights(path, tokenizer, stored.state, device)


def load_packaged(model: str, tokenizer: str) -> tuple[Model, Tokenizer]:
    """Load a model and a tokenizer that are included in the package, by their names in mvar/assets."""
    assets = files("mvar") / "assets"
    with as_file(assets / f"{model}.safetensors") as file:
        loaded = load_model(file)
    with as_file(assets / f"{tokenizer}.safetensors") as file:
        return loaded, load_tokenizer(file)


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


def config_json(module: Model | Tokenizer) -> dict[str, Any]:
    """The content of config.json: the configuration, and `class_names` if a model has them."""
    names = class_names(module)
    return asdict(module.config) | ({} if names is None else {CLASS_NAMES: names})


def class_names(module: Model | Tokenizer) -> list[str] | tuple[str, ...] | None:
    """The class names of a model, if it has them. Raises ValueError unless they are one string per class."""
    if not isinstance(module, Model) or module.class_names is None:
        return None
    if not _are_names(module.class_names, module.config.num_classes):
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


class _Stored(NamedTuple):
    """The content of a file or folder."""

    state: dict[str, Tensor]
    config: object
    """decoded JSON, {} if there is none"""
    class_names: object
    config_file: str
    """for messages: config.json, or the file of the weights"""


def _read(path: str | Path, part: str, download: Mapping[str, Any]) -> _Stored:
    """Read the weights of one part, the configuration and the class names."""
    file, config_file = _local_files(str(path), download)
    state, metadata = read(file, part)
    if config_file is None:
        config = _json(metadata.get(CONFIG_KEY, "{}"), f"{file}: stored configuration")
        names = _json(metadata.get(CLASS_NAMES_KEY, "null"), f"{file}: stored class names")
        return _Stored(state, config, names, str(path))
    try:
        text = config_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{config_file}: expected JSON in UTF-8: {error}") from error
    config = _json(text, str(config_file))
    names = config.pop(CLASS_NAMES, None) if isinstance(config, dict) else None
    return _Stored(state, config, names, str(config_file))


def _json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{source}: invalid JSON: {error}") from error


def _local_files(path: str, download: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """Return the local files of the weights and, of a folder or a repository that has it, of the configuration.

    Files of hf:// addresses are those in the Hugging Face cache, downloaded if missing.
    """
    if not path.startswith(HUB):
        file = expanded(path)
        if not file.is_dir():
            return file, None
        if not (file / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(
                f"{file}: a folder without {WEIGHTS_FILE}; expected a file, or a folder of save_pretrained"
            )
        return file / WEIGHTS_FILE, file / CONFIG_FILE if (file / CONFIG_FILE).is_file() else None
    owner, _, rest = path.removeprefix(HUB).partition("/")
    repository, _, name = rest.partition("/")
    if not (owner and repository):
        raise ValueError(f"{path}: expected {HUB}owner/repository or {HUB}owner/repository/file")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def downloaded(name: str) -> Path:
        return Path(hf_hub_download(f"{owner}/{repository}", name, **download))

    try:
        if name:
            return downloaded(name), None
        file = downloaded(WEIGHTS_FILE)
        try:
            return file, downloaded(CONFIG_FILE)
        except EntryNotFoundError:
            return file, None
    except (OSError, ValueError, RuntimeError, EntryNotFoundError) as error:
        raise OSError(f"{path}: could not be downloaded: {message(error)}") from error


def _build(stored: _Stored, make: Callable[[dict[str, Any]], Module], kind: str) -> Module:
    """Build the module without storage, from the stored configuration or one inferred from the weights."""
    given = stored.config
    try:
        if not isinstance(given, dict):
            raise TypeError(f"stored configuration: expected a dict, got {given!r}")
        known = {kind: {field.name for field in fields(config)} for kind, config in CONFIGS.items()}
        for other, names in known.items():
            if other != kind and given and given.keys() == names:
                raise ValueError(f"it is the file of a {other}")
        if unknown := sorted(given.keys() - known[kind]):
            raise ValueError(f"unknown key {unknown[0]!r}")
        with without_storage():
            return make(given)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"{stored.config_file}: no valid configuration of a {kind}: {message(error)}") from error


def _class_names(stored: _Stored, num_classes: int) -> tuple[str, ...] | None:
    if stored.class_names is None:
        return None
    if not _are_names(stored.class_names, num_classes):
        raise CheckpointError(f"{stored.config_file}: stored class names: expected a list of {num_classes} names")
    return tuple(stored.class_names)  # type: ignore[arg-type]


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
