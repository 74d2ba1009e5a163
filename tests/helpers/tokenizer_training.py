"""Short training runs of a tokenizer on scikit-learn's digits, at 16×16 pixels."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mvar import digits
from mvar.data import Source, tensor_source
from mvar.train.distributed import TrainContext
from mvar.train_tokenizer.flags import TokenizerFlags
from mvar.train_tokenizer.run import new_tokenizer, tokenizer_config
from mvar.train_tokenizer.trainer import TokenizerTrainer
from mvar_kernels.precision import float32_matmuls

SMALL: dict[str, Any] = {
    "pn": (1, 2, 4),
    "ch_mult": (1, 1, 1),
    "ch": 32,
    "blocks": 1,
    "attention": False,
    "codes": 64,
    "code_dim": 8,
    "phi": 3,
    "bs": 16,
    "ep": 3,
    "tblr": 6e-2,
    "disc": 0.0,
    "disc_channels": 16,
    "disc_layers": 2,
    "revive": 4,
    "average": 0.9,
    "log_every": 1,
    "save_every": 4,
    "tb": False,
    "samples": 0,
    "seed": 0,
    "device": "cpu",
}
"""12 iterations of 16 of 64 digits."""
ITEMS = 64


def flags(out: Path, **changed: Any) -> TokenizerFlags:
    return TokenizerFlags(**{**SMALL, "out": str(out), **changed})


def arguments(**changed: Any) -> list[str]:
    """The flags as command-line arguments."""
    values = {**SMALL, **changed}
    texts = {name: "_".join(map(str, v)) if isinstance(v, tuple) else v for name, v in values.items()}
    return [f"--{name}={value}" for name, value in texts.items()]


@cache
def sources() -> tuple[Source, Source]:
    train, held_out = (tensor_source(images(part), part.labels[:ITEMS], 10) for part in digits.load())
    return train, held_out


def images(part: digits.Digits) -> torch.Tensor:
    """(64, 3, 16, 16)"""
    return F.avg_pool2d(part.images[:ITEMS], 2)


class _Trainer(TokenizerTrainer):
    """Uses the same matmul precision as the command, so that results are bit-identical."""

    def run(self) -> None:
        with float32_matmuls(self.context.device, fast=self.flags.tf32):
            super().run()


def trainer(
    run: TokenizerFlags, context: TrainContext | None = None, lpips: nn.Module | None = None
) -> TokenizerTrainer:
    train, val = sources()
    context = context or TrainContext(0, 1, torch.device("cpu"))
    tokenizer = new_tokenizer(tokenizer_config(run), 0)
    return _Trainer(run, tokenizer, train, context, seed=0, validation=val, lpips=lpips)


def rows(out: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The log's rows with this metric: of training with "loss", of validation with "val_psnr"."""
    found = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [row for row in found if key in row]
