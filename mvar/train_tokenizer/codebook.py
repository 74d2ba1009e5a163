"""Codebook health: how many codes each scale uses, and how evenly."""

import math
from typing import Any

import torch
from torch import Tensor

from mvar.train.distributed import TrainContext

COLLAPSED = 0.02
"""A scale has collapsed if its tokens are as diverse as those of a uniform distribution over less than this fraction of
the codes that they could use."""
MIN_TOKENS = 64  # fewer say little about a distribution


class CodebookHealth:
    """Counts the tokens of each scale and code since the last :meth:`report`.

    Args:
        sides: side lengths of the token maps.
    """

    def __init__(self, sides: tuple[int, ...], num_codes: int, context: TrainContext) -> None:
        self.sides, self.context = sides, context
        self.hits = torch.zeros(len(sides), num_codes, dtype=torch.int64, device=context.device)

    def add(self, hits: Tensor) -> None:
        """hits: (S, V) int64, the tokens of this process's batch."""
        self.hits += hits

    def report(self) -> tuple[dict[str, Any], dict[int, str]]:
        """Metrics over all processes, and the scales that have collapsed with a description; begins anew. Collective.

        code_usage: fraction of the codes that occur; code_usage_scale{k}: at this scale. entropy_scale{k}: entropy of
        the codes at this scale, in bits; log2(V) if all are equally frequent.
        """
        hits = self.context.all_reduce_sum(self.hits.clone()).cpu()
        self.hits.zero_()
        metrics: dict[str, Any] = {"code_usage": float((hits.sum(0) > 0).double().mean())}
        collapsed = {}
        for k, (side, row) in enumerate(zip(self.sides, hits, strict=True)):
            tokens, entropy = int(row.sum()), entropy_bits(row)
            metrics[f"code_usage_scale{k}"] = float((row > 0).double().mean())
            metrics[f"entropy_scale{k}"] = entropy
            usable = min(len(row), tokens)
            if usable > 1 and tokens >= MIN_TOKENS and 2**entropy <= max(COLLAPSED * usable, 1 + 1e-9):
                used = int((row > 0).sum())
                bits = f"{entropy:.1f} of {math.log2(len(row)):.1f} bits"
                collapsed[k] = f"{side}×{side} ({used} of {len(row)} codes, {bits})"
        return metrics, collapsed


def entropy_bits(hits: Tensor) -> float:
    """Entropy in bits of the distribution with these counts, (V,)."""
    shares = hits.double() / hits.sum().clamp(min=1)
    return max(0.0, -float(torch.xlogy(shares, shares).sum()) / math.log(2))
