"""A model and its tokenizer with random weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mvar.checkpoint import schedule
from mvar.config import ModelConfig, unboxed
from mvar.initialise import initialise
from mvar.model import Model, from_config
from mvar.tokenizer import Tokenizer, TokenizerConfig


class _Seeded(TorchFunctionMode):
    """torch.nn.init draws from a generator of its own: the global one is the program's, and that of all threads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", None) == nn.init.__name__ and "generator" in kwargs:
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def build(
    depth: int = 16,
    resolution: int = 256,
    num_classes: int = 1000,
    seed: int = 0,
    *,
    patch_nums: Sequence[int] | None = None,
    tokenizer: TokenizerConfig | None = None,
    **sizes: Any,
) -> tuple[Model, Tokenizer]:
    """A model and a tokenizer that fit together, in evaluation mode, initialised from `seed`.

    In float32 and on the CPU, whatever torch's default dtype and device.

    Args:
        depth: blocks; the width is 64·depth.
        resolution: 256, 512 or 1024, for the published token maps; `patch_nums` gives others.
        tokenizer: its sizes; None for the published one's.
        sizes: further fields of :class:`mvar.ModelConfig`, such as `bidirectional=True` or `architecture="var"`.

    Raises:
        ValueError: a size or a seed out of range.
    """
    maps = schedule(resolution, patch_nums if tokenizer is None else tokenizer.patch_nums)
    tokenizer = tokenizer or TokenizerConfig(maps)
    config = ModelConfig(
        depth=depth,
        patch_nums=maps,
        num_classes=num_classes,
        num_codes=tokenizer.num_codes,
        code_dim=tokenizer.code_dim,
        **sizes,
    )
    seed = unboxed(seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a whole number of 64 bits, got {seed!r}")
    # Weights that can be trained, too.
    with torch.inference_mode(False), torch.device("cpu"):
        with _Seeded(seed):
            images, model = Tokenizer(tokenizer), from_config(config)
        initialise(model, seed=seed)
    return model.eval(), images.eval()
