"""`mvar tokenize`: the tokens of a data set, made once, so that no training step pays for the encoder.

The files are those of `mvar.data.tokens`. Rank r of torchrun makes files r, r + world, …; the processes share nothing
but the folder. A file is written when it is complete, so that a run that was killed, or found the disk full, goes on
where it was; no file depends on the others, nor on the number of processes.
"""

import argparse
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mvar.arguments import DTYPES
from mvar.checkpoint import load_tokenizer
from mvar.data.folder import Crops, ImageFolder, Read
from mvar.data.order import check_word
from mvar.data.source import skipped_in_words
from mvar.data.tokens import MANIFEST, MAX_CODES, Manifest, TokenStoreError, damage, fingerprint, shard_files, shard_sum
from mvar.files import expanded, replacing
from mvar.processes import launched, own_device
from mvar.tokenizer import Tokenizer

SHARD = 1024
"""Pictures a file: 1.4 MB for each crop at 256×256, and what a killed run loses at most."""

log = logging.getLogger("mvar")


def tokenize(options: argparse.Namespace) -> None:
    """Write the tokens of `data_path/train`, and of `data_path/val` where there is one, into folders of these names."""
    share = launched()
    rank, world = share.rank, share.size
    tokenizer = load_tokenizer(
        options.tokenizer,
        resolution=options.resolution,
        patch_nums=options.patch_nums,
        device=own_device(options.device),
    )
    train = ImageFolder(
        options.data_path / "train", tokenizer.resolution, mid_resolution=options.mid_reso, flip=options.hflip
    )
    folders = {"train": train}
    if (options.data_path / "val").is_dir():
        folders["val"] = ImageFolder(
            options.data_path / "val", tokenizer.resolution, mid_resolution=options.mid_reso, classes=train.classes
        )
    for name, folder in folders.items():
        written = write_tokens(
            folder,
            tokenizer,
            options.out / name,
            crops=options.crops if name == "train" else None,
            seed=options.seed,
            batch=options.batch,
            dtype=DTYPES[options.dtype] or torch.float32,
            workers=options.workers,
            rank=rank,
            world=world,
        )
        part = f" (process {rank} of {world})" if world > 1 else ""
        print(
            f"{options.out / name}{part}: {len(folder)} pictures of {folder.num_classes} classes, "
            f"{written} files written, {len(folder.unreadable)} unreadable pictures{skipped_in_words(folder)}"
        )


def write_tokens(
    folder: ImageFolder,
    tokenizer: Tokenizer,
    out: Path,
    *,
    crops: int | None,
    seed: int = 0,
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    shard: int = SHARD,
) -> int:
    """Write this rank's part of a folder's tokens; what is there and undamaged stays. Returns the files written.

    Args:
        crops: of each picture; crop c is the one that epoch c of training from the pictures with this seed takes.
            None for one crop, the middle: validation.
        batch: crops that are encoded at a time, rounded down to whole pictures.
        dtype: of the encoder's products; the quantizer stays in float32.
        shard: pictures a file.

    Raises:
        TokenStoreError: `out` holds tokens of something else, or made in another way.
        UnreadablePictures: more than 1 %.
        OSError: a file cannot be written, on a full disk for one.
    """
    out = expanded(out)
    check_word("seed", seed)
    for name, value in (("batch", batch), ("crops", 1 if crops is None else crops)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if tokenizer.num_codes > MAX_CODES:
        raise ValueError(
            f"tokenizer: expected at most {MAX_CODES} codes, which 16 bits tell apart, got {tokenizer.num_codes}"
        )
    manifest = Manifest(
        tokenizer=fingerprint(tokenizer),
        patch_nums=tokenizer.patch_nums,
        num_codes=tokenizer.num_codes,
        resolution=tokenizer.resolution,
        crops=crops or 1,
        augmented=crops is not None,
        flip=folder.flip,
        mid_side=folder.side,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        classes=dict(zip(folder.classes, folder.counts, strict=True)),
        names=folder.digest(),
        shard=shard,
    )
    _settle(out, manifest, rank)
    missing = _missing(out, range(rank, manifest.shards, world))
    pictures_at_a_time = max(1, batch // manifest.crops)
    order = [
        items[first : first + pictures_at_a_time]
        for items in map(manifest.items, missing)
        for first in range(0, len(items), pictures_at_a_time)
    ]
    reader = Crops(folder, seed, tuple(range(crops)) if crops else None)
    total = sum(len(manifest.items(k)) for k in missing)
    with tqdm(total=total, desc=out.name, unit="picture", disable=True if rank else None) as progress:
        encoded = (_encoded(read, tokenizer, dtype, manifest) for read in folder.read(reader, order, workers))
        for k in missing:
            records = _gathered(encoded, len(manifest.items(k)), progress)
            _write_shard(out, k, records)
    return len(missing)


def _settle(out: Path, manifest: Manifest, rank: int) -> None:
    """Write the manifest, or see that the one there is the same."""
    path = out / MANIFEST
    if path.exists():
        if differences := Manifest.read(out).differences(manifest):
            raise TokenStoreError(f"{out}: has tokens made otherwise: {differences}; delete it, or write elsewhere")
    elif rank == 0:
        for stale in out.glob(f".{MANIFEST}.*"):
            stale.unlink()
        _write(path, manifest.json().encode())


def _missing(out: Path, shards: range) -> list[int]:
    """The files to make; damaged ones are taken away, and those that a killed process left half-written."""
    finished = shard_files(out)
    missing = []
    for k in shards:
        for stale in out.glob(f".{k:05d}-*"):
            stale.unlink()
        kept = 0
        for path in finished.get(k, ()):
            found = damage(path)
            if found:
                log.warning("%s; made anew", found)
            if found or kept:
                path.unlink()
            kept += not found
        if not kept:
            missing.append(k)
    return missing


def _encoded(read: Read, tokenizer: Tokenizer, dtype: torch.dtype, manifest: Manifest) -> NDArray[Any]:
    """A batch's records."""
    device = tokenizer.quant_conv.weight.device
    images = read.images.flatten(0, 1).to(device, non_blocking=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        tokens = tokenizer.encode(images)
    records = np.empty(len(read.pictures), manifest.record)
    records["picture"] = read.pictures.numpy()
    records["tokens"] = tokens.cpu().numpy().reshape(records["tokens"].shape)
    return records


def _gathered(encoded: Iterator[NDArray[Any]], pictures: int, progress: "tqdm[Any]") -> NDArray[Any]:
    """The next batches, which make one file."""
    parts: list[NDArray[Any]] = []
    while sum(map(len, parts)) < pictures:
        parts.append(next(encoded))
        progress.update(len(parts[-1]))
    return np.concatenate(parts)


def _write_shard(out: Path, shard: int, records: NDArray[Any]) -> None:
    stream = io.BytesIO()
    np.save(stream, records, allow_pickle=False)
    content = stream.getbuffer()
    _write(out / f"{shard:05d}-{shard_sum(content)}.npy", content)


def _write(path: Path, content: bytes | memoryview) -> None:
    try:
        with replacing(path) as aside:
            aside.write_bytes(content)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror}" if error.strerror else str(error)
        raise OSError(f"{reason}; the same command goes on from here") from error
