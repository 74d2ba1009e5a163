"""`mvar sample`: images from any weights, into PNG files, a grid or an npz; alone, or in every process of torchrun."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mvar import digits
from mvar.checkpoint import load_model, load_tokenizer
from mvar.drawing import Drawing
from mvar.files import beside, check_writable
from mvar.generate import Launched, launch
from mvar.model import Model
from mvar.pictures import grid, save_npz, save_pixels, save_png, to_bytes
from mvar.processes import Processes, joined, own_device
from mvar.tokenizer import Tokenizer
from mvar.transfer import to_host

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sample(options: argparse.Namespace) -> None:
    """Generate `count` images of each class, in order; image i of the run is image i of the seed.

    Every process of torchrun draws whole batches, the same ones as a single process would draw: so the images do not
    depend on how many there are.
    """
    if not (options.out or options.grid or options.npz):
        raise ValueError("nowhere to write to: give --out, --grid or --npz")
    for name in ("count", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    for path in (options.grid, options.npz, options.out and options.out / "000000.png"):
        if path is not None:
            check_writable(path)
    model, tokenizer = load(options.weights, options.tokenizer, own_device(options.device))
    labels = torch.tensor(options.classes).repeat_interleave(options.count)
    shared = drawing(options)
    how = Drawing(
        more_smooth=options.smooth,
        return_scales=False,
        **{name: shared.pop(name) for name in ("cfg", "top_k", "top_p", "backend")},
    )

    def begin(start: int) -> Launched:
        return launch(
            model,
            tokenizer,
            labels[start : start + options.batch],
            how,
            first_index=start,
            compile_decoder=options.compile_decoder,
            **shared,
        )

    shape = (len(labels), tokenizer.resolution, tokenizer.resolution, 3)
    with joined() as processes, _gathered(options.npz or options.grid, shape, processes) as gathered:
        mine = range(0, len(labels), options.batch)[processes.rank :: processes.size]
        quiet = None if processes.leads else True  # None: where there is no terminal
        with gathered() as pixels:
            for start, drawn in drawn_batches(begin, tqdm(mine, desc="images", unit="batch", disable=quiet)):
                if options.out is not None:
                    for i, image in enumerate(drawn, start):
                        save_pixels(options.out / f"{i:06d}_{int(labels[i]):04d}.png", image)
                if pixels is not None:
                    pixels[start : start + len(drawn)] = drawn.numpy()
        processes.meet()
        if not processes.leads:
            return
        with gathered() as pixels:
            if options.npz is not None:
                save_npz(options.npz, shape, [pixels], labels)
            if options.grid is not None:
                images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2) / 255
                save_png(options.grid, grid(images, options.count))
    written = ", ".join(str(path) for path in (options.out, options.grid, options.npz) if path)
    print(f"{len(labels)} images in {written}")


def drawn_batches(begin: Callable[[int], Launched], starts: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """Batches as (first image, (B, H, W, 3) uint8 on the host); the device draws one while the host has the one before.

    Raises FloatingPointError where a batch is not finite.
    """
    before: Callable[[], tuple[int, Tensor]] | None = None
    for start in starts:
        launched = begin(start)
        arriving = to_host(to_bytes(launched.generated.images), launched.finite)
        if before is not None:
            yield before()
        before = partial(_arrived, start, launched, arriving)
    if before is not None:
        yield before()


def _arrived(start: int, launched: Launched, arriving: Callable[[], tuple[Tensor, ...]]) -> tuple[int, Tensor]:
    pixels, finite = arriving()
    replace(launched, finite=finite).checked()
    return start, pixels


@contextmanager
def _gathered(target: Path | None, shape: tuple[int, ...], processes: Processes) -> Iterator[Callable[[], Any]]:
    """What opens the one uint8 array of this shape that all processes write to, a file beside `target`, in a context;
    the file is gone at the end. Without a target None is what it opens."""
    if target is None:
        yield partial(_opened, None)
        return
    with beside(target) if processes.leads else nullcontext(target) as path:
        if processes.leads:
            np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        yield partial(_opened, processes.agreed(path))


@contextmanager
def _opened(path: Path | None) -> Iterator[Any]:
    pixels = None if path is None else np.lib.format.open_memmap(path, "r+")
    yield pixels
    if pixels is not None:
        pixels.flush()


def drawing(options: argparse.Namespace) -> dict[str, Any]:
    """The options that `generate` shares with the command line."""
    names = ("cfg", "top_k", "top_p", "seed", "backend", "graph")
    return {name: getattr(options, name) for name in names} | {"dtype": DTYPES[options.dtype]}


def load(weights: str | None, tokenizer: str | None, device: torch.device) -> tuple[Model, Tokenizer]:
    """The model and the tokenizer that the command line names."""
    if (weights is None) != (tokenizer is None):
        raise ValueError("--weights and --tokenizer: give both, or neither for the digits inside the package")
    if weights is None or tokenizer is None:
        model, images = digits.pretrained()
        return model.to(device), images.to(device)
    model = load_model(weights, device=device)
    return model, load_tokenizer(tokenizer, patch_nums=model.config.patch_nums, device=device)


if __name__ == "__main__":
    from mvar.cli import main

    main(["sample", *sys.argv[1:]])
