"""Weights and arrays of the public implementation's test case in upstream_case/."""

import json

import numpy as np
import torch
from torch import Tensor

from tests.helpers.paths import ROOT
from tests.upstream_case.fill import fill

FOLDER = ROOT / "tests" / "upstream_case"
CASE = json.loads((FOLDER / "case.json").read_text())
ARRAYS = dict(np.load(FOLDER / "case.npz"))
PATCH_NUMS = tuple(CASE["patch_nums"])


def weights(kind: str) -> dict[str, Tensor]:
    """The state dict of "model" or "tokenizer", filled by the case's rule and including published buffers."""
    scales = torch.tensor([n * n for n in PATCH_NUMS])
    levels = torch.repeat_interleave(torch.arange(len(scales)), scales)
    constructed = {
        "patch_nums": scales.int(),
        "lvl_1L": levels[None],
        "attn_bias_for_masking": torch.where(levels[:, None] == levels, 0.0, -torch.inf)[None, None],
    }
    state = {}
    for name, (shape, dtype) in CASE[kind].items():
        made = constructed.get(name.rsplit(".")[-1], torch.zeros(shape, dtype=getattr(torch, dtype)))
        assert list(made.shape) == shape
        state[name] = fill(name, made)
    return state
