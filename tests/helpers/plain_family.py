# mypy: disable-error-code="union-attr,operator,arg-type,list-item,has-type"
# Submodules are accessed by name, as in the public code, and torch types them as tensor or module.
"""Attention and blocks of VAR's relatives in plain PyTorch, written from the names and shapes of their public code."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.plain_mamba2 import PlainMamba2
from tests.helpers.plain_var import FFN, AdaLNSelfAttn, DropPath, SelfAttention


class ControlVARAttention(SelfAttention):
    """lxa9867/ControlVAR names the option of q/k norm `cos_attn`, and divides scores by 4√D without it."""

    def __init__(self, width: int, heads: int, cos_attn: bool) -> None:
        super().__init__(width, heads, cos_attn)
        self.cos_attn = self.__dict__.pop("attn_l2_norm")

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        self.attn_l2_norm = self.cos_attn
        try:
            return super().forward(x, attn_bias)
        finally:
            del self.attn_l2_norm


class BlockSparseAttention(nn.Module):
    """NVlabs/HMAR's attention inside each scale, or over a scale and all coarser ones."""

    def __init__(self, scales: tuple[int, ...], sparsity_pattern: str = "block_diagonal") -> None:
        super().__init__()
        lengths = torch.tensor(scales)
        ends = lengths.cumsum(0)
        self.row_ends = ends.repeat_interleave(lengths).int()
        self.row_starts = (ends - lengths).repeat_interleave(lengths).int()
        if sparsity_pattern == "block_causal":
            self.row_starts = torch.zeros_like(self.row_starts)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        columns = torch.arange(q.shape[2])
        seen = (columns >= self.row_starts[:, None]) & (columns < self.row_ends[:, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


class HMARAttention(SelfAttention):
    def __init__(
        self, width: int, heads: int, attn_l2_norm: bool, scales: tuple[int, ...], pattern: str = "block_diagonal"
    ) -> None:
        super().__init__(width, heads, attn_l2_norm)
        self.block_sparse_attn = BlockSparseAttention(scales, pattern)

    def forward(self, x: Tensor, using_block_sparse_attn: bool = False, attn_bias: Tensor | None = None) -> Tensor:
        if not using_block_sparse_attn:
            return super().forward(x, attn_bias)
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        return self.proj_drop(self.proj(self.block_sparse_attn(q, k, v, self.scale).transpose(1, 2).flatten(2)))


class HMARBlock(AdaLNSelfAttn):
    def __init__(self, width: int, heads: int, scales: tuple[int, ...], drop_path: float = 0.0) -> None:
        super().__init__(width, heads, True, False, drop_path)
        self.attn = HMARAttention(width, heads, True, scales)

    def forward(
        self, x: Tensor, cond_BD: Tensor, using_block_sparse_attn: bool = False, attn_bias: Tensor | None = None
    ) -> Tensor:
        g1, g2, s1, s2, t1, t2 = self.ada_lin(cond_BD).view(-1, 1, 6, self.C).unbind(2)
        options: dict[str, Any] = {"using_block_sparse_attn": using_block_sparse_attn, "attn_bias": attn_bias}
        x = x + self.drop_path(self.attn(self.ln_wo_grad(x) * (1 + s1) + t1, **options) * g1)
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x) * (1 + s2) + t2) * g2)


class MVARAttention(nn.Module):
    """OliverRensu/MVAR's attention inside each scale; `halves` raises an error in float32, as flash-attn does."""

    def __init__(self, width: int, heads: int, attn_l2_norm: bool, scales: tuple[int, ...], halves: bool) -> None:
        super().__init__()
        like = SelfAttention(width, heads, attn_l2_norm)
        self.__dict__.update({k: v for k, v in vars(like).items() if k not in ("caching", "cached_k", "cached_v")})
        self.register_buffer("patch_nums", torch.tensor(scales, dtype=torch.int32))
        self.caching, self.cached_k, self.cached_v, self.halves = False, None, None, halves

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.attn_l2_norm:
            q = (F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()).to(qkv.dtype)
            k = F.normalize(k, dim=-1).to(qkv.dtype)
        if self.halves and qkv.dtype == torch.float32:
            raise RuntimeError("only float16 and bfloat16 are supported")
        scales = self.patch_nums.tolist() if self.training else [x.shape[1]]
        parts = [t.split(scales, 2) for t in (q, k, v)]
        out = [F.scaled_dot_product_attention(*part, scale=self.scale) for part in zip(*parts, strict=True)]
        return self.proj_drop(self.proj(torch.cat(out, 2).transpose(1, 2).flatten(2)))


class MVARBlock(nn.Module):
    """OliverRensu/MVAR's block: in evaluation mode the mixer runs again over all tokens of the generation so far."""

    def __init__(
        self, width: int, heads: int, scales: tuple[int, ...], drop_path: float = 0.0, halves: bool = False
    ) -> None:
        super().__init__()
        self.C = width
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.attn = MVARAttention(width, heads, True, scales, halves)
        self.mamba = PlainMamba2(width)
        self.ffn = FFN(width)
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 9 * width))

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        g1, g2, g3, s1, s2, s3, t1, t2, t3 = self.ada_lin(cond_BD).view(-1, 1, 9, self.C).unbind(2)
        x = x + self.drop_path(self.attn(self.ln_wo_grad(x) * (1 + s1) + t1, attn_bias=attn_bias) * g1)
        tokens = x
        if not self.training:
            tokens = self.cache = (x if self.cache is None else torch.cat([self.cache, x], 1)).detach()
        mixed = self.drop_path(self.mamba(self.ln_wo_grad(tokens) * (1 + s2) + t2) * g2)
        x = x + mixed[:, -x.shape[1] :]
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x) * (1 + s3) + t3) * g3)
