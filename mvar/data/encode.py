"""Encode a folder of images to tokens, so that training does not run the encoder.

The files are those of :mod:`mvar.data.tokens`. Rank r writes files r, r + world_size, …; the processes share only the
folder. Files are written atomically, so that a run that was killed or stopped by a full disk can be resumed. No file
depends on another one or on the number of processes.
"""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mvar.data.folder import CropBatch, CropDataset, ImageFolder
from mvar.data.order import check_word
from mvar.data.tokens import (
    MANIFEST,
    MAX_CODES,
    Manifest,
    TokenStoreError,
    checksum,
    find_damage,
    fingerprint,
    shard_files,
)
from mvar.models.tokenizer import Tokenizer
from mvar.utils.files import atomic_write, expanded

IMAGES_PER_SHARD = 1024
"""1.4 MB per crop at 256×256. A killed run loses at most one file per process."""

log = logging.getLogger("mvar")


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
    world_size: int = 1,
    shard: int = IMAGES_PER_SHARD,
) -> int:
    """Write this rank's files of a folder's tokens; complete, undamaged files are kept.

    Args:
        crops: random crops per image; crop c is that of epoch c of training from the images with this seed. None for
            the center crop alone (validation).
        batch: crops per encoder call, rounded down to a multiple of the crops per image.
        dtype: autocast dtype of the encoder; the quantizer stays in float32.
        shard: images per file.

    Returns:
        The number of files written.

    Raises:
        TokenStoreError: `out` has tokens of other images, another tokenizer or other settings.
        UnreadableImages: more than 1 % of the images cannot be read.
        OSError: a file cannot be written, for example because the disk is full.
    """
    out = expanded(out)
    check_word("seed", seed)
    for name, value in (("batch", batch), ("crops", 1 if crops is None else crops)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if tokenizer.num_codes > MAX_CODES:
        raise ValueError(
            f"tokenizer: expected at most {MAX_CODES} codes (tokens are stored as uint16), got {tokenizer.num_codes}"
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
    _write_or_check_manifest(out, manifest, rank)
    missing = _missing_shards(out, range(rank, manifest.shards, world_size))
    images_per_batch = max(1, batch // manifest.crops)
    order = [
        items[first : first + images_per_batch]
        for items in map(manifest.items, missing)
        for first in range(0, len(items), images_per_batch)
    ]
    dataset = CropDataset(folder, seed, tuple(range(crops)) if crops else None)
    total = sum(len(manifest.items(k)) for k in missing)
    with tqdm(total=total, desc=out.name, unit="image", disable=True if rank else None) as progress:
        batches = folder.read(dataset, order, workers)
        encoded = (_encode(crop_batch, tokenizer, dtype, manifest) for crop_batch in batches)
        for k in missing:
            records = _collect(encoded, len(manifest.items(k)), progress)
            _write_shard(out, k, records)
    return len(missing)


def _write_or_check_manifest(out: Path, manifest: Manifest, rank: int) -> None:
    """Write the manifest on rank 0; raise TokenStoreError if `out` has a different one."""
    path = out / MANIFEST
    if path.exists():
        if differences := Manifest.read(out).differences(manifest):
            raise TokenStoreError(
                f"{out}: has tokens with other settings: {differences}; delete it, or choose another folder"
            )
    elif rank == 0:
        for stale in out.glob(f".{MANIFEST}.*"):
            stale.unlink()
        _write(path, manifest.json().encode())


def _missing_shards(out: Path, shards: range) -> list[int]:
    """Indices of the files to write. Removes damaged files and temporary files of a killed process."""
    finished = shard_files(out)
    missing = []
    for k in shards:
        for stale in out.glob(f".{k:05d}-*"):
            stale.unlink()
        kept = 0
        for path in finished.get(k, ()):
            found = find_damage(path)
            if found:
                log.warning("%s; it is written again", found)
            if found or kept:
                path.unlink()
            kept += not found
        if not kept:
            missing.append(k)
    return missing


def _encode(crop_batch: CropBatch, tokenizer: Tokenizer, dtype: torch.dtype, manifest: Manifest) -> NDArray[Any]:
    """The records of a batch of images, (B,) of dtype `manifest.record`."""
    device = tokenizer.quant_conv.weight.device
    images = crop_batch.images.flatten(0, 1).to(device, non_blocking=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        tokens = tokenizer.encode(images)
    records = np.empty(len(crop_batch.indices), manifest.record)
    records["image"] = crop_batch.indices.numpy()
    records["tokens"] = tokens.cpu().numpy().reshape(records["tokens"].shape)
    return records


def _collect(encoded: Iterator[NDArray[Any]], images: int, progress: "tqdm[Any]") -> NDArray[Any]:
    """Concatenate the next batches up to `images` records, the content of one file."""
    parts: list[NDArray[Any]] = []
    while sum(map(len, parts)) < images:
        parts.append(next(encoded))
        progress.update(len(parts[-1]))
    return np.concatenate(parts)


def _write_shard(out: Path, shard: int, records: NDArray[Any]) -> None:
    stream = io.BytesIO()
    np.save(stream, records, allow_pickle=False)
    content = stream.getbuffer()
    _write(out / f"{shard:05d}-{checksum(content)}.npy", content)


def _write(path: Path, content: bytes | memoryview) -> None:
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror}" if error.strerror else str(error)
        raise OSError(f"{reason}; the same command resumes") from error
