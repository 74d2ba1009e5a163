"""A short training run on digits."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mvar
from mvar.data import Source, tensor_source
from mvar.models.transformer import from_config
from mvar.train.distributed import TrainContext
from mvar.train.flags import PRESETS, Flags
from mvar.train.run import Data, digits_data, new_model
from mvar.train.trainer import Trainer
from mvar_kernels.precision import float32_matmuls

TOKENIZER = Path(mvar.__file__).parent / "assets" / "digits_tokenizer.safetensors"
SMALL = {
    "preset": "digits",
    "tokenizer": str(TOKENIZER),
    "depth": 1,
    "width": 64,
    "bs": 64,
    "ep": 1,
    "log_every": 1,
    "save_every": 8,
    "tb": False,
    "samples": 0,
    "device": "cpu",
}
"""22 iterations of 64 digits."""


def flags(out: Path, **changed: Any) -> Flags:
    return Flags(**{**PRESETS["digits"], **SMALL, "out": str(out), **changed})


def arguments(out: Path, **changed: Any) -> list[str]:
    """The flags as command-line arguments."""
    return [f"--{name}={value}" for name, value in {**SMALL, "out": str(out), **changed}.items()]


@cache
def data() -> Data:
    return digits_data(flags(Path()), TrainContext(0, 1, torch.device("cpu")))


class _Trainer(Trainer):
    """Uses the same matmul precision as the command, so that results are bit-identical."""

    def run(self) -> None:
        with float32_matmuls(self.context.device, fast=self.flags.tf32):
            super().run()


def trainer(
    run: Flags,
    context: TrainContext | None = None,
    *,
    drops: bool = True,
    dtype: torch.dtype = torch.float32,
    items: int | None = None,
    source: Source | None = None,
) -> Trainer:
    """items: use only this number of digits. source: use this instead of the digits."""
    model, (tokenizer, train, val) = new_model(run, data(), 0), data()
    train = source or train
    if not drops:
        state = model.state_dict()
        model = from_config(replace(model.config, label_drop=0.0, drop_path=0.0))
        model.load_state_dict(state)
    if items is not None:
        first = next(train.batches(batch=items, seed=0, epoch=0))
        assert first.tokens is not None
        train = val = tensor_source(first.tokens, first.labels, train.num_classes)
    context = context or TrainContext(0, 1, torch.device("cpu"))
    return _Trainer(run, model.to(dtype), tokenizer, train, context, seed=0, validation=val)


def rows(out: Path) -> list[dict[str, Any]]:
    """The log's rows of training steps."""
    found = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [row for row in found if "loss" in row]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]
