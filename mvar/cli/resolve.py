"""Build the model, the tokenizer and the arguments of generation from parsed options."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mvar_kernels as mk
from mvar.checkpoint import ASSETS
from mvar.cli.options import REFINERS
from mvar.inference.api import check_cfg, check_codes, check_same_classes, launch
from mvar.inference.dtypes import fastest_dtype
from mvar.inference.model import InferenceModel
from mvar.inference.results import PendingResult
from mvar.inference.sampling import SamplingParams
from mvar.inference.tokenizer import InferenceTokenizer
from mvar.models.config import checked_int
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model, from_config
from mvar.stored import StoredModel, StoredTokenizer
from mvar.utils.distributed import DistContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # "auto": none
PACKAGED: Mapping[str, str] = {"digits": "digits_tokenizer", "emoji": "emoji_tokenizer"}
"""Models in the package by --weights, and their tokenizers."""


class Loaded(NamedTuple):
    """Models and tokenizer for inference."""

    model: InferenceModel
    tokenizer: InferenceTokenizer
    refiner: InferenceModel | None


class Files:
    """The files of --weights, --tokenizer and --refiner, which are read when their dtype and labels are known."""

    def __init__(self, options: argparse.Namespace) -> None:
        weights, tokenizer = options.weights, options.tokenizer
        if tokenizer is None and weights in (None, *PACKAGED):
            name = weights or "digits"
            weights, tokenizer = _asset(name), _asset(PACKAGED[name])
        elif weights is None or tokenizer is None:
            raise ValueError(
                "--weights and --tokenizer: give both, or neither for the digits model in the package, or --weights "
                "emoji"
            )
        refiner = getattr(options, "refiner", None)
        if (refiner is None) != (getattr(options, "refine_from", None) is None):
            raise ValueError("--refiner and --refine-from: give both or neither")
        self.model: StoredModel[Model] = StoredModel(weights, from_config)
        self.tokenizer: StoredTokenizer[Tokenizer] = StoredTokenizer(
            tokenizer, Tokenizer, patch_nums=self.model.config.patch_nums
        )
        self.refiner: StoredModel[Model] | None = None
        if refiner is not None:
            packaged = refiner in (*REFINERS, *PACKAGED)
            self.refiner = StoredModel(_asset(refiner) if packaged else refiner, from_config)
            check_same_classes(self.refiner, self.model)
            check_codes(self.refiner.config, self.tokenizer.config, "refiner")
        check_codes(self.model.config, self.tokenizer.config)
        for name in ("refine_from", "guidance_until"):
            if (value := getattr(options, name, None)) is not None:
                checked_int(f"--{name.replace('_', '-')}", value, 0, len(self.model.config.scales))

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        labels: Sequence[int] | Tensor | None = None,
        encoder: bool = False,
    ) -> Loaded:
        """Load for inference.

        Args:
            labels: the only classes of the run, see :class:`InferenceModel`.
            encoder: load the tokenizer's encoder.
        """
        refiner = None if self.refiner is None else self.refiner.inference_model(device, dtype, labels)
        return Loaded(
            self.model.inference_model(device, dtype, labels),
            self.tokenizer.inference_tokenizer(device, dtype, encoder=encoder),
            refiner,
        )


def _asset(name: str) -> Path:
    return ASSETS / f"{name}.safetensors"


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
    """The validated parameters: an invalid one must not be found after earlier images were removed."""
    check_cfg(options.cfg)
    logits = torch.zeros(1, 1, 1, dtype=torch.float32, device="cpu")
    mk.sample_tokens(logits, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    return SamplingParams(
        options.cfg,
        options.top_k,
        options.top_p,
        more_smooth,
        return_scales=False,
        backend=options.backend,
        guidance_until=options.guidance_until,
    )


def batch_launcher(
    options: argparse.Namespace, loaded: Loaded, labels: Tensor, params: SamplingParams
) -> Callable[[int], PendingResult]:
    """A function of `start` that launches the generation of images start … start + --batch − 1."""

    def launch_batch(start: int) -> PendingResult:
        return launch(
            loaded.model,
            loaded.tokenizer,
            labels[start : start + options.batch],
            params,
            refiner=loaded.refiner,
            refine_from=options.refine_from,
            seed=options.seed,
            first_index=start,
            dtype=loaded.model.dtype,
            graph=options.graph,
            compile_decoder=options.compile_decoder,
        )

    return launch_batch
