"""What every kernel of sample_tokens and soft_embedding takes, checked by the public functions."""

from typing import NamedTuple

from torch import Tensor


class Sampling(NamedTuple):
    """A token is sampled at every position of one scale, as in :func:`mvar_kernels.sample_tokens`."""

    cond: Tensor
    uncond: Tensor | None
    image_index: Tensor
    guidance: float
    top_k: int
    top_p: float
    seed: Tensor
    scale_index: int
    temperature: float = 1.0


class SoftSampling(NamedTuple):
    """Codebook vectors are averaged instead: codebook (V, width), else as in :func:`mvar_kernels.soft_embedding`."""

    codebook: Tensor
    cond: Tensor
    uncond: Tensor | None
    image_index: Tensor
    guidance: float
    top_k: int
    top_p: float
    seed: Tensor
    scale_index: int
    sharpness: float
    temperature: float

    @property
    def sampling(self) -> Sampling:
        return Sampling(*self[1:9])
