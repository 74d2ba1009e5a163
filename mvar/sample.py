"""`mvar sample`: images from any weights, into PNG files, a grid or an npz; alone, or in every process of torchrun."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mvar.arguments import check_images, load, sampling_params
from mvar.batches import drawn_batches
from mvar.classes import numbers, parsed
from mvar.files import beside, check_writable, is_standard_output
from mvar.generate import PendingResult, launch
from mvar.pictures import check_picture, grid, grid_size, save_npz, save_picture, save_pixels
from mvar.processes import Processes, joined, own_device
from mvar.sampling import SamplingParams

IMAGE = re.compile(r"\d{6,}_\d{4,}\.png")  # as this command names them, whichever images and classes


def sample(options: argparse.Namespace) -> None:
    """Generate `count` images of each class, in order; image i of the run is image i of the seed.

    Every process of torchrun draws whole batches, the same ones as a single process would draw: so the images do not
    depend on how many there are.
    """
    if not (options.out or options.grid or options.npz):
        raise ValueError("nowhere to write to: give --out, --grid or --npz")
    wanted = parsed(options.classes)
    check_images(options, sum(map(len, wanted)))
    outputs = [path for path in (options.out, options.grid, options.npz) if path is not None]
    if options.grid is not None:
        check_picture(options.grid)
    for path in outputs:
        check_writable(path / "000000.png" if path is options.out else path)
    model, tokenizer = load(options.weights, options.tokenizer, own_device(options.device))
    classes = torch.tensor(numbers(wanted, model), dtype=torch.int64, device="cpu")
    labels = classes.repeat_interleave(options.count)
    side = tokenizer.resolution
    if options.grid is not None:
        check_picture(options.grid, *grid_size(len(labels), options.count, side, side))
    shared = sampling_params(options)
    how = SamplingParams(
        more_smooth=options.smooth,
        return_scales=False,
        **{name: shared.pop(name) for name in ("cfg", "top_k", "top_p", "backend")},
    )

    def begin(start: int) -> PendingResult:
        return launch(
            model,
            tokenizer,
            labels[start : start + options.batch],
            how,
            first_index=start,
            compile_decoder=options.compile_decoder,
            **shared,
        )

    shape = (len(labels), side, side, 3)
    with joined() as processes, _gathered(options.npz or options.grid, shape, processes) as gathered:
        if processes.leads and options.out is not None:
            _claim(options.out, overwrite=options.overwrite)
        processes.meet()
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
                images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
                save_picture(options.grid, grid(images, options.count))
    said_to = sys.stderr if any(map(is_standard_output, outputs)) else sys.stdout
    print(f"{len(labels)} images in {', '.join(map(str, outputs))}", file=said_to)


def _claim(folder: Path, *, overwrite: bool) -> None:
    """See that no image of an earlier run, which may have had more of them, is left among those to come."""
    earlier = sorted(path for path in folder.glob("*.png") if IMAGE.fullmatch(path.name))
    if earlier and not overwrite:
        raise ValueError(
            f"--out: {folder} holds {len(earlier)} images of an earlier run, such as {earlier[0].name}; give another "
            "folder, or --overwrite, which removes them"
        )
    for path in earlier:
        path.unlink()


@contextmanager
def _gathered(target: Path | None, shape: tuple[int, ...], processes: Processes) -> Iterator[Callable[[], Any]]:
    """What opens the one uint8 array of this shape that all processes write to, a file beside `target`, in a context;
    the file is gone at the end. Without a target None is what it opens."""
    if target is None:
        yield partial(_opened, None)
        return
    processes.meet()  # before there is a file: where they agree on its name none waits for another, deaf to signals
    with beside(target) if processes.leads else nullcontext(target) as path:
        if processes.leads:
            try:
                np.lib.format.open_memmap(path, "w+", np.uint8, shape)
                with path.open("r+b") as file:  # else a full disk would crash who writes to the memory
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                raise OSError(f"cannot write {target}: {error.strerror}") from error
        yield partial(_opened, processes.agreed(path))


@contextmanager
def _opened(path: Path | None) -> Iterator[Any]:
    pixels = None if path is None else np.lib.format.open_memmap(path, "r+")
    yield pixels
    if pixels is not None:
        pixels.flush()
