"""Bytes and FLOPs of a generation with guidance, counted: linear layers by their weights, ops by their specs."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mvar.inference.tokenizer import InferenceTokenizer
from mvar.models.config import HEAD_DIM, ModelConfig
from mvar.models.tokenizer import Tokenizer, TokenizerConfig
from mvar_kernels.testing.registry import SPECS
from mvar_kernels.testing.spec import Case

OURS, PUBLIC, VAR = "mvar", "public algorithm", "VAR"
"""Algorithms. They differ in what they compute of the coarser scales: mvar nothing, from Mamba-2's carried state; the
public algorithm runs the Mamba layers over all of them again; VAR attends to their keys and values."""
ROWS = 2  # per image: with its class and without


class Work(NamedTuple):
    """The least that must be moved and computed."""

    moved_bytes: int = 0
    flops: int = 0

    def plus(self, other: tuple[int, int], times: int = 1) -> "Work":
        return Work(self.moved_bytes + times * other[0], self.flops + times * other[1])


def work(
    algorithm: str,
    config: ModelConfig,
    batch: int = 1,
    itemsize: int = 2,
    *,
    first: int = 0,
    last: int | None = None,
    guided: int | None = None,
) -> dict[str, Work]:
    """By part of the model, without decoder and quantizer. Not counted: embeddings, the head's modulation.

    Args:
        first, last: the model generates the scales from index `first` to before `last`, all by default. A refiner, with
            `first` above 0, processes the coarser ones together with the first.
        guided: number of scales with unconditional rows; None for all.
    """
    C, E, H, N, V = config.channels, config.inner_width, config.mixer_heads, config.state_dim, config.num_codes
    hidden, depth, scales = round(C * config.mlp_ratio), config.depth, config.scales
    branches = 2 if algorithm == VAR else 3
    parts = {name: Work() for name in ("linear layers", "attention", "mixer", "adaLN", "drawing")}

    def linear(rows: int, inputs: int, outputs: int, times: int = depth) -> None:
        moved = itemsize * (rows * inputs + outputs * (inputs + rows))
        parts["linear layers"] = parts["linear layers"].plus((moved, 2 * rows * inputs * outputs), times)

    def op(part: str, name: str, sizes: dict[str, int], times: int, **options: Any) -> None:
        parts[part] = parts[part].plus(SPECS[name].work(Case("", sizes, options), itemsize), times)

    for k in range(first, len(scales) if last is None else last):
        rows = batch * (ROWS if guided is None or k < guided else 1)
        start = 0 if k == first else k
        here = scales[start : k + 1]
        new, seen = sum(here), sum(scales[: k + 1])
        for inputs, outputs in ((C, 3 * C), (C, C), (C, hidden), (hidden, C)):
            linear(rows * new, inputs, outputs)
        causal = {"scales": scales[: k + 1], "pattern": "causal", "query_scales": len(here)}
        pattern = causal if algorithm == VAR else {"scales": here, "pattern": "diagonal"}
        op("attention", "scale_attention", {"B": rows, "H": config.heads, "D": HEAD_DIM}, depth, **pattern)
        if algorithm != VAR:
            tokens = new if algorithm == OURS else seen
            sizes = {"B": rows, "L": tokens, "C": C, "H": H, "P": config.mixer_head_dim, "N": N}
            op("mixer", "mamba2_mixer", sizes, depth, scales=None)
            linear(rows * tokens, C, 2 * E + 2 * N + H)
            linear(rows * tokens, E, C)
        if algorithm == PUBLIC or k == first:  # the modulation, which does not depend on the scale
            linear(rows, C, 3 * branches * C)
        op("adaLN", "adaln", {"B": rows, "L": new, "C": C}, 1)
        op("adaLN", "gated_adaln", {"B": rows, "L": new, "C": C}, branches * depth)
        sampled = scales[k]
        linear((rows if algorithm == PUBLIC else batch) * sampled, C, V, 1)  # guidance after the head, or before it
        op("drawing", "sample_tokens", {"B": batch, "l": sampled, "V": V}, 1, guided=False)
    return parts


def model_flops(algorithm: str, config: ModelConfig, **scales: int | None) -> int:
    """Per image: the matmuls and scans of blocks and head. scales: `first`, `last`, `guided` of :func:`work`."""
    parts = work(algorithm, config, **scales)  # type: ignore[arg-type]
    return sum(parts[name].flops for name in ("linear layers", "attention", "mixer"))


@cache
def decoder_flops(config: TokenizerConfig, batch: int, prepared: bool = True) -> float:
    """Of the decoder's convolutions and matmuls, as the engine prepares it or as it is published."""
    with FlopCounterMode(display=False) as counter:
        _decode(_decoder(config, prepared), batch)
    return float(counter.get_total_flops())


def decoder_norm_bytes(config: TokenizerConfig, batch: int, itemsize: int) -> int:
    """The least that the decoder's GroupNorms move: input and output, once."""
    moved: list[int] = []
    decoder = _decoder(config)
    for norm in (layer for layer in decoder.modules() if isinstance(layer, nn.GroupNorm)):
        norm.register_forward_pre_hook(lambda _, inputs: moved.append(2 * itemsize * inputs[0].numel()))
    _decode(decoder, batch)
    return sum(moved)


def _decoder(config: TokenizerConfig, prepared: bool = True) -> Tokenizer:
    with torch.device("meta"):
        decoder = Tokenizer(config).eval()
    return InferenceTokenizer(config, decoder.state_dict().items(), torch.float32) if prepared else decoder


def _decode(decoder: Tokenizer, batch: int) -> None:
    config = decoder.config
    decoder.decode_features(torch.empty(batch, config.code_dim, *2 * config.patch_nums[-1:], device="meta"))
