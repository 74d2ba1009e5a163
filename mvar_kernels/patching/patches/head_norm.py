"""The adaLN before the head."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mvar_kernels.ops.adaln.op import adaln
from mvar_kernels.patching.patches.base import (
    NORM_EXPECTED,
    Patch,
    Randn,
    lacks_gradient,
    modulation_unsupported,
    norm_options,
    norm_width,
    normed_dtype,
)

_BRANCHES = ("attn", "sa", "ca", "ffn", "mlp", "mamba")


class HeadNorm(Patch):
    """LayerNorm or RMSNorm and modulation, one condition for each sample."""

    ops = "adaln"
    attributes = ("ada_lin", "ln_wo_grad")
    required = ("x_BLC", "cond_BD")
    bypassed = ("ln_wo_grad",)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return super().matches(module) and not any(name in module._modules for name in _BRANCHES)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        C = norm_width(module.ln_wo_grad)
        if C is None:
            return NORM_EXPECTED
        return modulation_unsupported(module, 2, C)

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        yield module(randn(2, 5, norm_width(module.ln_wo_grad)), randn(2, module.ada_lin[-1].in_features))

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        yield module(randn(1, length, norm_width(module.ln_wo_grad)), randn(1, module.ada_lin[-1].in_features))

    def forward(self: Any, *args: Any, **options: Any) -> Tensor:
        values = self.supported_arguments(args, options)
        usual = values is not None and _is_one_per_sample(values["cond_BD"], values["x_BLC"])
        if values is None or not usual or not values["x_BLC"].numel() or lacks_gradient(self.ln_wo_grad):
            out: Tensor = super().forward(*args, **options)  # type: ignore[misc]
            return out
        x, cond = values["x_BLC"], values["cond_BD"]
        scale, shift = self.ada_lin(cond).flatten(0, -2).chunk(2, -1)
        x = x.to(torch.promote_types(scale.dtype, normed_dtype(self.ln_wo_grad, x.dtype)))
        scale, shift = (t.to(x.dtype).expand(len(x), -1) for t in (scale, shift))
        return adaln(x, scale, shift, **norm_options(self.ln_wo_grad, x.dtype))


def _is_one_per_sample(cond: Tensor, x: Tensor) -> bool:
    """Whether the condition is (B, D) or (B, 1, D), or that of a batch of 1, for x (B, L, C): what becomes of others is
    the original's affair."""
    one = cond.dim() == 2 or (cond.dim() == 3 and cond.shape[1] == 1)
    return one and x.dim() == 3 and len(cond) in (1, len(x))
