"""A model and its tokenizer with random weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mvar.checkpoint import schedule
from mvar.models.config import ModelConfig, unboxed
from mvar.models.init_weights import init_weights
from mvar.models.tokenizer import Tokenizer, TokenizerConfig
from mvar.models.transformer import Model, from_config


class _Seeded(TorchFunctionMode):
    """Let torch.nn.init use its own generator instead of the global one, which the program and its threads share."""

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
    """Build a matching model and tokenizer in evaluation mode, with random weights from `seed`.

    In float32 on the CPU, independent of torch's default dtype and device.

    Args:
        depth: number of blocks; the width is 64·depth.
        resolution: 256, 512 or 1024, with the published token maps.
        patch_nums: side lengths of the token maps, instead of `resolution`.
        tokenizer: its configuration; None for the published one.
        sizes: further fields of :class:`mvar.ModelConfig`, such as `bidirectional=True` or `architecture="var"`.

    Raises:
        ValueError: a size or the seed is out of range.
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
    # Weights made in inference mode could not be trained.
    with torch.inference_mode(False), torch.device("cpu"):
        with _Seeded(seed):
            vae, model = Tokenizer(tokenizer), from_config(config)
        init_weights(model, seed=seed)
    return model.eval(), vae.eval()
