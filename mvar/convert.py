"""`mvar convert`: weights from one format into another."""

import argparse

import torch
from torch import Tensor

from mvar.arguments import DTYPES
from mvar.checkpoint import converted, load_model, load_tokenizer, save
from mvar.files import check_writable, expanded, replacing
from mvar.model import Model
from mvar.tokenizer import Tokenizer
from mvar.train.checkpoint import read_model
from mvar.weights import weights


def convert(options: argparse.Namespace) -> None:
    """Read `source`, write `target`: .pth for a state dict as published, .safetensors for our own format."""
    if options.target.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{options.target}: expected a name that ends in .pth or .safetensors")
    check_writable(options.target)
    module: Model | Tokenizer
    if options.part == "tokenizer":
        module = load_tokenizer(options.source, patch_nums=options.pn)
    else:
        folder = expanded(options.source)
        module = read_model(folder) if folder.is_dir() else load_model(options.source)
    dtype = DTYPES[options.dtype]
    if options.target.suffix == ".safetensors":
        save(options.target, module, dtype=dtype)
    else:
        state = official_state_dict(module, dtype)
        with replacing(options.target) as aside, aside.open("wb") as file:  # of a path torch writes the name into it
            try:
                torch.save(state, file)
            except RuntimeError as error:  # raised on the way out of what kept it from writing
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    print(f"written: {options.target}")


def official_state_dict(module: Model | Tokenizer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All that the published code's load_state_dict(strict=True) asks for, with the mask that we do not keep.

    Raises ValueError for a model that the published code does not have, and as :func:`mvar.save`.
    """
    state = converted(weights(module), dtype)
    if isinstance(module, Model):
        if module.config.bidirectional:
            raise ValueError("a model with a bidirectional mixer has no published format; write .safetensors")
        level = module.lvl_1L
        seen = level.T >= level if module.architecture == "var" else level.T == level
        state["attn_bias_for_masking"] = torch.where(seen, 0.0, -torch.inf)[None, None].to(dtype)
    return state
