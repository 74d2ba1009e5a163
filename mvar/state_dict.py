"""A file's tensors by name, wherever in it they are, and what a file is that has none.

Pickles are read with torch's weights_only loader alone, which runs no code from the file.
"""

import argparse
import codecs
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvar.errors import message
from mvar.files import is_environmental

MARKS = {"model": "word_embed.weight", "tokenizer": "quantize.embedding.weight"}
"""A weight that only this part has: by it a part is found among others, and the name in front of it is taken off."""
AVERAGES = re.compile(r"ema|shadow|averag")
OPTIMIZERS = re.compile(r"optim|exp_avg|moment|grad")  # whose tables can have the weights' names
WRAPPING = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
MAX_NESTING = 4
NUMPY = ("numpy._core", "numpy.core")
PATHS = ("pathlib", "pathlib._local")
BUILTINS = (bool, bytes, dict, float, frozenset, int, list, range, slice, str, tuple)
OTHERS = (
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


class CheckpointError(ValueError):
    """A file that is no usable set of weights; the message says which file and what is wrong."""


def read(file: Path, part: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The names and tensors of one part of a file, "model" or "tokenizer", and the metadata that safetensors have.

    What wrappers and trainers put in front of names is taken off, and what they put around a state dict; of averaged
    and plain weights the averaged ones are taken.

    Raises OSError where there is no file, CheckpointError where it has no state dict.
    """
    if not file.is_file():
        other = "a folder, not a file" if file.is_dir() else "a pipe or device, not a file"
        raise FileNotFoundError(f"{file}: {other if file.exists() else 'no such file'}")
    with file.open("rb") as stream:
        head = stream.read(1024)
    if (kind := _kind(file, head)) is not None:
        raise CheckpointError(f"{file}: {kind}")
    # A safetensors file begins with the length of its JSON header, eight bytes, and the header's brace.
    if head[8:9] == b"{":
        try:
            with safe_open(file, "pt") as content:
                metadata = content.metadata() or {}
                loaded: Any = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: truncated or corrupted: {message(error)}") from error
    else:
        metadata, loaded = {}, _unpickled(file)
    try:
        found = list(_state_dicts(loaded, part))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not found:
        raise CheckpointError(f"{file}: expected a {part}'s state dict of names and tensors")
    marked = [state for state in found if MARKS[part] in state]
    return (marked or found)[0], metadata


def _kind(file: Path, head: bytes) -> str | None:
    """What a file is that certainly has no weights, in words."""
    for magic, words in MAGIC.items():
        if head.startswith(magic):
            return words
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
                f"an index of {len(set(shards.values()))} files with weights, not the weights: join these in one file"
            )
        return "JSON, not weights"
    if head.startswith(b"PK") and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names):
            return "a TorchScript archive: save the state_dict() of what it was made of"
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of {', '.join(names[:3])}{' …' * (len(names) > 3)}, not one of weights"
    return None


class _Value:
    """Stands for a value beside the weights that nothing here reads: it is not made, since a crafted one can crash
    NumPy."""

    def __init__(self, *parts: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@cache
def _inert() -> list[Any]:
    """What trainers keep beside weights: times, paths, NumPy's numbers and arrays, tables with defaults."""
    names = [f"{module}.multiarray.{name}" for module in NUMPY for name in ("scalar", "_reconstruct")]
    names += [
        f"{module}.{pure}{kind}Path" for module in PATHS for pure in ("", "Pure") for kind in ("Posix", "Windows")
    ]
    names += [
        "numpy.ndarray",
        "numpy.dtype",
        *(f"builtins.{kind.__name__}" for kind in BUILTINS),
        *OTHERS,
    ]
    # torch's loader fills no other table than a dict, and no other sequence than a list.
    others: list[Any] = [(lambda *_: {}, "collections.defaultdict"), (lambda *_: [], "collections.deque")]
    return [argparse.Namespace, *others, *((_Value, name) for name in names)]


def _unpickled(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_inert()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))  # torch's own words advise to run it
        why = f"it asks for {asked[1]}; save a state_dict() alone" if asked else "it is no plain pickle of tensors"
        if "Unsupported operand" in str(error):
            why = "it has no pickle of torch.save's own protocol, 2"
        raise CheckpointError(f"{file}: not loaded, because it is more than weights or corrupted: {why}") from error
    except Exception as error:  # what a corrupted byte raises inside the reader is any of a dozen types
        if is_environmental(error):
            raise
        # Of a file in torch's oldest format, a tar archive, torch advises to run what is in it.
        why = "no format that is read as weights alone" if "weights_only" in str(error) else message(error)
        raise CheckpointError(f"{file}: truncated or corrupted, or no weights: {why}") from error


def _state_dicts(content: object, part: str, depth: int = 0) -> Iterator[dict[str, Tensor]]:
    """Every table of names and tensors in there, the likeliest first."""
    if not isinstance(content, Mapping) or depth > MAX_NESTING:
        return
    if content and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()):
        yield from _parts(content, MARKS[part])
        return
    for name in sorted(content, key=_rank):
        yield from _state_dicts(content[name], part, depth + 1)


def _parts(state: Mapping[str, Tensor], mark: str) -> Iterator[dict[str, Tensor]]:
    """The part under each name in front of the mark, without it; without a mark all that there is."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "n_averaged":  # torch's AveragedModel
            continue
        inner = ".".join(piece for piece in name.split(".") if piece not in WRAPPING)
        if inner in plain:
            raise ValueError(f"two weights are called {inner!r} where wrappers' names are taken off")
        plain[inner] = value.detach()
    fronts = [name.removesuffix(mark) for name in plain if name == mark or name.endswith("." + mark)]
    for front in sorted(fronts or [""], key=lambda front: not _is_average(front)):
        yield {name.removeprefix(front): value for name, value in plain.items() if name.startswith(front)}


def _rank(name: object) -> int:
    """Averages go first, and what an optimizer keeps goes last."""
    if isinstance(name, str) and OPTIMIZERS.search(name.lower()) is not None:
        return 2
    return 0 if _is_average(name) else 1


def _is_average(name: object) -> bool:
    return isinstance(name, str) and AVERAGES.search(name.lower()) is not None
