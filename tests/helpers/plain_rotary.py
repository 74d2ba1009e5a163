# mypy: disable-error-code="union-attr,operator,arg-type,list-item,has-type"
# Submodules are accessed by name, as in the public code, and torch types them as tensor or module.
"""Attention and blocks of VAR's relatives with RoPE and RMSNorm in plain PyTorch, written from the names and shapes of
their public code."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.plain_var import DropPath


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MapRotaryEmbedding(nn.Module):
    """Angles of the row for the first half of the channels, and of the column for the second."""

    def __init__(self, dim: int, base: float = 10000) -> None:
        super().__init__()
        self.register_buffer("inv_freq", base ** -(torch.arange(0, dim, 4) / dim), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float()  # (B, L, 2, D/4)
        angles = torch.cat([angles, angles], -1).flatten(2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def positions(patch_nums: tuple[int, ...], si: int) -> Tensor:
    maps = patch_nums if si == -1 else patch_nums[si : si + 1]
    grids = [torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"), -1) for n in maps]
    rows = [grid.reshape(-1, 2) / n * patch_nums[-1] for n, grid in zip(maps, grids, strict=True)]
    return torch.cat(rows)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, H, L, D)"""
    x1, x2 = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-x2, x1], -1) * sin[:, None]


class MarkovAttention(nn.Module):
    """luokairo/Markov-VAR's attention."""

    def __init__(self, width: int, heads: int, attn_l2_norm: bool, patch_nums: tuple[int, ...]) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.attn_l2_norm, self.patch_nums = attn_l2_norm, patch_nums
        self.rotary_emb = MapRotaryEmbedding(self.head_dim)
        self.scale = 1.0 if attn_l2_norm else 0.25 / math.sqrt(self.head_dim)
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
            self.max_scale_mul = math.log(100)
        self.qkv_proj, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj_drop, self.attn_drop = nn.Identity(), 0.0
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x: Tensor, attn_bias: Tensor | None, si: int = -1) -> Tensor:
        cos, sin = self.rotary_emb(x, positions(self.patch_nums, si)[None])
        return self.attended(x, attn_bias, cos, sin)

    def attended(self, x: Tensor, attn_bias: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.qkv_proj.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        q, k = (rotate(t, cos.to(v.dtype), sin.to(v.dtype)) for t in (q, k))
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat([self.cached_k, k], 2), torch.cat([self.cached_v, v], 2)
            self.cached_k, self.cached_v = k, v
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MarkovBlock(nn.Module):
    """luokairo/Markov-VAR's block; with `disable_aln` the six vectors are those of a table, added to the condition."""

    def __init__(
        self,
        width: int,
        heads: int,
        attn_l2_norm: bool,
        patch_nums: tuple[int, ...],
        drop_path: float = 0.0,
        disable_aln: bool = False,
    ) -> None:
        super().__init__()
        self.C, self.cross_attn = width, None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.attn, self.ffn = MarkovAttention(width, heads, attn_l2_norm, patch_nums), SwiGLU(width)
        self.ln_wo_grad = RMSNorm(width, eps=1e-6)
        if disable_aln:
            self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None, si: int = -1) -> Tensor:
        if hasattr(self, "scale_shift_table"):
            six = self.scale_shift_table + cond_BD[:, None]
        else:
            six = self.ada_lin(cond_BD).view(-1, 6, self.C)
        g1, g2, s1, s2, t1, t2 = six[:, None].unbind(2)
        x = x + self.drop_path(self.attn(self.ln_wo_grad(x) * (1 + s1) + t1, attn_bias=attn_bias, si=si) * g1)
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x) * (1 + s2) + t2) * g2)


class RMSNormBeforeHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.C, self.ln_wo_grad = width, RMSNorm(width, eps=1e-6)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLC: Tensor, cond_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x_BLC) * (1 + scale) + shift


