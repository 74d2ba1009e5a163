"""What every kernel of sample_tokens and soft_embedding takes, checked by the public functions."""

from typing import NamedTuple

from torch import Tensor


class Draw(NamedTuple):
    """One draw at every position of one scale, as in :func:`mvar_kernels.sample_tokens`; the seed is in memory."""

    cond: Tensor
    uncond: Tensor | None
    image_index: Tensor
    guidance: float
    top_k: int
    top_p: float
    seed: Tensor
    scale_index: int
