"""Small models and comparisons for the tests of accelerate."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mvar_kernels.patching.patches.base import Patch
from tests.helpers.plain_var import PlainVAR, randomised

LABELS = torch.tensor([3, 7])
TOLERANCE = 1e-4  # as in test_accelerate.py, for one block of narrower layers


def plain(heads: int = 1, patch_nums: tuple[int, ...] = (1, 2), depth: int = 1, **sizes: Any) -> PlainVAR:
    torch.manual_seed(0)
    return randomised(PlainVAR(depth, patch_nums, heads=heads, **sizes))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    return got.dtype == expected.dtype and bool((got - expected).abs().max() <= tolerance * expected.abs().max())


def accelerated(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Patch)]


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "always": lambda m, f: m.register_forward_hook(f, always_call=True),
    "kwargs": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "pre": lambda m, f: m.register_forward_pre_hook(f),
    "pre kwargs": lambda m, f: m.register_forward_pre_hook(f, with_kwargs=True),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
}
