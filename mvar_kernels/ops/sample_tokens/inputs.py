"""What every kernel of sample_tokens and soft_embedding takes, checked by the public functions."""

from typing import NamedTuple

from torch import Tensor


class Sampling(NamedTuple):
    """A token is sampled at every position of one scale, as in :func:`mvar_kernels.sample_tokens`.

    per_image: (B, 4) float64, contiguous and on the device: guidance, top_k (1 to V), top_p and temperature of each
    image, in range. The four numbers are then not read.
    """

    cond: Tensor
    uncond: Tensor | None
    image_index: Tensor
    guidance: float
    top_k: int
    top_p: float
    seed: Tensor
    scale_index: int
    temperature: float = 1.0
    per_image: Tensor | None = None
    num_samples: int = 1


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
    per_image: Tensor | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(*self[1:9], per_image=self.per_image)
