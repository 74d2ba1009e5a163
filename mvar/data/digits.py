"""scikit-learn's 1,797 handwritten digits (8×8, from the UCI repository)."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.models.tokenizer import TokenizerConfig

TOKENIZER = TokenizerConfig(
    patch_nums=(1, 2, 3, 4), num_codes=256, ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1, attention=False
)
"""Configuration of their tokenizer."""
UPSCALED = 32
HELD_OUT = 450
NUM_CLASSES = 10


class Digits(NamedTuple):
    """images: (n, 3, 32, 32) float32 in [−1, 1], three equal channels; labels: (n,) int64."""

    images: Tensor
    labels: Tensor


@cache
def load() -> tuple[Digits, Digits]:
    """Load the training and held-out digits (1,347 and 450), a fixed stratified split.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'mvar[demo]'") from error
    data = load_digits()
    pixels = torch.from_numpy(data.images).float() / 8 - 1  # 0 … 16 → [−1, 1]
    labels = torch.from_numpy(data.target).long()
    train, held_out = train_test_split(range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=labels)
    images = F.interpolate(pixels[:, None], size=(UPSCALED, UPSCALED), mode="bilinear").expand(-1, 3, -1, -1)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])
