# mypy: disable-error-code="union-attr,operator,arg-type,list-item"
# Submodules are accessed by name, as in the public code, and torch types them as tensor or module.
"""A plain PyTorch VAR (arXiv 2404.02905) with the names and shapes of FoundationVision/VAR.

It is written as in repositories based on VAR and uses none of mvar's ops. It specifies mvar's VAR and serves as a test
model for `mvar_kernels.accelerate`. Attention uses an L×L mask in training and concatenated keys and values in
generation; LN, modulation, gate and residual are separate operations; top-k and top-p use sorting.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.models.tokenizer import Tokenizer


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, attn_l2_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.attn_l2_norm = attn_l2_norm
        self.scale = 1.0 if attn_l2_norm else 0.25 / math.sqrt(self.head_dim)
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
            self.max_scale_mul = math.log(100)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Identity()
        self.attn_drop = 0.0
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat([self.cached_k, k], 2), torch.cat([self.cached_v, v], 2)
            self.cached_k, self.cached_v = k, v
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class FFN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act, self.drop = nn.GELU(approximate="tanh"), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class DropPath(nn.Module):
    """Drops the branch of random samples in training (stochastic depth)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class AdaLNSelfAttn(nn.Module):
    def __init__(self, width: int, heads: int, attn_l2_norm: bool, shared_aln: bool, drop_path: float) -> None:
        super().__init__()
        self.C, self.shared_aln = width, shared_aln
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.attn, self.ffn = SelfAttention(width, heads, attn_l2_norm), FFN(width)
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        six = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        g1, g2, s1, s2, t1, t2 = six.unbind(2)  # (B, 1, C) each
        x = x + self.drop_path(self.attn(self.ln_wo_grad(x) * (1 + s1) + t1, attn_bias) * g1)
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x) * (1 + s2) + t2) * g2)


class AdaLNBeforeHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.C = width
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLC: Tensor, cond_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x_BLC) * (1 + scale) + shift


class SharedAdaLin(nn.Linear):
    def forward(self, cond_BD: Tensor) -> Tensor:
        return super().forward(cond_BD).view(-1, 1, 6, self.in_features)


class PlainVAR(nn.Module):
    def __init__(
        self,
        depth: int,
        patch_nums: Sequence[int],
        *,
        heads: int | None = None,
        num_classes: int = 10,
        num_codes: int = 64,
        code_dim: int = 32,
        attn_l2_norm: bool = True,
        shared_aln: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        heads = heads or depth
        C, self.patch_nums = 64 * heads, tuple(patch_nums)
        self.scales = [n * n for n in patch_nums]
        L, self.first_l, self.num_classes = sum(self.scales), self.scales[0], num_classes
        self.word_embed = nn.Linear(code_dim, C)
        self.class_emb = nn.Embedding(num_classes + 1, C)
        self.pos_start = nn.Parameter(torch.randn(1, self.first_l, C) / math.sqrt(3 * C))
        self.pos_1LC = nn.Parameter(torch.randn(1, L, C) / math.sqrt(3 * C))
        self.lvl_embed = nn.Embedding(len(self.scales), C)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(C, 6 * C)) if shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(
            AdaLNSelfAttn(C, heads, attn_l2_norm, shared_aln, drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        level = torch.cat([torch.full((n,), k) for k, n in enumerate(self.scales)])
        self.register_buffer("lvl_1L", level[None])
        self.register_buffer("attn_bias_for_masking", torch.where(level[:, None] >= level, 0.0, -torch.inf)[None, None])
        self.head_nm, self.head = AdaLNBeforeHead(C), nn.Linear(C, num_codes)

    def forward(self, label_B: Tensor, x_BLCv_wo_first_l: Tensor) -> Tensor:
        """Logits (B, L, V) with teacher forcing."""
        cond = self.class_emb(label_B)
        x = torch.cat([cond[:, None] + self.pos_start, self.word_embed(x_BLCv_wo_first_l)], 1)
        return self._logits(x + self.lvl_embed(self.lvl_1L) + self.pos_1LC, cond, self.attn_bias_for_masking)

    def _logits(self, x: Tensor, cond: Tensor, attn_bias: Tensor | None) -> Tensor:
        cond_or_gss = self.shared_ada_lin(cond)
        for block in self.blocks:
            x = block(x=x, cond_BD=cond_or_gss, attn_bias=attn_bias)
        return self.head(self.head_nm(x, cond))

    @torch.no_grad()
    def generate(
        self, tokenizer: Tokenizer, labels: Tensor, *, cfg: float = 1.5, top_k: int = 1, top_p: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and the guided logits (B, L, V) they are sampled from, using cached keys and values."""
        B, L = len(labels), len(self.scales)
        cond = self.class_emb(torch.cat([labels, torch.full_like(labels, self.num_classes)]))
        positions = (self.lvl_embed(self.lvl_1L) + self.pos_1LC).split(self.scales, 1)
        x = cond[:, None] + self.pos_start + positions[0]
        f_hat = torch.zeros(B, tokenizer.code_dim, *2 * self.patch_nums[-1:])  # the tokenizer is in float32
        tokens, drawn_from = [], []
        for block in self.blocks:
            block.attn.kv_caching(True)
        for k in range(L):
            logits, t = self._logits(x, cond, None), cfg * k / (L - 1)
            drawn_from.append((1 + t) * logits[:B] - t * logits[B:])
            tokens.append(draw(drawn_from[-1], top_k, top_p))
            f_hat = f_hat + tokenizer.scale_features(k, tokenizer.embed(tokens[-1]))
            if k + 1 < L:
                rows = self.word_embed(tokenizer.next_input(k + 1, f_hat).to(x.dtype))
                x = (rows + positions[k + 1]).repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return torch.cat(tokens, 1), torch.cat(drawn_from, 1)


def draw(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sample (B, l, V) → (B, l) with top-k and top-p by sorting; 0 disables `top_k` or `top_p`."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p:
        ascending, order = logits.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])


def randomised(model: PlainVAR, seed: int = 0) -> PlainVAR:
    """Initialize with weights large enough that every branch and every bias contributes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "scale_mul" not in name and "pos_" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
            elif p.dim() == 1:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            elif "scale_mul" in name:
                p.copy_(torch.linspace(1.0, 5.0, p.numel()).view(p.shape))  # the last exceeds log 100
    return model.eval()
