"""Models and tokenizers in files: their configuration, and their weights, which are read part by part.

The weights are memory-mapped. Loading for training copies each to the device in float32; loading for inference converts
one after another, a model's block by block, so that neither a copy of the file nor one in float32 is ever in memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mvar.inference.model import FLOAT32 as MODEL_FLOAT32
from mvar.inference.model import InferenceModel, check_dtype
from mvar.inference.tokenizer import FLOAT32 as TOKENIZER_FLOAT32
from mvar.inference.tokenizer import InferenceTokenizer
from mvar.models.blocks import Block
from mvar.models.config import ModelConfig
from mvar.models.tokenizer import HITS_KEY, Tokenizer, TokenizerConfig
from mvar.models.transformer import Model
from mvar.models.weights import ENCODER, digest_of, without_storage
from mvar.utils.errors import message
from mvar.utils.files import expanded
from mvar.utils.memory import MappedPages, return_freed_memory
from mvar.utils.state_dict import CheckpointError, read
from mvar_kernels.precision import true_float32

CONFIGS: Mapping[str, type[Any]] = {"model": ModelConfig, "tokenizer": TokenizerConfig}
HUB = "hf://"
CONFIG_KEY, CLASS_NAMES_KEY = "mvar_config", "mvar_class_names"  # in the metadata of safetensors
WEIGHTS_FILE, CONFIG_FILE, CLASS_NAMES = "model.safetensors", "config.json", "class_names"
"""The files of a folder or a repository of `save_pretrained`, and the key of class names in its configuration."""
# Buffers of the published files that follow from the configuration and are not loaded.
DERIVED_BUFFERS = ("attn_bias_for_masking",)
READ_BYTES = 2**22
"""Bytes of the file after which its pages are released."""

AnyModel = TypeVar("AnyModel", bound=Model)
AnyTokenizer = TypeVar("AnyTokenizer", bound=Tokenizer)
AnyModule = TypeVar("AnyModule", bound=nn.Module)
DtypeOf = Callable[[str], torch.dtype]


class _Stored:
    """A file or folder with the weights of one part, "model" or "tokenizer"."""

    def __init__(self, path: str | Path, part: str, download: Mapping[str, Any] | None) -> None:
        self.path, self.part = path, part
        file, config_file = _local_files(str(path), download or {})
        self.state, metadata = read(file, part)
        self._pages = MappedPages(file, self.state.values())
        self._expected: Mapping[str, Tensor] = {}
        if config_file is None:
            self.config_source = str(path)
            self.given_config = _json(metadata.get(CONFIG_KEY, "{}"), f"{file}: stored configuration")
            self.given_names = _json(metadata.get(CLASS_NAMES_KEY, "null"), f"{file}: stored class names")
            return
        try:
            text = config_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{config_file}: expected JSON in UTF-8: {error}") from error
        self.config_source = str(config_file)
        self.given_config = _json(text, str(config_file))
        has_names = isinstance(self.given_config, dict)
        self.given_names = self.given_config.pop(CLASS_NAMES, None) if has_names else None

    def build(self, make: Callable[[dict[str, Any]], Any]) -> Any:
        """Build the module without storage, from the stored configuration or one inferred from the weights."""
        given, kind = self.given_config, self.part
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
                module = make(given)
        except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.config_source}: no valid configuration of a {kind}: {message(error)}"
            ) from error
        self._check(module.state_dict())
        return module.eval()

    def _check(self, expected: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless the names, shapes and kinds of all weights are those of the module."""
        names = self.state.keys() - {name for name in self.state if name.endswith(DERIVED_BUFFERS)}
        if missing := sorted(expected.keys() - names):
            raise CheckpointError(f"{self.path}: {len(missing)} weights are missing, the first is {missing[0]!r}")
        if unknown := sorted(names - expected.keys()):
            raise CheckpointError(f"{self.path}: {len(unknown)} unknown weights, the first is {unknown[0]!r}")
        for name, value in expected.items():
            got = self.state[name]
            if name == HITS_KEY and got.dim() == 2 and got.shape[1] == value.shape[1] and len(got) != len(value):
                # The published file is used with several schedules, and these statistics belong to one of them.
                got = self.state[name] = torch.zeros(value.shape, dtype=torch.float32, device="cpu")
            if got.shape != value.shape:
                raise CheckpointError(
                    f"{self.path}: {name}: expected shape {tuple(value.shape)}, got {tuple(got.shape)}"
                )
            if got.layout != torch.strided or got.is_meta or got.is_floating_point() != value.is_floating_point():
                found = f"got {got.dtype} {got.layout}"
                raise CheckpointError(f"{self.path}: {name}: expected dense {_kind(value)} values, {found}")
        self._expected = expected

    def values(
        self, names: Iterable[str], device: str | torch.device, dtype_of: DtypeOf
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield names and contiguous copies of weights on the device, after validating that they are finite.

        Args:
            dtype_of: of a floating-point weight, by its name.
        """
        unreleased = 0
        for name in names:
            t = self.state[name]
            if t.is_floating_point() and t.element_size() == 1:  # torch has no arithmetic for float8
                t = t.float()
            if t.is_complex() or not bool(t.isfinite().all()):
                raise CheckpointError(f"{self.path}: {name}: not all values are finite real numbers")
            dtype = dtype_of(name) if t.is_floating_point() else t.dtype
            yield name, t.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
            unreleased += t.nbytes
            if unreleased > READ_BYTES:
                self._pages.release()
                unreleased = 0
        self._pages.release()

    def load(
        self, module: AnyModule, device: str | torch.device, dtype_of: DtypeOf, *, prefix: str = "", omit: str = ""
    ) -> AnyModule:
        """Load weights into a module without storage.

        Args:
            prefix: of their names in the file.
            omit: prefix of the names of weights that are not loaded; "" for none.
        """
        names = [prefix + name for name in module.state_dict() if not omit or not name.startswith(omit)]
        values = {name.removeprefix(prefix): t for name, t in self.values(names, device, dtype_of)}
        module.load_state_dict(values, strict=not omit, assign=True)
        return module

    def fingerprint(self) -> str:
        """:func:`mvar.models.weights.fingerprint` of the module in float32."""
        return digest_of(self.values(sorted(self._expected), "cpu", in_float32))


def in_float32(name: str) -> torch.dtype:
    return torch.float32


class StoredModel(_Stored, Generic[AnyModel]):
    """A model in a file or folder. `config` and `class_names` are known before the weights are loaded.

    Args:
        path: as for :func:`mvar.load_model`.
        make: builds the model from its configuration.
        download: arguments of huggingface_hub.hf_hub_download.

    Raises:
        OSError, CheckpointError: as :func:`mvar.load_model`.
    """

    def __init__(
        self, path: str | Path, make: Callable[[ModelConfig], AnyModel], download: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(path, "model", download)
        self._make = make
        self.config = self._built().config
        self.class_names: tuple[str, ...] | None = None
        if self.given_names is not None:
            if not are_class_names(self.given_names, self.config.num_classes):
                expected = f"a list of {self.config.num_classes} names"
                raise CheckpointError(f"{self.config_source}: stored class names: expected {expected}")
            self.class_names = tuple(self.given_names)

    def _built(self) -> AnyModel:
        def make(given: dict[str, Any]) -> AnyModel:
            return self._make(ModelConfig(**given) if given else ModelConfig.from_state_dict(self.state))

        model: AnyModel = self.build(make)
        model.class_names = getattr(self, "class_names", None)
        return model

    @torch.inference_mode(False)  # inference tensors could not be trained
    def model(self, device: str | torch.device) -> AnyModel:
        """Load the model in float32."""
        model = self._built()
        self.load(model, device, in_float32)
        self._check_schedule(model)
        return model

    @torch.inference_mode(False)
    @torch.no_grad()
    def inference_model(
        self, device: str | torch.device, dtype: torch.dtype, labels: Sequence[int] | Tensor | None = None
    ) -> InferenceModel:
        """Load the model for inference, block by block.

        Args:
            labels: the only classes that will be used, see :class:`InferenceModel`.
        """
        device = torch.device(device)
        check_dtype(dtype)

        def dtype_of(name: str) -> torch.dtype:
            return torch.float32 if name.endswith(MODEL_FLOAT32) else dtype

        model: Model = self.load(self._built(), device, dtype_of, omit="blocks.")

        def loaded(i: int) -> Block:
            return_freed_memory()  # d16 in bfloat16: 0.14 of 0.74 GiB, from converting the blocks before
            prefix = f"blocks.{i}."
            block = self.load(model.typed_blocks()[i], device, dtype_of, prefix=prefix)
            self._check_schedule(block, prefix)
            model.blocks[i] = nn.Identity()  # the block's memory is free once it is converted
            return block

        with true_float32(device), torch.autocast(device.type, enabled=False):
            converted = InferenceModel(model, dtype, labels=labels, blocks=map(loaded, range(self.config.depth)))
        self._check_schedule(converted)
        return_freed_memory()
        return converted

    def _check_schedule(self, module: nn.Module, prefix: str = "") -> None:
        """Raise CheckpointError unless all buffers that repeat the schedule are equal to the configuration's."""
        scales = torch.tensor(self.config.scales, dtype=torch.int64, device="cpu")
        levels = torch.arange(len(scales), dtype=torch.int64, device="cpu").repeat_interleave(scales)[None]
        for name, value in module.named_buffers():
            expected = {"patch_nums": scales, "lvl_1L": levels}.get(name.rsplit(".")[-1])
            if expected is not None and not torch.equal(value.cpu().long(), expected):
                maps = self.config.patch_nums
                raise CheckpointError(f"{self.path}: {prefix}{name}: does not follow from the patch numbers {maps}")


class StoredTokenizer(_Stored, Generic[AnyTokenizer]):
    """A tokenizer in a file or folder.

    Args:
        path, download: as for :class:`StoredModel`.
        make: builds the tokenizer from its configuration.
        patch_nums: side lengths of the token maps; None for those in the file.

    Raises:
        OSError, CheckpointError: as :func:`mvar.load_model`.
    """

    def __init__(
        self,
        path: str | Path,
        make: Callable[[TokenizerConfig], AnyTokenizer],
        download: Mapping[str, Any] | None = None,
        patch_nums: Sequence[int] | None = None,
    ) -> None:
        super().__init__(path, "tokenizer", download)
        self._make, self._patch_nums = make, patch_nums
        built = self._built()
        self.config, self.resolution = built.config, built.resolution

    def _built(self) -> AnyTokenizer:
        def make(given: dict[str, Any]) -> AnyTokenizer:
            override = {} if self._patch_nums is None else {"patch_nums": tuple(self._patch_nums)}
            if given:
                return self._make(TokenizerConfig(**(given | override)))
            return self._make(TokenizerConfig.from_state_dict(self.state, self._patch_nums))

        tokenizer: AnyTokenizer = self.build(make)
        return tokenizer

    @torch.inference_mode(False)
    def tokenizer(self, device: str | torch.device) -> AnyTokenizer:
        """Load the tokenizer in float32."""
        tokenizer: AnyTokenizer = self.load(self._built(), device, in_float32)
        return tokenizer

    @torch.inference_mode(False)
    @torch.no_grad()
    def inference_tokenizer(
        self, device: str | torch.device, dtype: torch.dtype, *, encoder: bool = True
    ) -> InferenceTokenizer:
        """Load the tokenizer for inference.

        Args:
            encoder: load the encoder, which generation does not use.
        """
        check_dtype(dtype)
        names = [name for name in self._expected if encoder or not name.startswith(ENCODER + ".")]

        def dtype_of(name: str) -> torch.dtype:
            return torch.float32 if name.startswith(TOKENIZER_FLOAT32) else dtype

        tokenizer = InferenceTokenizer(self.config, self.values(names, device, dtype_of), dtype)
        return_freed_memory()
        return tokenizer


def are_class_names(names: object, count: int) -> bool:
    """Whether it is a list or tuple of `count` strings."""
    return isinstance(names, list | tuple) and len(names) == count and all(isinstance(n, str) for n in names)


def _kind(value: Tensor) -> str:
    return "floating-point" if value.is_floating_point() else "integer"


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
