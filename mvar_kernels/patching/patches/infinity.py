"""Self-attention and blocks of FoundationVision/Infinity (arXiv 2412.04431), which makes images from texts, and of
HiDream-ai/VAREdit, which edits them.

They are VAR's with a rotary position embedding of each scale, and with cross-attention to the text in every block.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvar_kernels.ops.adaln.op import adaln, gated_adaln
from mvar_kernels.ops.scale_attention.reference import rotated
from mvar_kernels.patching.cache import Schedule, schedule_of
from mvar_kernels.patching.patches.attention import (
    LONGEST,
    Attention,
    FusedAttention,
    example_mask,
)
from mvar_kernels.patching.patches.base import Randn, argument_names, roll_tokens, scale_options
from mvar_kernels.patching.patches.block import ModulatedBlock, in_common_dtype

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines (L, D/2), or (B, L, D/2), of the angles by which neighbouring channels of q and k are rotated."""


class _Call(NamedTuple):
    """A call of attention that the kernel supports."""

    schedule: Schedule
    rotary: Rotary | None


class InfinityAttention(FusedAttention):
    """Attention over the tokens that a mask allows, or over all cached tokens; q and k are rotated after their norm.

    The cache keeps the layout and the normalized, rotated keys of the original. The kernel cannot normalize these
    again: interpolated tables (`rope2d_normalized_by_hw` = 1) are no rotations, and shorten them.

    The original forward runs for flex attention and for the two vectors of the customized flash-attn, whose masks are
    not known here; and with flash-attn for a rotary embedding, which the original then applies along the heads.

    VAREdit's has an argument `src`: the tokens are those of the source image, which come first in the table, or of the
    scales that follow it. In its `start_layer`, which resizes the source, the original runs.
    """

    ops = "scale_attention"
    attributes = (*Attention.attributes, "using_flash", "rope2d_normalized_by_hw")
    required = ("x", "attn_bias_or_two_vector")
    optional: ClassVar[tuple[str, ...]] = ("attn_fn", "scale_schedule", "rope2d_freqs_grid", "scale_ind", "src")

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        C = module.q_bias.numel()
        module.kv_caching(False)
        x = randn(2, 5, C)
        yield module(x, None)
        if not module.using_flash:
            for source in _sources(module):
                yield module(x, example_mask(x), **rotary_options(module, x), **source)
            yield module(x, example_mask(x, diagonal=True))
            # Large scores, for modules that limit them.
            x = randn(1, 64, C)
            yield module(8 * x, example_mask(x), **rotary_options(module, x))

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        x = randn(1, min(length, LONGEST), module.q_bias.numel())
        options = {} if module.using_flash else rotary_options(module, x)
        module.kv_caching(False)
        yield module(x, None if module.using_flash else example_mask(x), **options)
        for source in _sources(module):
            module.kv_caching(True)
            yield module(x[:, :1], None, **{**options, "scale_ind": 0}, **source)
            yield module(x[:, 1:], None, **{**options, "scale_ind": 1}, **source)
            yield from (module.cached_k, module.cached_v)
            module.kv_caching(False)

    def forward(self: Any, *args: Any, **options: Any) -> Tensor:
        values = self.supported_arguments(args, options)
        call = None if values is None else self._supported(values)
        if values is None or call is None:
            out: Tensor = super().forward(*args, **options)  # type: ignore[misc]
            return out
        q, k, v = self._projected(values["x"])
        one_for_all = call.rotary is None or call.rotary[0].dim() == 2
        if one_for_all and not self.caching:
            return self._attended(q, k, v, call.schedule, rotary=call.rotary, rotary_interleaved=True)
        dtype, L = q.dtype, q.shape[1]
        q, k, v = self._cached(q, k, v, call.rotary)
        schedule = call.schedule.after(k.shape[1] - L)
        return self._attended(*(t.to(dtype) for t in (q, k, v)), schedule, log_temperature=None)

    def _supported(self: Any, values: dict[str, Any]) -> _Call | None:
        """What the kernel needs for a call, or None where it does not support it."""
        x, mask, grid = values["x"], values["attn_bias_or_two_vector"], values.get("rope2d_freqs_grid")
        flex = getattr(self, "use_flex_attn", False) and values.get("attn_fn") is not None
        if flex or not x.numel() or ((mask is not None or grid is not None) and self.using_flash):
            return None
        if mask is not None and (self.caching or not isinstance(mask, Tensor)):
            return None
        schedule = Schedule("causal", (x.shape[1],)) if mask is None else schedule_of(mask)
        if schedule is None or sum(schedule.scales) != x.shape[1]:
            return None
        if grid is None:
            return _Call(schedule, None)
        rotary = self._rotary(values)
        return None if rotary is None else _Call(schedule, rotary)

    def _rotary(self: Any, values: dict[str, Any]) -> Rotary | None:
        """The rows of the table for the tokens of a call, or None where they are not known here."""
        schedule, source = values.get("scale_schedule"), values.get("src")
        if schedule is None:
            return None
        start = 0 if source else sum(map(math.prod, schedule[: values.get("scale_ind", 0)]))
        if source is False:  # after the source, which has the size of the last scale
            start += math.prod(schedule[-1])
        return rotary_rows(values, start, values["x"].shape[1], self.head_dim)

    def _cached(self: Any, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize and rotate q and k, append to the cache, if it is on; q and all keys and values, (B, L, H, D)."""
        q, k = self._normalized(q, k)
        if rotary is not None:
            q, k = (rotated(t, *rotary, interleaved=True) for t in (q, k))
        if not self.caching:
            return q, k, v
        return q, *self._appended(k.contiguous(), v.contiguous(), heads_first=not self.using_flash)


class InfinityBlock(ModulatedBlock):
    """Self-attention, cross-attention and feed-forward network on a residual stream in float32.

    Each of the three norms is computed in one pass with the residual that precedes it. As in the original,
    self-attention gets `scale_ind` only with a `fused_norm_func`.
    """

    bypassed = ("ln_wo_grad", "drop_path", "ca_norm")
    attributes = ("sa", "ca", "ca_gamma", "ffn", "fused_norm_func", "checkpointing_sa_only", *bypassed)
    required = ("x", "cond_BD", "ca_kv", "attn_bias_or_two_vector")
    optional = InfinityAttention.optional
    unpatched = {
        **ModulatedBlock.unpatched,
        "ca": "flash-attn's attention to texts of different lengths, packed in one: the kernels have no packed layout",
    }
    attention = "sa"
    vectors = 6

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        reason = super().unsupported_reason(module)
        if reason is not None:
            return reason
        if not isinstance(module.ln_wo_grad, nn.LayerNorm):
            return "ln_wo_grad: expected a LayerNorm over the channels without weights"
        shape, norm, gamma = tuple(module.ln_wo_grad.normalized_shape), module.ca_norm, module.ca_gamma
        if not isinstance(norm, nn.LayerNorm) or tuple(norm.normalized_shape) != shape:
            return "ca_norm: expected a LayerNorm over the channels"
        if not isinstance(gamma, int | float) and tuple(getattr(gamma, "shape", ())) != shape:
            return f"ca_gamma: expected a number or one for each of {shape[0]} channels"
        return None

    @classmethod
    def example_calls(cls, module: Any, randn: Randn) -> Iterator[Tensor]:
        for source in _sources(module):
            yield cls._example(module, randn, 2, 5, rotary=not module.sa.using_flash, **source)

    @classmethod
    def long_calls(cls, module: Any, randn: Randn, length: int) -> Iterator[Tensor]:
        roll_tokens(module.sa, module.ffn)
        for options in scale_options(module):
            yield cls._example(module, randn, 1, length, rotary=False, **options)

    @classmethod
    def _example(cls, module: Any, randn: Randn, batch: int, length: int, *, rotary: bool, **options: Any) -> Tensor:
        x, cond = cls._inputs(module, randn, batch, length)
        # flash-attn rounds to bfloat16 in cross-attention, which would hide differences or be one by chance.
        module.ca.forward = lambda q, ca_kv: q.roll(1, 1) * ca_kv[0].sigmoid()
        module.sa.kv_caching(False)
        if rotary:
            options |= {**rotary_options(module.sa, x), "scale_ind": 1}
        mask = example_mask(x) if rotary else None
        ca_kv = (randn(x.shape[-1]),)
        out: Tensor = module(x=x, cond_BD=cond, ca_kv=ca_kv, attn_bias_or_two_vector=mask, attn_fn=None, **options)
        return out

    def forward(self: Any, *args: Any, **options: Any) -> Tensor:
        values = self.supported_arguments(args, options)
        six = None if values is None or not values["x"].numel() else self._six(values["cond_BD"])
        if values is None or six is None or six.shape[1] != 1 or torch.float64 in (six.dtype, values["x"].dtype):
            out: Tensor = super().forward(*args, **options)  # type: ignore[misc]
            return out
        x, (g1, g2, s1, s2, t1, t2) = in_common_dtype(values["x"].float(), six)
        eps, norm = self.ln_wo_grad.eps, self.ca_norm
        branch = self._attended(adaln(x, s1[:, 0], t1[:, 0], eps=eps), values)
        weight, bias = (None if t is None else t.to(x.dtype) for t in (norm.weight, norm.bias))
        gate = self.drop_path(g1)[:, 0]
        x, h = gated_adaln(x, branch, gate, None, weight=weight, bias=bias, eps=norm.eps)
        branch = self.ca(h, values["ca_kv"])
        gamma, C = self.ca_gamma, x.shape[-1]
        gate = gamma.to(x.dtype)[None] if isinstance(gamma, Tensor) else x.new_full((1, C), gamma)
        x, h = gated_adaln(x, branch, gate, s2[:, 0], t2[:, 0], eps=eps)
        return torch.addcmul(x, self.ffn(h).to(x.dtype), self.drop_path(g2))

    def _six(self: Any, cond: Tensor) -> Tensor:
        """(B or 1, 1, 6, C)"""
        generating = self.sa.caching and not torch.is_grad_enabled()
        with torch.autocast("cuda", enabled=False):
            modulation: Tensor = self._modulation(cond, generating=generating, first_scale=self.sa.cached_k is None)
        return modulation

    def _attended(self: Any, h: Tensor, values: dict[str, Any]) -> Tensor:
        names = ("attn_bias_or_two_vector", "attn_fn", "scale_schedule", "rope2d_freqs_grid")
        arguments = [values[name] for name in names]
        source = {"src": values["src"]} if "src" in values else {}
        if self.training and self.checkpointing_sa_only:
            out: Tensor = checkpoint(self.sa, h, *arguments, use_reentrant=False, **source)
        elif self.fused_norm_func is None:
            out = self.sa(h, *arguments, **source)
        else:
            out = self.sa(h, *arguments, scale_ind=values["scale_ind"], **source)
        return out


def _sources(module: nn.Module) -> list[dict[str, bool]]:
    """Arguments of example calls: none, and where the forward takes a source image, its tokens and those of scales."""
    return [{"src": True}, {"src": False}] if "src" in argument_names(module) else [{}]


def rotary_rows(values: dict[str, Any], start: int, rows: int, head_dim: int) -> Rotary | None:
    """So many rows (D/2) of the table for the schedule of a call, or None where it is not there.

    The argument `rope2d_freqs_grid` has a table (2, 1, 1, 1, rows, D/2) for the text of a schedule of scales (1,
    height, width). As in the original, a table is moved to the device of x once for all.
    """
    grid, key, device = values["rope2d_freqs_grid"], str(tuple(values["scale_schedule"])), values["x"].device
    table = grid.get(key) if isinstance(grid, dict) else None
    if table is None or table.requires_grad or table.dtype != torch.float32:
        return None
    if start + rows > table.shape[-2] or tuple(table.shape) != (2, 1, 1, 1, table.shape[-2], head_dim // 2):
        return None
    if table.device != device:
        table = grid[key] = table.to(device)
    cos, sin = table[:, 0, 0, 0, start : start + rows]
    return cos, sin


def rotary_options(module: Any, x: Tensor) -> dict[str, Any]:
    """Options of a call with a rotary embedding for x (B, L, C), at scales of 1 and L − 1 tokens."""
    L, D = x.shape[1], module.head_dim
    schedule = [(1, 1, 1), (1, 1, L - 1)]
    # Not linear in the row: scores would not depend on the first one.
    positions = torch.arange(2 * L, dtype=torch.int64, device=x.device).square() % 97
    angles = positions[:, None] / torch.logspace(0, 2, D // 2, dtype=torch.float32, device=x.device)
    table = 0.9 * torch.stack((angles.cos(), angles.sin()))[:, None, None, None]
    return {"scale_schedule": schedule, "rope2d_freqs_grid": {str(tuple(schedule)): table}}
