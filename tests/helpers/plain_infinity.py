# mypy: disable-error-code="union-attr,operator,arg-type,list-item"
# Submodules are accessed by name, as in the public code, and torch types them as tensor or module.
"""FoundationVision/Infinity's attention and block in plain PyTorch, from the names and shapes of its public code."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.plain_var import FFN, DropPath

Grid = dict[str, Tensor]


def rope_grid(schedule: list[tuple[int, int, int]], head_dim: int) -> Grid:
    """The table (2, 1, 1, 1, L, D/2) of cosines and sines of a schedule: half of the angles are of rows.

    Like those that the public code interpolates, they are not of norm 1.
    """
    frequencies = torch.logspace(0, -2, head_dim // 4)
    rows = torch.cat([torch.arange(h).repeat_interleave(w) / h for _, h, w in schedule])
    columns = torch.cat([torch.arange(w).repeat(h) / w for _, h, w in schedule])
    angles = 8 * torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], 1)
    table = torch.linspace(0.5, 1, len(rows))[:, None] * torch.stack([angles.cos(), angles.sin()])
    return {str(tuple(schedule)): table[:, None, None, None]}


class InfinityAttention(nn.Module):
    def __init__(self, width: int, heads: int, *, cos_attn: bool = True, using_flash: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.cos_attn, self.using_flash, self.use_flex_attn = cos_attn, using_flash, False
        self.rope2d_normalized_by_hw, self.pad_to_multiplier = 2, 1
        self.scale = 1 if cos_attn else self.head_dim**-0.5
        if cos_attn:
            shape = (1, 1, heads, 1) if using_flash else (1, heads, 1, 1)
            self.scale_mul_1H11 = nn.Parameter(torch.full(shape, 4.0).log())
            self.max_scale_mul = math.log(100)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Identity()
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(
        self,
        x: Tensor,
        attn_bias_or_two_vector: Any,
        attn_fn: Callable[..., Tensor] | None = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Grid | None = None,
        scale_ind: int = 0,
    ) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        tokens = 1 if self.using_flash else 2
        q, k, v = (t if self.using_flash else t.transpose(1, 2) for t in qkv.unbind(2))
        if self.cos_attn:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        if rope2d_freqs_grid is not None:
            table = self.table(rope2d_freqs_grid, scale_schedule, scale_ind, x.shape[1])
            q, k = self.rotated(q, table), self.rotated(k, table)
        k, v = k.contiguous(), v.contiguous()
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat([self.cached_k, k], tokens), torch.cat([self.cached_v, v], tokens)
            self.cached_k, self.cached_v = k, v
        if self.use_flex_attn and attn_fn is not None:
            out = attn_fn(q, k, v, scale=self.scale)
        else:
            q, k, v = (t.transpose(1, 2) if self.using_flash else t for t in (q, k, v))
            q, k, v = (t.to(v.dtype) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias_or_two_vector, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def first_row(self, schedule: Any, scale_ind: int) -> int:
        return sum(t * h * w for t, h, w in schedule[:scale_ind])

    def table(self, grid: Grid, schedule: Any, scale_ind: int, tokens: int) -> Tensor:
        """(2, L, D/2)"""
        start = self.first_row(schedule, scale_ind)
        return grid[str(tuple(schedule))][:, 0, 0, 0, start : start + tokens]

    def rotated(self, t: Tensor, table: Tensor) -> Tensor:
        """t (B, H, L, D), whose neighbouring channels are real and imaginary part of a complex number."""
        pairs = torch.view_as_complex(t.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(*table)).flatten(-2)


class CrossAttention(nn.Module):
    """To a text for each sample; `ca_kv` is all texts in one, the bounds of each, and the largest length."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.mat_q, self.mat_kv = nn.Linear(width, width), nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, q: Tensor, ca_kv: tuple[Tensor, Tensor, int]) -> Tensor:
        text, bounds, _ = ca_kv
        q = self.mat_q(q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.mat_kv(text).unflatten(-1, (2, self.num_heads, -1)).permute(1, 2, 0, 3)
        lengths = bounds.diff().tolist()
        parts = zip(q, k.split(lengths, 1), v.split(lengths, 1), strict=True)
        out = torch.stack([F.scaled_dot_product_attention(*part) for part in parts])
        return self.proj(out.transpose(1, 2).flatten(2))


def fused_norm(C: int, eps: float, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (C,), eps=eps) * (1 + scale) + shift


class InfinityBlock(nn.Module):
    """`scale_ind` reaches self-attention only with `fused`, as in the public code."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        fused: bool = True,
        shared_aln: bool = True,
        ca_gamma: float | None = None,
        drop_path: float = 0.0,
        checkpointing_sa_only: bool = False,
        cos_attn: bool = True,
        using_flash: bool = False,
    ) -> None:
        super().__init__()
        self.C, self.norm_eps, self.shared_aln = width, 1e-6, shared_aln
        self.checkpointing_sa_only = checkpointing_sa_only
        self.fused_norm_func = fused_norm if fused else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.sa = InfinityAttention(width, heads, cos_attn=cos_attn, using_flash=using_flash)
        self.ca, self.ffn = CrossAttention(width, heads), FFN(width)
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ca_norm = nn.LayerNorm(width, eps=1e-6)
        self.edit_options: dict[str, bool] = {}
        self.ca_gamma = 1 if ca_gamma is None else nn.Parameter(torch.full((width,), ca_gamma))
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        cond_BD: Tensor,
        ca_kv: Any,
        attn_bias_or_two_vector: Any,
        attn_fn: Callable[..., Tensor] | None = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Grid | None = None,
        scale_ind: int = 0,
    ) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            six = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        g1, g2, s1, s2, t1, t2 = six.unbind(2)
        arguments = (attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid)
        h = self._norm(x, s1, t1)
        if self.checkpointing_sa_only and self.training:
            h = checkpoint(self.sa, h, *arguments, use_reentrant=False, **self.edit_options)
        else:
            options = {"scale_ind": scale_ind} if self.passes_scale_ind() else {}
            h = self.sa(h, *arguments, **options, **self.edit_options)
        x = x + self.drop_path(h.mul_(g1))
        x = x + self.ca(self.ca_norm(x), ca_kv).float() * self.ca_gamma
        return x + self.drop_path(self.ffn(self._norm(x, s2, t2)) * g2)

    def passes_scale_ind(self) -> bool:
        return self.fused_norm_func is not None

    def _norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if self.fused_norm_func is not None:
            return self.fused_norm_func(C=self.C, eps=self.norm_eps, x=x, scale=scale, shift=shift)
        return self.ln_wo_grad(x.float()) * (1 + scale) + shift


class FastVARAttention(InfinityAttention):
    """csguoh/FastVAR's, of the tokens of a scale of `ori_len` that `rope_idx` keeps. It does not read the mask."""

    def forward(
        self,
        x: Tensor,
        attn_bias_or_two_vector: Any,
        attn_fn: Callable[..., Tensor] | None = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Grid | None = None,
        scale_ind: int = 0,
        rope_idx: Callable[..., Tensor] | None = None,
        ori_len: int = 0,
    ) -> Tensor:
        self.rope_idx, self.ori_len = rope_idx, ori_len
        return super().forward(x, None, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind)

    def table(self, grid: Grid, schedule: Any, scale_ind: int, tokens: int) -> Tensor:
        """(2, L, D/2), or (2, B, 1, L, D/2)"""
        table = super().table(grid, schedule, scale_ind, self.ori_len)
        everything = self.rope_idx is None or self.rope_idx.__name__ == "do_nothing"
        return table if everything else table[:, self.rope_idx()[..., 0], None].transpose(2, 3)


class EditAttention(InfinityAttention):
    """HiDream-ai/VAREdit's: a source image of the size of the last scale (`src`) comes before the scales, which see
    something else of it in the first layer (`start_layer`)."""

    def forward(
        self,
        x: Tensor,
        attn_bias_or_two_vector: Any,
        attn_fn: Callable[..., Tensor] | None = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Grid | None = None,
        start_layer: bool = False,
        scale_ind: int = 0,
        src: bool = True,
    ) -> Tensor:
        self.src = src
        arguments = (x, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind)
        return super().forward(*arguments) * (2 if start_layer else 1)

    def first_row(self, schedule: Any, scale_ind: int) -> int:
        return 0 if self.src else math.prod(schedule[-1]) + super().first_row(schedule, scale_ind)


class EditBlock(InfinityBlock):
    """HiDream-ai/VAREdit's block."""

    def __init__(self, width: int, heads: int, *, cos_attn: bool = True, **options: Any) -> None:
        super().__init__(width, heads, cos_attn=cos_attn, **options)
        self.sa = EditAttention(width, heads, cos_attn=cos_attn)

    def forward(
        self,
        x: Tensor,
        cond_BD: Tensor,
        ca_kv: Any,
        attn_bias_or_two_vector: Any,
        attn_fn: Callable[..., Tensor] | None = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Grid | None = None,
        start_layer: bool = False,
        scale_ind: int = 0,
        src: bool = True,
    ) -> Tensor:
        self.edit_options = {"start_layer": start_layer, "src": src}
        arguments = (x, cond_BD, ca_kv, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind)
        return super().forward(*arguments)
