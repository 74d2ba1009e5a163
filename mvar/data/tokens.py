"""Tokens of a data set on disk, as `mvar tokenize` writes them, and the source that reads them.

A folder holds

    manifest.json                 what the tokens are of, and made with what; written first, never changed
    00000-1f2e3d4c5b6a7980.npy    pictures 0 … n−1, one record each: the picture read, and its crops' tokens
    00001-….npy                   the next n

A file's name ends in the first 16 hexadecimal digits of its SHA-256, and appears when all of the file is there: what is
finished, what is missing and what is damaged shows from the folder alone.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mvar.data.order import Purpose, in_order, shuffled, words
from mvar.data.source import Batch, load
from mvar.files import expanded, is_environmental
from mvar.tokenizer import Tokenizer

MANIFEST = "manifest.json"
FORMAT = 1
MAX_CODES = 2**16
SUM_DIGITS = 16


class TokenStoreError(ValueError):
    """A folder of tokens that is unfinished, damaged, or not of this model; the message says which file and why."""


@dataclass(frozen=True)
class Manifest:
    """What a folder's tokens are of. Two runs of `mvar tokenize` with equal manifests write equal files."""

    tokenizer: str
    """fingerprint of the weights that decide tokens"""
    patch_nums: tuple[int, ...]
    num_codes: int
    resolution: int
    crops: int
    """of each picture"""
    augmented: bool
    """crop c is what epoch c of training from the pictures takes; otherwise the one crop is the middle"""
    flip: bool
    mid_side: int
    """the shorter side before the crop, pixels"""
    seed: int
    dtype: str
    """of the encoder"""
    classes: dict[str, int]
    """pictures of each, in the order of their labels"""
    names: str
    """SHA-256 of the pictures' names"""
    shard: int
    """pictures a file"""
    format: int = FORMAT

    @property
    def pictures(self) -> int:
        return sum(self.classes.values())

    @property
    def shards(self) -> int:
        return -(-self.pictures // self.shard)

    @property
    def record(self) -> np.dtype[Any]:
        """Of one picture: the one that was read, itself unless it is unreadable, and the tokens of its crops."""
        num_tokens = sum(side * side for side in self.patch_nums)
        return np.dtype([("picture", "<u4"), ("tokens", "<u2", (self.crops, num_tokens))])

    def items(self, shard: int) -> range:
        """The pictures of a file."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.pictures))

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder. Raises TokenStoreError where there is none, or none that this version reads."""
        path = folder / MANIFEST
        if not path.is_file():
            parts = [p.parent.name for p in sorted(folder.glob(f"*/{MANIFEST}"))]
            hint = f"give one of its parts: {', '.join(parts)}" if parts else "`mvar tokenize` writes one"
            raise TokenStoreError(f"{folder}: no {MANIFEST} there; {hint}")
        try:
            stored = json.loads(path.read_text())
            if stored.get("format") != FORMAT:
                raise ValueError(f"format {stored.get('format')!r}, and this version reads {FORMAT}")
            if odd := stored.keys() ^ {field.name for field in fields(cls)}:
                raise ValueError(f"missing or unknown: {', '.join(sorted(odd))}")
            return cls(**(stored | {"patch_nums": tuple(stored["patch_nums"])}))
        except (ValueError, TypeError, AttributeError) as error:
            raise TokenStoreError(f"{path}: not a manifest of tokens: {error}") from error

    def differences(self, other: "Manifest") -> str:
        """What differs between two manifests, in words; empty where nothing does."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return "; ".join(f"{name} {_short(a)} against {_short(b)}" for name, a, b in pairs if a != b)


def _short(value: object) -> str:
    text = f"{len(value)} classes, {sum(value.values())} pictures" if isinstance(value, dict) else str(value)
    return text if len(text) <= 64 else text[:16] + "…"


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the weights that decide tokens, as float32: encoder, codebook, φ; not the decoder, nor statistics."""
    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantize.embedding.", "quantize.quant_resi.")):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def shard_sum(content: bytes | memoryview) -> str:
    """The part of a file's name that stands for its content."""
    return hashlib.sha256(content).hexdigest()[:SUM_DIGITS]


def damage(path: Path) -> str | None:
    """What is wrong with a file of tokens, read as a whole; None if nothing is."""
    found = shard_sum(path.read_bytes())
    if path.stem.partition("-")[2] == found:
        return None
    return f"{path}: damaged: {path.stat().st_size} bytes with checksum {found}"


def shard_files(folder: Path) -> dict[int, list[Path]]:
    """The finished files of a folder by their number; several only where two runs differed."""
    files: dict[int, list[Path]] = {}
    for path in sorted(folder.glob(f"{'[0-9]' * 5}*-{'?' * SUM_DIGITS}.npy")):
        files.setdefault(int(path.stem.partition("-")[0]), []).append(path)
    return files


class TokenStore:
    """A source of tokens that `mvar tokenize` wrote, memory-mapped; opening it reads no more than the files' headers.

    In epoch e of training, item i has the crop (a number drawn from (seed, i), plus e) mod crops: as many epochs as
    there are crops see every crop once. Validation has the first crop.

    Args:
        path: folder with a manifest: what was written for `train` or for `val`.

    Raises:
        TokenStoreError: no manifest, unfinished, or a file truncated. `verify` reads them all.
    """

    unreadable: Collection[str] = ()
    """what could not be read has stand-ins since `mvar tokenize`, which tells"""
    skipped: Collection[str] = ()

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        self.manifest = Manifest.read(self.path)
        files, missing = shard_files(self.path), []
        for k in range(self.manifest.shards):
            if len(files.get(k, ())) > 1:
                raise TokenStoreError(
                    f"{files[k][0]} and {files[k][1].name} differ: delete both, run mvar tokenize again"
                )
            if k not in files:
                missing.append(k)
        if missing:
            raise TokenStoreError(
                f"{self.path}: unfinished: {len(missing)} of {self.manifest.shards} files are missing, the first is "
                f"{missing[0]:05d}; run the same mvar tokenize again, which makes them"
            )
        self._files = [files[k][0] for k in range(self.manifest.shards)]
        for k, file in enumerate(self._files):
            _check_header(file, len(self.manifest.items(k)), self.manifest.record)
        counts = list(self.manifest.classes.values())
        self._labels = torch.from_numpy(np.arange(len(counts)).repeat(counts))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest.classes)

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    def __len__(self) -> int:
        return self.manifest.pictures

    def digest(self) -> str:
        """Of the pictures' names, as the folder's itself."""
        return self.manifest.names

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise TokenStoreError unless these are tokens of this tokenizer, with its token maps."""
        for name in ("patch_nums", "num_codes", "resolution"):
            stored, given = getattr(self.manifest, name), getattr(tokenizer, name)
            if stored != given:
                raise TokenStoreError(
                    f"{self.path}: tokens of another tokenizer: {name} {stored}, and here it is {given}"
                )
        if self.manifest.tokenizer != (given := fingerprint(tokenizer)):
            stored = self.manifest.tokenizer
            raise TokenStoreError(
                f"{self.path}: tokens of another tokenizer: its weights are {stored[:SUM_DIGITS]}, and here they are "
                f"{given[:SUM_DIGITS]}"
            )

    def verify(self) -> None:
        """Read every file and compare its checksum: TokenStoreError naming the damaged ones."""
        if found := [text for text in map(damage, self._files) if text]:
            raise TokenStoreError(
                f"{len(found)} files are damaged; mvar tokenize makes them anew: {'; '.join(found[:3])}"
            )

    def batches(
        self, *, batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        order = shuffled(len(self), batch=batch, seed=seed, epoch=epoch, rank=rank, world=world, start=start)
        # The sum does not overflow: the words lose their highest bit.
        first = words(len(self), Purpose.CROP_OF_STORE, seed=seed) >> np.uint64(1)
        crops = ((first + np.uint64(epoch)) % np.uint64(self.manifest.crops)).astype(np.int64)
        return self._batches(((items, crops[items]) for items in order), workers)

    def once(self, *, batch: int, rank: int = 0, world: int = 1, workers: int = 0) -> Iterator[Batch]:
        order = in_order(len(self), batch=batch, rank=rank, world=world)
        return self._batches(((items, np.zeros_like(items)) for items in order), workers)

    def _batches(self, order: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]], workers: int) -> Iterator[Batch]:
        rows = ([*zip(items.tolist(), crops.tolist(), strict=True)] for items, crops in order)
        for read in load(_Rows(self._files, self.manifest), rows, workers):
            yield Batch(self._labels[read.pictures], None, read.tokens)


class _Read(NamedTuple):
    pictures: Tensor
    tokens: Tensor


class _Rows(Dataset[_Read]):
    """Reads (item, crop) pairs of mapped files, in worker processes."""

    def __init__(self, files: list[Path], manifest: Manifest) -> None:
        self.files, self.manifest = files, manifest

    def __getitems__(self, rows: Sequence[tuple[int, int]]) -> _Read:
        tokens = np.empty((len(rows), self.manifest.record["tokens"].shape[1]), np.int64)
        pictures = np.empty(len(rows), np.int64)
        for i, (item, crop) in enumerate(rows):
            shard, row = divmod(item, self.manifest.shard)
            record = _mapped(self.files[shard])[row]
            pictures[i], tokens[i] = record["picture"], record["tokens"][crop]
        return _Read(torch.from_numpy(pictures), torch.from_numpy(tokens))


@cache
def _mapped(path: Path) -> NDArray[Any]:
    """Mapped once a process. (A mapping that is sent to another process would go there as a copy of the file.)"""
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _check_header(path: Path, pictures: int, record: np.dtype[Any]) -> None:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if is_environmental(error):
            raise
        raise TokenStoreError(f"{path}: truncated or damaged: {error}") from error
    if found.shape != (pictures,) or found.dtype != record:
        raise TokenStoreError(f"{path}: expected {pictures} records {record}, found {found.shape} of {found.dtype}")
