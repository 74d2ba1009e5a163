"""Format of the tokens that `mvar tokenize` writes, and the source that reads them.

A folder contains

    manifest.json                 tokenizer, images and settings; written first and never changed
    00000-1f2e3d4c5b6a7980.npy    images 0 … n−1, one record each: index of the image read and the tokens of its crops
    00001-….npy                   the next n images

The name of a file contains the first 16 hexadecimal digits of its SHA-256. Files are written atomically, so that
complete, missing and damaged files can be distinguished.
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
from mvar.models.tokenizer import Tokenizer
from mvar.utils.files import expanded, is_environmental

MANIFEST = "manifest.json"
FORMAT = 2  # 1: the field "image" of the records was named "picture"
MAX_CODES = 2**16
CHECKSUM_DIGITS = 16


class TokenStoreError(ValueError):
    """A folder of tokens is incomplete, damaged, or of another tokenizer; the message names the file and the cause."""


@dataclass(frozen=True)
class Manifest:
    """Everything that determines a folder's tokens: runs of `mvar tokenize` with equal manifests write equal files."""

    tokenizer: str
    """see :func:`fingerprint`"""
    patch_nums: tuple[int, ...]
    num_codes: int
    resolution: int
    crops: int
    """crops per image"""
    augmented: bool
    """True: crop c is the random crop of epoch c of training from the images. False: one center crop."""
    flip: bool
    mid_side: int
    """shorter side before the crop, in pixels"""
    seed: int
    dtype: str
    """autocast dtype of the encoder"""
    classes: dict[str, int]
    """number of images by class name, in the order of the labels"""
    names: str
    """SHA-256 of the image names"""
    shard: int
    """images per file"""
    format: int = FORMAT

    @property
    def images(self) -> int:
        return sum(self.classes.values())

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard)

    @property
    def record(self) -> np.dtype[Any]:
        """dtype of a record: index of the image read (of its replacement if it was unreadable), tokens of its crops."""
        num_tokens = sum(side * side for side in self.patch_nums)
        return np.dtype([("image", "<u4"), ("tokens", "<u2", (self.crops, num_tokens))])

    def items(self, shard: int) -> range:
        """Indices of the images in a file."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.images))

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder. Raises TokenStoreError if it is missing, damaged or of another format."""
        path = folder / MANIFEST
        if not path.is_file():
            parts = [p.parent.name for p in sorted(folder.glob(f"*/{MANIFEST}"))]
            hint = f"give one of its parts: {', '.join(parts)}" if parts else "`mvar tokenize` writes one"
            raise TokenStoreError(f"{folder}: no {MANIFEST} there; {hint}")
        try:
            stored = json.loads(path.read_text())
            if stored.get("format") != FORMAT:
                raise ValueError(
                    f"expected format {FORMAT}, got {stored.get('format')!r}; delete the folder and run mvar tokenize"
                )
            if mismatched := stored.keys() ^ {field.name for field in fields(cls)}:
                raise ValueError(f"missing or unknown: {', '.join(sorted(mismatched))}")
            return cls(**(stored | {"patch_nums": tuple(stored["patch_nums"])}))
        except (ValueError, TypeError, AttributeError) as error:
            raise TokenStoreError(f"{path}: not a manifest of tokens: {error}") from error

    def differences(self, other: "Manifest") -> str:
        """The fields that differ, as "name value, not other value; …"; empty for equal manifests."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return "; ".join(f"{name} {_shortened(a)}, not {_shortened(b)}" for name, a, b in pairs if a != b)


def _shortened(value: object) -> str:
    text = f"{len(value)} classes, {sum(value.values())} images" if isinstance(value, dict) else str(value)
    return text if len(text) <= 64 else text[:16] + "…"


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the weights that determine tokens, in float32: encoder, codebook and φ; not decoder or statistics."""
    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantize.embedding.", "quantize.quant_resi.")):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def checksum(content: bytes | memoryview) -> str:
    """The first 16 hexadecimal digits of the SHA-256, as in the file name."""
    return hashlib.sha256(content).hexdigest()[:CHECKSUM_DIGITS]


def find_damage(path: Path) -> str | None:
    """Compare a file with the checksum in its name. Returns an error message, or None if they agree."""
    found = checksum(path.read_bytes())
    if path.stem.partition("-")[2] == found:
        return None
    return f"{path}: damaged: {path.stat().st_size} bytes have checksum {found}"


def shard_files(folder: Path) -> dict[int, list[Path]]:
    """The complete files of a folder by index; several per index only if two runs wrote different content."""
    files: dict[int, list[Path]] = {}
    for path in sorted(folder.glob(f"{'[0-9]' * 5}*-{'?' * CHECKSUM_DIGITS}.npy")):
        files.setdefault(int(path.stem.partition("-")[0]), []).append(path)
    return files


