"""Attention as in FoundationVision/VAR and its relatives, with the key/value cache, and as in OliverRensu/MVAR."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_kernels.ops.scale_attention.op import scale_attention
from mvar_kernels.patching.cache import Schedule, block_schedule, scale_lengths, schedule_of
from mvar_kernels.patching.patches.base import Patch, Randn, is_linear

LONGEST = 2304
"""Tokens of the longest call of a comparison: the scores of 9,451 tokens take 11 GB for 32 heads."""


class FusedAttention(Patch):
    """Multi-head attention with one linear layer for queries, keys and values, as VAR has it."""

    projection: ClassVar[str] = "mat_qkv"
    """name of that layer"""
    bypassed: ClassVar[tuple[str, ...]] = (projection,)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        H, D, C = module.num_heads, module.head_dim, module.q_bias.numel()
        if not is_linear(getattr(module, cls.projection), C, 3 * C) or not is_linear(module.proj, C, C) or H * D != C:
            return f"{cls.projection} and proj: expected linear layers C→3C and C→C with C={C} of {H} heads of {D}"
        if hasattr(getattr(module, cls.projection), "base_layer"):
            # A new adapter of peft adds 0, so that a comparison would not show whether the original calls it.
            return f"{cls.projection}: expected a linear layer without an adapter, since its weight is used directly"
        normalized = has_qk_norm(module)
        temperature = getattr(module, "scale_mul_1H11", None)
        if normalized is None:
            return "attn_l2_norm or cos_attn: expected one of these options, which says whether q and k are normalized"
        if normalized and (temperature is None or temperature.numel() != H):
            return f"scale_mul_1H11: expected one number for each of {H} heads, as q and k are normalized"
        return None

    def _drops(self: Any) -> bool:
        """Whether the original drops attention weights."""
        dropout = getattr(self, "attn_drop", 0.0)
        rate = getattr(dropout, "p", 0.0) if isinstance(dropout, nn.Module) else dropout
        return bool(self.training and rate > 0)

    def _projected(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: (B, L, H, D) each, views of one tensor."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, getattr(self, self.projection).weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(2)
        return q, k, v

    def _normalized(self: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k as the scores multiply them, where they are normalized: q with its temperature."""
        if not has_qk_norm(self):
            return q, k
        temperature = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp().view(-1, 1)
        return F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1)

    def _appended(self: Any, k: Tensor, v: Tensor, *, heads_first: bool) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, L, H, D) to the cache, in its layout, and return all of it."""
        if heads_first:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.cached_k is not None:
            tokens = 2 if heads_first else 1
            k, v = torch.cat((self.cached_k, k), tokens), torch.cat((self.cached_v, v), tokens)
        self.cached_k, self.cached_v = k, v
        return (k.transpose(1, 2), v.transpose(1, 2)) if heads_first else (k, v)

    def _attended(self: Any, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, **options: Any) -> Tensor:
        """The module's output; `options` are those of the op that are not VAR's."""
        if has_qk_norm(self):
            options.setdefault("log_temperature", self.scale_mul_1H11.flatten())
        out = scale_attention(q, k, v, schedule.scales, pattern=schedule.pattern, scale=float(self.scale), **options)
        return self.proj_drop(self.proj(out.flatten(2)))


class Attention(FusedAttention):
    """Attention over the tokens that a mask allows, or over all cached tokens: FoundationVision/VAR, its forks,
    lxa9867/ControlVAR and NVlabs/HMAR.

    The cache keeps the layout and the normalized keys of the original, so that calls with and without the kernel can
    alternate (with the cache on, a call with a mask runs the original forward), and programs can copy, slice or expand
    it.
    """

    ops = "scale_attention"
    attributes: ClassVar[tuple[str, ...]] = (
        "mat_qkv",
        "q_bias",
        "v_bias",
        "zero_k_bias",
        "proj",
        "kv_caching",
        "caching",
    )
    required: ClassVar[tuple[str, ...]] = ("x", "attn_bias")
    optional: ClassVar[tuple[str, ...]] = ("using_block_sparse_attn",)
    bypassed: ClassVar[tuple[str, ...]] = ("mat_qkv", "block_sparse_attn")

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        C = module.q_bias.numel()
        module.kv_caching(False)
        x = randn(2, 5, C)
        yield module(x, attn_bias=example_mask(x))
        yield module(x, attn_bias=example_mask(x, diagonal=True))
        yield module(x, attn_bias=None)
        # Large scores, for modules that limit them.
        x = randn(1, 64, C)
        yield module(8 * x, attn_bias=example_mask(x))
        scales = block_schedule(getattr(module, "block_sparse_attn", None))
        if scales is not None:
            yield module(randn(1, sum(scales.scales), C), using_block_sparse_attn=True)

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        module.kv_caching(False)
        x = randn(1, min(length, LONGEST), module.q_bias.numel())
        yield module(x, attn_bias=example_mask(x))
        module.kv_caching(True)
        yield module(x[:, :1], attn_bias=None)
        yield module(x[:, 1:], attn_bias=None)
        yield from (module.cached_k, module.cached_v)
        module.kv_caching(False)

    def forward(self: Any, *args: Any, **options: Any) -> Tensor:
        values = self.supported_arguments(args, options)
        schedule = None if values is None else self._schedule(values)
        if values is None or schedule is None:
            out: Tensor = super().forward(*args, **options)  # type: ignore[misc]
            return out
        return self._output(values, schedule)

    def _output(self: Any, values: dict[str, Any], schedule: Schedule) -> Tensor:
        """The output of a call that the kernel supports."""
        q, k, v = self._projected(values["x"])
        if self.caching:
            # The kernel normalizes the cached, normalized keys again, which changes them by a rounding.
            k, v, schedule = self._cached(F.normalize(k, dim=-1) if has_qk_norm(self) else k, v, schedule)
        return self._attended(q, k, v, schedule)

    def _schedule(self: Any, values: dict[str, Any]) -> Schedule | None:
        """Pattern and tokens per scale of a call that the kernel supports, else None."""
        x, mask, block_sparse = values["x"], values["attn_bias"], values.get("using_block_sparse_attn", False)
        masked = self.caching and (mask is not None or block_sparse)
        if self._drops() or masked or not x.numel():
            return None
        if block_sparse:
            schedule = block_schedule(getattr(self, "block_sparse_attn", None))
        else:
            schedule = Schedule("causal", (x.shape[1],)) if mask is None else schedule_of(mask)
        return schedule if schedule is not None and sum(schedule.scales) == x.shape[1] else None

    def _cached(self: Any, k: Tensor, v: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Schedule]:
        """Append keys and values to the cache; returns all of it, (B, L, H, D) in the dtype of v, and its schedule."""
        dtype, new = v.dtype, v.shape[1]
        # FoundationVision/VAR caches (B, L, H, D) for flash-attn and xformers, and else (B, H, L, D).
        of_flash = getattr(self, "using_flash", False) and dtype != torch.float32
        heads_first = not (of_flash or getattr(self, "using_xform", False))
        k, v = self._appended(k, v, heads_first=heads_first)
        return k.to(dtype), v.to(dtype), schedule.after(k.shape[1] - new)  # under autocast a norm is float32


class ScaleAttention(FusedAttention):
    """Attention inside each scale, as in OliverRensu/MVAR: in training inside the scales of the buffer `patch_nums`,
    and in evaluation mode among all tokens of the call, which are those of one scale. There is no cache, and the mask
    is not read. The original needs flash-attn for it."""

    ops = "scale_attention"
    attributes = ("mat_qkv", "q_bias", "v_bias", "zero_k_bias", "proj", "patch_nums")
    required = ("x", "attn_bias")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return super().matches(module) and isinstance(module.patch_nums, Tensor)

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        C, L = module.q_bias.numel(), sum(scale_lengths(module.patch_nums))
        x = randn(2, L if module.training else 5, C)
        yield module(x, attn_bias=None)
        yield module(8 * x, attn_bias=example_mask(x))

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        yield module(randn(1, min(length, LONGEST), module.q_bias.numel()), attn_bias=None)

    def forward(self: Any, *args: Any, **options: Any) -> Tensor:
        values = self.supported_arguments(args, options)
        x = None if values is None or self._drops() else values["x"]
        if x is not None and x.numel():
            scales = scale_lengths(self.patch_nums) if self.training else (x.shape[1],)
            if sum(scales) == x.shape[1]:
                return self._attended(*self._projected(x), Schedule("diagonal", scales))
        out: Tensor = super().forward(*args, **options)  # type: ignore[misc]
        return out


def has_qk_norm(module: Any) -> bool | None:
    """Whether queries and keys are normalized; None if the module does not say."""
    normalized = getattr(module, "attn_l2_norm", getattr(module, "cos_attn", None))
    return None if normalized is None else bool(normalized)


def example_mask(x: Tensor, *, diagonal: bool = False) -> Tensor:
    """The attention mask (1, 1, L, L) of the scales (1, L − 1): VAR's, or one that allows the own scale alone."""
    mask = x.new_zeros(x.shape[1], x.shape[1])
    mask[0, 1:] = -torch.inf
    if diagonal:
        mask[1:, 0] = -torch.inf
    return mask[None, None]
