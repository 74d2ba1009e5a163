"""Build the model, the tokenizer and the arguments of generation from parsed options."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mvar import digits, emoji
from mvar.checkpoint import load_model, load_tokenizer
from mvar.inference.api import launch
from mvar.inference.dtypes import fastest_dtype
from mvar.inference.results import PendingResult
from mvar.inference.sampling import SamplingParams
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model
from mvar.utils.distributed import DistContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # "auto": none
PACKAGED: Mapping[str, Callable[[], tuple[Model, Tokenizer]]] = {"digits": digits.pretrained, "emoji": emoji.pretrained}


def load(weights: str | None, tokenizer: str | None, device: torch.device) -> tuple[Model, Tokenizer]:
    """Load the model of --weights and the tokenizer of --tokenizer to the device."""
    if tokenizer is None and weights in (None, *PACKAGED):
        model, images = PACKAGED[weights or "digits"]()
        return model.to(device), images.to(device)
    if weights is None or tokenizer is None:
        raise ValueError(
            "--weights and --tokenizer: give both, or neither for the digits model in the package, or --weights emoji"
        )
    model = load_model(weights, device=device)
    return model, load_tokenizer(tokenizer, patch_nums=model.config.patch_nums, device=device)


def common_dtype(
    options: argparse.Namespace, device: torch.device, context: DistContext, resumed: str | None = None
) -> torch.dtype:
    """The dtype of --dtype, the same in all processes: for "auto" the main process decides. Every process calls it.

    Args:
        resumed: the dtype in which the run began, such as "float32", which "auto" keeps; None if it begins now.
    """
    if options.dtype in DTYPES:
        return DTYPES[options.dtype]
    dtype = next((dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{resumed}"), None)
    if dtype is None and context.is_main_process:
        dtype = fastest_dtype(device)
    dtype = context.broadcast(dtype)
    assert dtype is not None
    return dtype


def generate_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of :func:`mvar.generate`."""
    names = ("cfg", "top_k", "top_p", "seed", "backend", "graph")
    return {name: getattr(options, name) for name in names} | {"dtype": DTYPES.get(options.dtype)}


def sampling_params(options: argparse.Namespace, *, more_smooth: bool = False) -> SamplingParams:
    return SamplingParams(
        options.cfg, options.top_k, options.top_p, more_smooth, return_scales=False, backend=options.backend
    )


def batch_launcher(
    options: argparse.Namespace,
    model: Model,
    tokenizer: Tokenizer,
    labels: Tensor,
    params: SamplingParams,
    dtype: torch.dtype,
) -> Callable[[int], PendingResult]:
    """A function of `start` that launches the generation of images start … start + --batch − 1."""

    def launch_batch(start: int) -> PendingResult:
        return launch(
            model,
            tokenizer,
            labels[start : start + options.batch],
            params,
            seed=options.seed,
            first_index=start,
            dtype=dtype,
            graph=options.graph,
            compile_decoder=options.compile_decoder,
        )

    return launch_batch
