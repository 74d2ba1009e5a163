"""Reading state dicts from checkpoint files, with error messages for files that contain none.

Pickles are read only with torch's weights_only loader, which runs no code from the file.
"""

import argparse
import codecs
import json
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvar.utils.errors import message
from mvar.utils.files import is_environmental

MARKERS = {
    "model": "word_embed.weight",
    "tokenizer": "quantize.embedding.weight",
    "VGG16": "features.0.weight",
    "LPIPS": "lin0.model.1.weight",
}
"""A weight that only this part has. It identifies the part's state dict and the prefix of its names."""
AVERAGES = re.compile(r"ema|shadow|averag")
OPTIMIZERS = re.compile(r"optim|exp_avg|moment|grad")  # their dicts can have the same names as the weights
WRAPPER_NAMES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
MAX_DEPTH = 4
NUMPY_MODULES = ("numpy._core", "numpy.core")
PATH_MODULES = ("pathlib", "pathlib._local")
BUILTIN_TYPES = (bool, bytes, dict, float, frozenset, int, list, range, slice, str, tuple)
OTHER_TYPES = (
    *("datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone"),
    *("decimal.Decimal", "fractions.Fraction", "types.SimpleNamespace", "uuid.SafeUUID", "uuid.UUID"),
    "torch.torch_version.TorchVersion",
)
MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights: fetch them with git lfs pull",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ\x00": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"GGUF": "a GGUF file; expected .pth or .safetensors",
    b"\x89HDF": "an HDF5 file; expected .pth or .safetensors",
    b"\x93NUMPY": "a NumPy array; expected .pth or .safetensors",
}


_lock = threading.Lock()


class CheckpointError(ValueError):
    """A file does not contain valid weights. The message has the name of the file and the reason."""


def read(file: Path, part: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Read the state dict of one part of a file, and the metadata of safetensors.

    Nested checkpoints are searched, prefixes of wrappers and trainers are removed, averaged weights take precedence.
    The tensors are views of the memory-mapped file, which must not be written to; those of torch's legacy format are
    in memory.

    Args:
        file: .pth or .safetensors.
        part: "model" or "tokenizer"; "VGG16" and "LPIPS" for :mod:`mvar.train_tokenizer.perceptual`.

    Raises:
        OSError: the file does not exist.
        CheckpointError: it does not contain a state dict.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: {'not a regular file' if file.exists() else 'no such file'}")
    with file.open("rb") as stream:
        head = stream.read(1024)
    if (reason := _not_weights(file, head)) is not None:
        raise CheckpointError(f"{file}: {reason}")
    # safetensors: eight bytes with the length of the JSON header, then the header.
    if head[8:9] == b"{":
        try:
            with safe_open(file, "pt") as content:
                metadata = content.metadata() or {}
                loaded: Any = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: truncated or corrupted: {message(error)}") from error
    else:
        metadata, loaded = {}, _unpickle(file)
    try:
        found = list(_state_dicts(loaded, part))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not found:
        raise CheckpointError(f"{file}: expected a {part}'s state dict of names and tensors")
    matching = [state for state in found if MARKERS[part] in state]
    return (matching or found)[0], metadata


def _not_weights(file: Path, head: bytes) -> str | None:
    """Describe a file that cannot contain weights, or return None."""
    for magic, description in MAGIC.items():
        if head.startswith(magic):
            return description
    if not head:
        return "an empty file"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    text = b"" if b"\0" in head else head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"<"):
        return "an HTML page, not the weights: download the file itself"
    if text.startswith((b"{", b"[")):
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError:
            return None
        if isinstance(content, dict) and isinstance(shards := content.get("weight_map"), dict):
            return (
                f"an index of {len(set(shards.values()))} files with weights, not the weights: merge them into one file"
            )
        return "JSON, not weights"
    if head.startswith(b"PK") and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names):
            return "a TorchScript archive: save the state_dict() of the module instead"
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of {', '.join(names[:3])}{' …' * (len(names) > 3)} without weights"
    return None


class _Placeholder:
    """Replaces values other than weights, which are not used: unpickling a crafted one can crash NumPy."""

    def __init__(self, *parts: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@cache
def _allowed_globals() -> list[Any]:
    """Harmless types in trainers' checkpoints: times, paths, NumPy scalars and arrays, containers."""
    names = [f"{module}.multiarray.{name}" for module in NUMPY_MODULES for name in ("scalar", "_reconstruct")]
    path_types = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    names += [f"{module}.{name}" for module in PATH_MODULES for name in path_types]
    names += [
        "numpy.ndarray",
        "numpy.dtype",
        *(f"builtins.{kind.__name__}" for kind in BUILTIN_TYPES),
        *OTHER_TYPES,
    ]
    # torch's loader supports only dict and list.
    containers: list[Any] = [(lambda *_: {}, "collections.defaultdict"), (lambda *_: [], "collections.deque")]
    return [argparse.Namespace, *containers, *((_Placeholder, name) for name in names)]


def _unpickle(file: Path) -> Any:
    try:
        with _lock, torch.serialization.safe_globals(_allowed_globals()):  # which are of the process
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # torch's message recommends weights_only=False, which would run code from the file.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it contains {found[1]}; save only a state_dict()" if found else "it is not a plain pickle of tensors"
        if "Unsupported operand" in str(error):
            reason = "its pickle protocol is not 2, that of torch.save"
        raise CheckpointError(f"{file}: not loaded, because it is not only weights, or corrupted: {reason}") from error
    except Exception as error:  # a corrupted file raises any of a dozen types
        if is_environmental(error):
            raise
        # For tar archives, its oldest format, torch's message also recommends weights_only=False.
        unsafe = "weights_only" in str(error)
        reason = "a format that cannot be read without running code" if unsafe else message(error)
        raise CheckpointError(f"{file}: truncated, corrupted or not weights: {reason}") from error


def _state_dicts(content: object, part: str, depth: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield all state dicts in nested dicts: averages first, optimizer states last."""
    if not isinstance(content, Mapping) or depth > MAX_DEPTH:
        return
    if content and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()):
        yield from _parts(content, MARKERS[part])
        return
    for name in sorted(content, key=_rank):
        yield from _state_dicts(content[name], part, depth + 1)


def _parts(state: Mapping[str, Tensor], marker: str) -> Iterator[dict[str, Tensor]]:
    """Yield the weights under each prefix of the marker, without the prefix; all weights if there is no marker."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "n_averaged":  # torch's AveragedModel
            continue
        inner = ".".join(piece for piece in name.split(".") if piece not in WRAPPER_NAMES)
        if inner in plain:
            raise ValueError(f"two weights are named {inner!r} without the prefixes of wrappers")
        plain[inner] = value.detach()
    prefixes = [name.removesuffix(marker) for name in plain if name == marker or name.endswith("." + marker)]
    for prefix in sorted(prefixes or [""], key=lambda prefix: not _is_average(prefix)):
        yield {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}


def _rank(name: object) -> int:
    """Sort key: averages first, optimizer states last."""
    if isinstance(name, str) and OPTIMIZERS.search(name.lower()) is not None:
        return 2
    return 0 if _is_average(name) else 1


def _is_average(name: object) -> bool:
    return isinstance(name, str) and AVERAGES.search(name.lower()) is not None
