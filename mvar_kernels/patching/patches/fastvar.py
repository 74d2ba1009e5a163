"""Attention of csguoh/FastVAR (arXiv 2503.23367), which prunes the tokens of large scales, on Infinity."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mvar_kernels.patching.patches.attention import LONGEST
from mvar_kernels.patching.patches.base import Randn, argument_names
from mvar_kernels.patching.patches.infinity import InfinityAttention, Rotary, rotary_options, rotary_rows
from mvar_kernels.patching.patches.rotary import kept_tokens


class FastVARAttention(InfinityAttention):
    """As Infinity's, of the tokens of a scale of `ori_len` that `rope_idx` keeps. The original does not read the mask:
    it runs where there is one."""

    optional = ("attn_fn", "scale_schedule", "rope2d_freqs_grid", "scale_ind", "rope_idx", "ori_len")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return super().matches(module) and {"rope_idx", "ori_len"} <= set(argument_names(module))

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        module.kv_caching(False)
        x = randn(2, 5, module.q_bias.numel())
        yield module(x, None)
        if not module.using_flash:
            options = rotary_options(module, x)
            kept = torch.tensor([[0, 8, 3, 4, 1], [7, 2, 5, 0, 6]], dtype=torch.int64, device=x.device)[..., None]
            yield module(x, None, **options, ori_len=5)
            yield module(8 * x, None, **options, ori_len=9, rope_idx=lambda: kept)

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        x = randn(1, min(length, LONGEST), module.q_bias.numel())
        options = {} if module.using_flash else rotary_options(module, x)
        module.kv_caching(True)
        yield module(x[:, :1], None, **options, scale_ind=0, ori_len=1)
        yield module(x[:, 1:], None, **options, scale_ind=1, ori_len=x.shape[1] - 1)
        yield from (module.cached_k, module.cached_v)
        module.kv_caching(False)

    def _supported(self: Any, values: dict[str, Any]) -> Any:
        return super()._supported(values) if values["attn_bias_or_two_vector"] is None else None

    def _rotary(self: Any, values: dict[str, Any]) -> Rotary | None:
        schedule, kept, tokens = values["scale_schedule"], kept_tokens(values["rope_idx"]), values["x"].shape[:2]
        if schedule is None or (tokens[1] != values["ori_len"] if kept is None else kept.shape[:2] != tokens):
            return None
        start = sum(map(math.prod, schedule[: values["scale_ind"]]))
        rows = rotary_rows(values, start, values["ori_len"], self.head_dim)
        if rows is None or kept is None:
            return rows
        cos, sin = (t[kept[..., 0]] for t in rows)
        return cos, sin
