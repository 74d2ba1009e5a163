"""Checks of the flags before data is read, a model is built or files are written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mvar.data.digits import TOKENIZER as DIGITS_TOKENIZER
from mvar.data.tokens import MANIFEST
from mvar.models.config import ModelConfig
from mvar.models.transformer import from_config
from mvar.stored import HUB
from mvar.train.distributed import TrainContext
from mvar.train.flags import ARCHITECTURE, Flags
from mvar.train.objective import Objective, autocast
from mvar.train.optimizer import bitsandbytes
from mvar.train.process import check_run
from mvar.train.run_flags import flag_error, require
from mvar.train.schedule import check_stages
from mvar_kernels.dispatch import BackendError, check_name

VAR_TOKENIZER = f"{HUB}FoundationVision/var/vae_ch160v4096z32.pth"
FLAG_OF = {field: name for name, field in ARCHITECTURE.items()} | {"patch_nums": "pn"}


def check(flags: Flags, context: TrainContext) -> None:
    """Check the flags, except for those of the model (:func:`check_model`).

    Raises:
        ValueError: a flag is invalid; the message names the flag, the expected and the given value.
        ImportError: a package is not installed.
    """
    check_run(flags, context)
    if flags.opt == "adamw8bit":
        require(not flags.fsdp, "opt", "adamw with --fsdp, which shards the moments", flags.opt)
        bitsandbytes()
    if flags.fsdp and not dist.is_initialized():
        raise ValueError("--fsdp: start the run with torchrun, even for a single process")
    _check_files(flags)


def check_model(flags: Flags, context: TrainContext, base: ModelConfig | None) -> None:
    """Check the flags of the model. `base`: as for :func:`model_config`. Raises ValueError as :func:`check`."""
    if flags.fsdp and flags.saln:
        raise ValueError("--fsdp: blocks with a shared modulation layer (--saln) cannot be sharded")
    maps = flags.pn
    if flags.preset == "digits" and flags.tokenizer is None:
        maps = DIGITS_TOKENIZER.patch_nums
        require(flags.pn in (None, maps), "pn", f"{maps}, the token maps of the digits tokenizer", flags.pn)
    try:
        config = model_config(flags, base, maps or (1, 2), num_classes=1, num_codes=1, code_dim=1)
    except ValueError as error:
        raise flag_error(error, FLAG_OF) from error
    if maps is not None:
        check_stages(flags, len(maps))
    if flags.backend != "auto":
        _check_backend(flags, config, context.device)


def model_config(flags: Flags, base: ModelConfig | None, patch_nums: tuple[int, ...], **sizes: Any) -> ModelConfig:
    """The model configuration from the flags and from the sizes of tokenizer and data.

    Args:
        base: the configuration of :class:`mvar.train.init_from.Origin` with --init_from, else None.
        sizes: num_classes, num_codes and code_dim.
    """
    if base is not None:
        return replace(base, patch_nums=patch_nums, **sizes)
    given = {field: getattr(flags, name) for name, field in ARCHITECTURE.items()} | sizes
    return ModelConfig(**given, patch_nums=patch_nums)


def _check_files(flags: Flags) -> None:
    """Check that there is exactly one data source, and that the files exist."""
    given = [name for name in ("data_path", "tokens") if getattr(flags, name) is not None]
    if flags.preset == "digits":
        if given:
            raise ValueError(f"--{given[0]}: --preset=digits has its own data; leave one of them out")
        if flags.init_from is not None and flags.tokenizer is None:
            raise ValueError(
                "--tokenizer: expected the tokenizer of the model of --init_from, as a new one has other codes"
            )
    elif len(given) != 1:
        raise ValueError("give one of --data_path, --tokens and --preset=digits")
    elif flags.tokenizer is None:
        raise ValueError("--tokenizer: expected a file")
    if flags.tokenizer is not None and not flags.tokenizer.startswith(HUB):
        file = Path(flags.tokenizer)
        got = f"{file}: no such file or folder; VAR's is {VAR_TOKENIZER}"
        require(file.exists(), "tokenizer", "the file or folder of a tokenizer", got)
    if flags.data_path is not None:
        folder = Path(flags.data_path) / "train"
        require(folder.is_dir(), "data_path", "a folder with train/class/image", f"{folder}: no such folder")
    if flags.tokens is not None:
        file = Path(flags.tokens) / "train" / MANIFEST
        require(file.is_file(), "tokens", "a folder of `mvar tokenize`", f"{file}: no such file")


def _check_backend(flags: Flags, config: ModelConfig, device: torch.device) -> None:
    """Check that the backend supports a training step, with one block on one image with two token maps."""
    try:
        check_name(flags.backend)
        model = from_config(replace(config, depth=1, patch_nums=(1, 2))).eval().to(device)
        tokens = torch.zeros(1, 5, dtype=torch.int64, device=device)
        inputs = torch.zeros(1, 4, config.code_dim, dtype=torch.float32, device=device)
        with autocast(flags.fp16, device):
            out = Objective(model, backend=flags.backend)(tokens[:, 0], inputs, tokens)
        out.loss.backward()
    except (ValueError, BackendError) as error:
        raise ValueError(f"--backend: {str(error).removeprefix('backend: ')}") from error
