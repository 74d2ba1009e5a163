"""The images of an evaluation on disk: drawn by any number of processes, and gone on with after a stop.

A folder holds

    recipe.json          all that decides the pixels; written first, and not changed once there are images
    drawn_by.json        versions and machines that drew them, more than one where a stopped run went on elsewhere
    parts/000000.npy     finished batches by their first image, until all are there; each appears whole
    images.npz           all of them, as ADM's evaluator reads them; appears whole
    png/000000_0207.png  the same by image and class, if asked for
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mvar.batches import drawn_batches
from mvar.files import check_writable, replacing, write_json
from mvar.generate import PendingResult
from mvar.pictures import read_npz, save_npz, save_pixels
from mvar.processes import Processes

Content = TypeVar("Content")


@dataclass(frozen=True)
class Recipe:
    """What decides the pixels: two runs with equal recipes draw the same images, in any number of processes.

    model, tokenizer: SHA-256 of the weights. graph: None where the device decides. threads: of each process, on a CPU,
    where the last bit of a float32 convolution follows from them.
    """

    model: str
    tokenizer: str
    classes: int
    per_class: int
    resolution: int
    cfg: float
    top_k: int
    top_p: float
    seed: int
    batch: int
    dtype: str
    backend: str
    graph: bool | None
    compiled_decoder: bool
    device: str
    threads: int | None
    more_smooth: bool = False
    format: int = 1

    @property
    def images(self) -> int:
        return self.classes * self.per_class

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.images, self.resolution, self.resolution, 3

    def labels(self) -> Tensor:
        """Classes in turns, so that any run of images has all of them.

        ADM's evaluator takes the Inception score of 5,000 images after another: in order of their classes, d30's falls
        from 298 to 62 (openai/guided-diffusion #165, #153; FoundationVision/VAR #77).
        """
        return torch.arange(self.images, dtype=torch.int64, device="cpu") % self.classes


def draw_images(
    folder: Path,
    recipe: Recipe,
    begin: Callable[[int], PendingResult],
    processes: Processes,
    drawn_by: Mapping[str, Any],
) -> Path:
    """Sample what is missing, and give the npz with all images. For every process of a run; all of them get the path.

    begin: launches the batch of `recipe.batch` images (the last one: what is left) from a first one on.
    drawn_by: versions and machine, for the record.

    Raises:
        ValueError: the folder has images of another recipe, or of one that is not there.
        FloatingPointError: a batch is not finite.
        OSError: a file cannot be written; the same call goes on from there.
    """
    npz, parts = folder / "images.npz", folder / "parts"
    starts = range(0, recipe.images, recipe.batch)
    if processes.leads:
        _claim(folder, recipe, drawn_by)
    # One process looks, so that all see the same.
    missing = processes.agreed([] if npz.exists() else [s for s in starts if not _part(parts, s).exists()])
    mine = missing[processes.rank :: processes.size]
    quiet = None if processes.leads else True  # None: where there is no terminal
    for start, pixels in drawn_batches(begin, tqdm(mine, desc="images", unit="batch", disable=quiet)):
        content = io.BytesIO()  # what NumPy writes to a file does not tell that the disk is full
        np.save(content, pixels.numpy())
        with replacing(_part(parts, start)) as aside:
            aside.write_bytes(content.getbuffer())
    processes.meet()
    if processes.leads and not npz.exists():
        save_npz(npz, recipe.shape, _read_parts(parts, recipe, starts), recipe.labels())
    if processes.leads:
        shutil.rmtree(parts, ignore_errors=True)
    processes.meet()
    return npz


def write_pngs(folder: Path, recipe: Recipe, processes: Processes) -> None:
    """Every image that is not there yet as a PNG of its own, each process a share of them."""
    labels = recipe.labels()
    for k, pixels in enumerate(read_npz(folder / "images.npz", recipe.batch)):
        for i, image in enumerate(pixels, k * recipe.batch) if k % processes.size == processes.rank else ():
            path = folder / "png" / f"{i:06d}_{int(labels[i]):04d}.png"
            if not path.exists():
                save_pixels(path, torch.from_numpy(image.copy()))
    processes.meet()


def _claim(folder: Path, recipe: Recipe, drawn_by: Mapping[str, Any]) -> None:
    """Write the recipe, or see that the images there are of the same; and who draws what is missing of them."""
    path, drawers, npz = folder / "recipe.json", folder / "drawn_by.json", folder / "images.npz"
    for written in (path, npz, folder / "evaluation.json"):
        check_writable(written)
    for left in folder.glob(".images.npz.*"):
        left.unlink()  # by a run that was killed: 10 GB
    wanted, known = asdict(recipe), []
    if npz.exists() or any((folder / "parts").glob("[0-9]*.npy")):
        if not path.exists():
            raise ValueError(f"{folder}: has images, but no {path.name} to tell of what; give another folder")
        stored, known = _read(path, dict), _read(drawers, list) if drawers.exists() else []
        names = sorted(name for name in {**wanted, **stored} if wanted.get(name) != stored.get(name))
        differences = ", ".join(f"{name} {stored.get(name)} there, {wanted.get(name)} asked for" for name in names)
        if differences:
            raise ValueError(f"{folder}: has images of another recipe: {differences}; give another folder")
    elif any((folder / "png").glob("*.png")):
        raise ValueError(
            f"{folder}: png/ has images of a run whose {npz.name} is gone; delete them, or give another folder"
        )
    else:  # a recipe without images is one that could not be drawn
        write_json(path, wanted)
    draws = not npz.exists() and drawn_by not in known
    write_json(drawers, [*known, drawn_by] if draws else known)


def _read(path: Path, kind: Callable[[Any], Content]) -> Content:
    try:
        return kind(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:06d}.npy"


def _read_parts(parts: Path, recipe: Recipe, starts: range) -> Iterator[NDArray[np.uint8]]:
    for start in starts:
        path = _part(parts, start)
        expected = (min(recipe.batch, recipe.images - start), *recipe.shape[1:])
        try:
            pixels: NDArray[Any] = np.load(path)
            if pixels.shape != expected or pixels.dtype != np.uint8:
                raise ValueError(f"{pixels.shape} {pixels.dtype} instead of {expected} uint8")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: damaged: {error}; delete it and run the same command again") from error
        yield pixels
