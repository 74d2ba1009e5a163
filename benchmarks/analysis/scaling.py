"""How the cost of an image grows with its tokens, counted: FLOPs, and the state carried between scales."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

import mvar
from benchmarks.analysis.flops import OURS, PUBLIC, ROWS, VAR, model_flops
from benchmarks.common.markdown import table

DEPTH = 16
DEPTHS = (16, 24, 30)  # of the page on the carried state


def config_of(algorithm: str, depth: int, resolution: int) -> mvar.ModelConfig:
    architecture = "var" if algorithm == VAR else "mvar"
    return mvar.ModelConfig(depth=depth, patch_nums=mvar.SCHEDULES[resolution], architecture=architecture)


def carried_bytes(algorithm: str, depth: int, resolution: int) -> int:
    """Of the states that the engine makes for one image with guidance, in bfloat16; of the public algorithm's caches
    at the end of the last scale: each Mamba layer's input at every token, float32 as autocast leaves it."""
    config = config_of(algorithm, depth, resolution)
    if algorithm == PUBLIC:
        return ROWS * depth * config.num_tokens * config.channels * torch.float32.itemsize
    with torch.device("meta"):
        states = mvar.from_config(config).to(torch.bfloat16).empty_states(ROWS)
    return sum(t.nbytes for state in states for t in state if isinstance(t, torch.Tensor))


def counted() -> Iterator[dict[str, Any]]:
    """A row for each resolution and algorithm, of d16."""
    for resolution, algorithm in product(mvar.SCHEDULES, (OURS, PUBLIC, VAR)):
        config = config_of(algorithm, DEPTH, resolution)
        yield {
            "side": algorithm,
            "resolution": resolution,
            "tokens": config.num_tokens,
            "flops": model_flops(algorithm, config),
            "state_bytes": carried_bytes(algorithm, DEPTH, resolution),
        }


INTRODUCTION = """# State carried between scales

Computed, not measured: megabytes for one image with guidance (two rows), in bfloat16. mvar carries the state of
Mamba-2 (the last three inputs of the convolution in bfloat16, the state of the scan in float32), of the same size at
every scale and resolution. The public M-VAR algorithm keeps the input of every Mamba layer at all tokens (float32 under
autocast) and runs the layer over them again. VAR keeps keys and values of all tokens; this engine allocates them at
full length, one buffer per layer. Written by `python -m benchmarks.report`.

"""


def page() -> str:
    """docs/generated/carried_state.md"""
    rows = []
    for depth, resolution in product(DEPTHS, mvar.SCHEDULES):
        tokens = config_of(OURS, depth, resolution).num_tokens
        megabytes = (f"{carried_bytes(each, depth, resolution) / 1e6:.1f}" for each in (OURS, PUBLIC, VAR))
        rows.append((f"d{depth}", f"{resolution}×{resolution}", tokens, *megabytes))
    columns = ("model", "resolution", "tokens", "mvar", "public algorithm, at the last scale", "VAR")
    return INTRODUCTION + table(columns, rows)
