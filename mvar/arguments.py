"""What several commands take from the command line: the weights, the dtype and how to draw."""

import argparse
from typing import Any

import torch

from mvar import digits
from mvar.checkpoint import load_model, load_tokenizer
from mvar.model import Model
from mvar.tokenizer import Tokenizer

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


MAX_IMAGES = 10**8  # of a run: at 256×256 20 TB


def check_images(options: argparse.Namespace, classes: int) -> None:
    """Raise ValueError unless `count` images of so many classes can be drawn, `batch` at a time."""
    for name in ("count", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if classes * options.count > MAX_IMAGES:
        raise ValueError(f"--count: expected at most {MAX_IMAGES} images of all classes, got {classes * options.count}")


def sampling_params(options: argparse.Namespace) -> dict[str, Any]:
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
