"""The emoji model in the package: 40 classes of emoji at 64×64 pixels, see examples/emoji."""

from collections.abc import Mapping

from mvar.checkpoint import load_packaged
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model

__all__ = ["SAMPLING", "pretrained"]

SAMPLING: Mapping[str, float] = {"cfg": 3.0, "top_k": 0, "top_p": 0.95}
"""Sampling options of the demo."""


def pretrained() -> tuple[Model, Tokenizer]:
    """Load the model and the tokenizer of the package, trained by the commands in docs/your-own-images.md.

    `model.class_names` has the names of the classes.
    """
    return load_packaged("emoji", "emoji_tokenizer")