class HARTAttention(MarkovAttention):
    """mit-han-lab/hart's attention, where the first scale is a text: its tokens have one position each, and those of
    the maps follow the last of these."""

    def __init__(self, width: int, heads: int, attn_l2_norm: bool, patch_nums: tuple[int, ...]) -> None:
        super().__init__(width, heads, attn_l2_norm, patch_nums)
        self.context_rotary_emb = TextRotaryEmbedding(self.head_dim)

    def forward(
        self,
        x: Tensor,
        attn_bias: Tensor | None,
        si: int = -1,
        context_position_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        m_maskgit: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        tables = []
        if si <= 0:
            tables.append(self.context_rotary_emb(x, context_position_ids))
        if si != 0:
            ids = positions(self.patch_nums[1:], si if si == -1 else si - 1).expand(len(x), -1, -1)
            ids = ids if m_maskgit is None else ids[m_maskgit].reshape(len(x), -1, 2)
            tables.append(self.rotary_emb(x, ids + context_position_ids[:, -1, None, None]))
        return self.attended(x, attn_bias, *(torch.cat(t, 1) for t in zip(*tables, strict=True)))


def do_nothing(x: Tensor, *args: Any) -> Tensor:
    """What csguoh/FastVAR passes as `idx_fn` where it prunes no tokens: it goes by the name."""
    return x


class FastHARTAttention(HARTAttention):
    """csguoh/FastVAR's, to which the block passes the tokens that it keeps."""

    def forward(
        self,
        x: Tensor,
        attn_bias: Tensor | None,
        si: int = -1,
        context_position_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        m_maskgit: tuple[Tensor, ...] | None = None,
        idx_fn: Callable[..., Tensor] | None = None,
        is_later_layer: bool | None = None,
    ) -> Tensor:
        self.idx_fn = idx_fn
        return super().forward(x, attn_bias, si, context_position_ids, context_mask, m_maskgit)

    def attended(self, x: Tensor, attn_bias: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        if self.idx_fn is not None and self.idx_fn.__name__ != "do_nothing":
            cos, sin = (t.gather(1, self.idx_fn().expand(-1, -1, t.shape[-1])) for t in (cos, sin))
        return super().attended(x, attn_bias, cos, sin)


class TextRotaryEmbedding(nn.Module):
    def __init__(self, dim: int, base: float = 10000) -> None:
        super().__init__()
        self.register_buffer("inv_freq", base ** -(torch.arange(0, dim, 2) / dim), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class LlamaRMSNormFused(nn.Module):
    """HART's norm: a kernel writes to a new tensor, which therefore has no gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.variance_epsilon, self.weight = 1e-6, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.variance_epsilon)


class HARTBlock(nn.Module):
    """mit-han-lab/hart's block, whose condition is the mean (`disable_aln`) or the maximum of the text."""

    def __init__(
        self, width: int, heads: int, patch_nums: tuple[int, ...], drop_path: float, disable_aln: bool, norm: type
    ) -> None:
        super().__init__()
        like = MarkovBlock(width, heads, True, patch_nums, drop_path, disable_aln)
        self.__dict__.update(vars(like))
        self.attn, self.ln_wo_grad = HARTAttention(width, heads, True, patch_nums), norm(width)
        self.sep_aln_pooling_mode = "max"

    def forward(
        self,
        x: Tensor,
        cond_BD: Tensor,
        attn_bias: Tensor | None,
        si: int = -1,
        context_position_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        m_maskgit: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        shared = hasattr(self, "scale_shift_table")
        if cond_BD.dim() == 3 and shared:
            cond_BD = (cond_BD * context_mask[..., None]).sum(1) / context_mask.sum(1, keepdim=True)
        elif cond_BD.dim() == 3:
            cond_BD = cond_BD.max(1).values
        six = self.scale_shift_table + cond_BD[:, None] if shared else self.ada_lin(cond_BD).view(-1, 6, self.C)
        g1, g2, s1, s2, t1, t2 = six[:, None].unbind(2)
        h = self.attn(
            self.ln_wo_grad(x) * (1 + s1) + t1,
            attn_bias=attn_bias,
            si=si,
            context_position_ids=context_position_ids,
            context_mask=context_mask,
            m_maskgit=m_maskgit,
        )
        x = x + self.drop_path(h * g1)
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x) * (1 + s2) + t2) * g2)


class SwittiAttention(nn.Module):
    """yandex-research/switti's attention to its own tokens: LayerNorm over all channels of q and of k, complex RoPE."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.qk_norm = heads, width // heads, qk_norm
        self.scale = self.head_dim**-0.5
        self.q_norm, self.k_norm = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.to_qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.proj_drop, self.attn_drop = nn.Identity(), 0.0
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x: Tensor, attn_bias: Tensor | None, freqs_cis: Tensor | None = None) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if freqs_cis is not None:
            q, k = (self.rotated(t, freqs_cis) for t in (q, k))
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat([self.cached_k, k], 2), torch.cat([self.cached_v, v], 2)
            self.cached_k, self.cached_v = k, v
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    @staticmethod
    def rotated(x: Tensor, freqs_cis: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(numbers * freqs_cis[None, :, : x.shape[2]]).flatten(-2).to(x.dtype)


class SwittiCrossAttention(nn.Module):
    """Attention to a text, whose padding a mask (B, tokens) hides; its keys and values are made once."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(context_dim, 2 * width)
        self.proj = nn.Linear(width, width)
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(
        self, x: Tensor, context: Tensor, context_attn_bias: Tensor | None = None, freqs_cis: Tensor | None = None
    ) -> Tensor:
        kv = (self.cached_k, self.cached_v) if self.cached_k is not None else self.to_kv(context).chunk(2, -1)
        if self.caching:
            self.cached_k, self.cached_v = kv
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (self.to_q(x), *kv))
        mask = None if context_attn_bias is None else context_attn_bias[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class SwittiBlock(nn.Module):
    """yandex-research/switti's block."""

    def __init__(self, width: int, heads: int, context_dim: int, use_crop_cond: bool = True) -> None:
        super().__init__()
        self.C, self.use_crop_cond = width, use_crop_cond
        self.attn, self.ffn = SwittiAttention(width, heads, True), SwiGLU(width)
        self.cross_attn = SwittiCrossAttention(width, heads, context_dim)
        self.self_attention_norm1, self.self_attention_norm2 = RMSNorm(width), RMSNorm(width)
        self.cross_attention_norm1, self.cross_attention_norm2 = RMSNorm(width), RMSNorm(width)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(width), RMSNorm(width)
        self.attention_y_norm = RMSNorm(context_dim)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if use_crop_cond:
            self.crop_cond_scales = nn.Parameter(torch.zeros(1, width))

    def forward(
        self,
        x: Tensor,
        cond_BD: Tensor,
        attn_bias: Tensor | None,
        crop_cond: Tensor | None = None,
        context: Tensor | None = None,
        context_attn_bias: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        if self.use_crop_cond:
            cond_BD = cond_BD + self.crop_cond_scales * crop_cond
        g1, g2, s1, s2, t1, t2 = self.ada_lin(cond_BD).view(-1, 1, 6, self.C).unbind(2)
        h = self.self_attention_norm1(x) * (1 + s1) + t1
        x = x + self.self_attention_norm2(self.attn(h, attn_bias=attn_bias, freqs_cis=freqs_cis)) * g1
        if context is not None:
            h, context = self.cross_attention_norm1(x), self.attention_y_norm(context)
            h = self.cross_attn(h, context, context_attn_bias=context_attn_bias, freqs_cis=freqs_cis)
            x = x + self.cross_attention_norm2(h)
        return x + self.ffn_norm2(self.ffn(self.ffn_norm1(x) * (1 + s2) + t2)) * g2