class TokenStore:
    """A source of the memory-mapped tokens that `mvar tokenize` wrote. Opening it reads only the headers of the files.

    In epoch e, training uses crop (r + e) mod crops of item i, where r is a random number of (seed, i), so that `crops`
    consecutive epochs use every crop once. Validation uses the first crop.

    Args:
        path: folder with a manifest, `train` or `val` in the output folder of `mvar tokenize`.

    Raises:
        TokenStoreError: the manifest is missing, or files are missing or truncated. See also :meth:`verify`.
    """

    unreadable: Collection[str] = ()  # `mvar tokenize` has replaced and reported them
    skipped: Collection[str] = ()

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        self.manifest = Manifest.read(self.path)
        files, missing = shard_files(self.path), []
        for k in range(self.manifest.shards):
            if len(files.get(k, ())) > 1:
                raise TokenStoreError(
                    f"{files[k][0]} and {files[k][1].name} differ: delete both and run mvar tokenize again"
                )
            if k not in files:
                missing.append(k)
        if missing:
            raise TokenStoreError(
                f"{self.path}: incomplete: {len(missing)} of {self.manifest.shards} files are missing, the first is "
                f"{missing[0]:05d}; run the same mvar tokenize again, which writes them"
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
        return self.manifest.images

    def digest(self) -> str:
        """SHA-256 of the image names, equal to :meth:`ImageFolder.digest` of the encoded folder."""
        return self.manifest.names

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise TokenStoreError unless the tokens were encoded by this tokenizer with the same token maps."""
        for name in ("patch_nums", "num_codes", "resolution"):
            stored, expected = getattr(self.manifest, name), getattr(tokenizer, name)
            if stored != expected:
                raise TokenStoreError(
                    f"{self.path}: tokens of another tokenizer: expected {name} {expected}, got {stored}"
                )
        if self.manifest.tokenizer != (expected := fingerprint(tokenizer)):
            stored = self.manifest.tokenizer
            raise TokenStoreError(
                f"{self.path}: tokens of another tokenizer: expected weights with digest {expected[:CHECKSUM_DIGITS]}, "
                f"got {stored[:CHECKSUM_DIGITS]}"
            )

    def verify(self) -> None:
        """Read all files and compare their checksums. Raises TokenStoreError with the names of damaged files."""
        if found := [text for text in map(find_damage, self._files) if text]:
            raise TokenStoreError(
                f"{len(found)} files are damaged; mvar tokenize writes them again: {'; '.join(found[:3])}"
            )

    def batches(
        self, *, batch: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1, start: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        order = shuffled(len(self), batch=batch, seed=seed, epoch=epoch, rank=rank, world_size=world_size, start=start)
        offsets = words(len(self), Purpose.CROP_OF_STORE, seed=seed) >> np.uint64(1)  # 63 bits: the sum cannot overflow
        crops = ((offsets + np.uint64(epoch)) % np.uint64(self.manifest.crops)).astype(np.int64)
        return self._batches(((items, crops[items]) for items in order), workers)

    def once(self, *, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[Batch]:
        order = in_order(len(self), batch=batch, rank=rank, world_size=world_size)
        return self._batches(((items, np.zeros_like(items)) for items in order), workers)

    def _batches(self, order: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]], workers: int) -> Iterator[Batch]:
        rows = ([*zip(items.tolist(), crops.tolist(), strict=True)] for items, crops in order)
        for token_batch in load(_TokenDataset(self._files, self.manifest), rows, workers):
            yield Batch(self._labels[token_batch.indices], None, token_batch.tokens)


class _TokenBatch(NamedTuple):
    indices: Tensor
    tokens: Tensor


class _TokenDataset(Dataset[_TokenBatch]):
    """Reads (item, crop) pairs of memory-mapped files in worker processes."""

    def __init__(self, files: list[Path], manifest: Manifest) -> None:
        self.files, self.manifest = files, manifest

    def __getitems__(self, rows: Sequence[tuple[int, int]]) -> _TokenBatch:
        tokens = np.empty((len(rows), self.manifest.record["tokens"].shape[1]), np.int64)
        indices = np.empty(len(rows), np.int64)
        for i, (item, crop) in enumerate(rows):
            shard, row = divmod(item, self.manifest.shard)
            record = _memory_map(self.files[shard])[row]
            indices[i], tokens[i] = record["image"], record["tokens"][crop]
        return _TokenBatch(torch.from_numpy(indices), torch.from_numpy(tokens))


@cache
def _memory_map(path: Path) -> NDArray[Any]:
    """Memory-map a file once per process. (Pickled into a worker process, a memmap would become a copy of the file.)"""
    records: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return records


def _check_header(path: Path, images: int, record: np.dtype[Any]) -> None:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if is_environmental(error):
            raise
        raise TokenStoreError(f"{path}: truncated or damaged: {error}") from error
    if found.shape != (images,) or found.dtype != record:
        raise TokenStoreError(f"{path}: expected {images} records of {record}, got {found.shape} of {found.dtype}")
