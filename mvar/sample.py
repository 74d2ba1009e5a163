"""`mvar sample`: images from any weights, into PNG files, a grid or an npz."""

import argparse
from typing import Any

import torch
from tqdm import tqdm

from mvar import digits
from mvar.checkpoint import load_model, load_tokenizer
from mvar.files import check_writable
from mvar.generate import generate
from mvar.model import Model
from mvar.pictures import grid, save_npz, save_png, to_bytes
from mvar.tokenizer import Tokenizer

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sample(options: argparse.Namespace) -> None:
    """Generate `count` images of each class, in order; image i of the run is image i of the seed."""
    if not (options.out or options.grid or options.npz):
        raise ValueError("nowhere to write to: give --out, --grid or --npz")
    for name in ("count", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if (options.weights is None) != (options.tokenizer is None):
        raise ValueError("--weights and --tokenizer: give both, or neither for the digits inside the package")
    for path in (options.grid, options.npz, options.out and options.out / "000000.png"):
        if path is not None:
            check_writable(path)
    model, tokenizer = _load(options.weights, options.tokenizer, device_of(options))
    labels = torch.tensor(options.classes).repeat_interleave(options.count)

    images = []
    for start in tqdm(range(0, len(labels), options.batch), desc="images", unit="batch", disable=None):
        rows = labels[start : start + options.batch]
        out = generate(model, tokenizer, rows, first_index=start, more_smooth=options.smooth, **drawing(options))
        if options.out is not None:
            for i, image in enumerate(out.images):
                save_png(options.out / f"{start + i:06d}_{int(rows[i]):04d}.png", image)
        if options.grid is not None or options.npz is not None:
            images.append(to_bytes(out.images))
    if images:
        pixels = torch.cat(images)
        if options.npz is not None:
            save_npz(options.npz, pixels, labels)
        if options.grid is not None:
            save_png(options.grid, grid(pixels.permute(0, 3, 1, 2) / 255, options.count))
    written = ", ".join(str(path) for path in (options.out, options.grid, options.npz) if path)
    print(f"{len(labels)} images in {written}")


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for, or cuda where there is one."""
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {options.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def drawing(options: argparse.Namespace) -> dict[str, Any]:
    """The options that `generate` shares with the command line."""
    names = ("cfg", "top_k", "top_p", "seed", "backend")
    return {name: getattr(options, name) for name in names} | {"dtype": DTYPES[options.dtype]}


def _load(weights: str | None, tokenizer: str | None, device: torch.device) -> tuple[Model, Tokenizer]:
    if weights is None or tokenizer is None:
        model, images = digits.pretrained()
        return model.to(device), images.to(device)
    model = load_model(weights, device=device)
    return model, load_tokenizer(tokenizer, patch_nums=model.config.patch_nums, device=device)
