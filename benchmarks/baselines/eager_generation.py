"""M-VAR's public generation algorithm in eager PyTorch: the baseline of bench_generation.

At every scale each Mamba layer runs again over all coarser tokens and the modulation is computed again; LN,
modulation, gate and residual are separate passes; guidance comes after the head; tokens are sampled by topk, sort
and multinomial. It computes what OliverRensu/MVAR does (models/mvar.py, basic_mvar.py), in code of its own: Mamba-2 as
the chunked scan of the reference, attention as torch's, on a GPU its varlen attention in place of flash-attn.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar.models.blocks import MVARBlock
from mvar.models.layers import Attention, Mamba2
from mvar.models.tokenizer import Tokenizer
from mvar.models.transformer import Model
from mvar_kernels.ops.mamba2.reference import CHUNK, scan

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""q, k, v (B, l, H, D) of one scale, and the factor of the scores → (B, l, H, D)."""


def attend_batch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's varlen attention (torch 2.10 and later, on a GPU). ImportError where torch has none."""
    from torch.nn.attention.varlen import varlen_attn

    B, length, _, D = q.shape
    ends = _ends(B, length, q.device)
    q = q * (scale * D**0.5)  # its scale is 1/√D; at D = 64 and VAR's scale the factor is a power of two
    out = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, length, length)
    assert isinstance(out, Tensor)  # alone, as no auxiliary outputs were requested
    return out.view_as(q)


@cache
def _ends(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: Tokenizer,
    labels: Tensor,
    *,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    chunk: int = CHUNK,
    attend: Attend = attend_batch,
    run_block: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, R, R) in [0, 1] and tokens (B, L), sampled with torch's global generator.

    chunk: of the scan. run_block: :func:`block`, compiled.
    """
    run_block = run_block or block
    config, B = model.config, len(labels)
    both = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    cond = model.class_emb(both)
    positions = model.positions()
    x = model.start(cond) + positions[:, : config.scales[0]]
    caches: list[Tensor | None] = [None] * config.depth
    f_hat = torch.zeros(B, config.code_dim, *2 * config.patch_nums[-1:], device=labels.device)
    tokens, end = [], 0
    for k, length in enumerate(config.scales):
        end += length
        for i, layers in enumerate(model.typed_blocks()):
            assert isinstance(layers, MVARBlock)
            x, caches[i] = run_block(layers, x, cond, caches[i], attend, chunk)
        scale, shift = model.head_nm.ada_lin(cond)[:, None].chunk(2, -1)
        logits = model.head(norm(x) * (1 + scale) + shift).float()
        c = cfg * k / (len(config.scales) - 1)
        tokens.append(sample((1 + c) * logits[:B] - c * logits[B:], top_k, top_p))
        f_hat = f_hat + tokenizer.scale_features(k, tokenizer.embed(tokens[-1]))
        if k + 1 < len(config.scales):
            rows = model.word_embed(tokenizer.next_input(k + 1, f_hat))
            x = (rows + positions[:, end : end + config.scales[k + 1]]).repeat(2, 1, 1)
    return (tokenizer.decode_features(f_hat) + 1) / 2, torch.cat(tokens, 1)


def sample(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Top-k and top-p filters by sorting, then multinomial: (B, l, V) → (B, l)."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def block(
    layers: MVARBlock, x: Tensor, cond: Tensor, cache: Tensor | None, attend: Attend, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """One block over a scale's tokens. Its Mamba layer also runs over those of the coarser scales, which are in
    `cache`; returned with the new ones."""
    g1, g2, g3, s1, s2, s3, t1, t2, t3 = layers.ada_lin(cond)[:, None].chunk(9, -1)
    x = x + g1 * _attention(layers.attn, norm(x) * (1 + s1) + t1, attend)
    cache = x if cache is None else torch.cat([cache, x], 1)
    x = x + (g2 * mamba(layers.mamba, norm(cache) * (1 + s2) + t2, chunk=chunk))[:, -x.shape[1] :]
    return x + g3 * layers.ffn(norm(x) * (1 + s3) + t3), cache


def _attention(attn: Attention, x: Tensor, attend: Attend) -> Tensor:
    bias = torch.cat([attn.q_bias, attn.zero_k_bias, attn.v_bias])
    q, k, v = attn.mat_qkv(x, bias).unflatten(-1, (3, attn.heads, -1)).unbind(2)  # (B, l, H, D)
    return attn.proj(attend(q, k, v, 0.25 * q.shape[-1] ** -0.5).flatten(2))


def convolve(xbc: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, L, channels), causal, depth-wise: weight (channels, 1, taps)."""
    channels, _, taps = weight.shape
    out = F.conv1d(xbc.transpose(1, 2).contiguous(), weight, bias, padding=taps - 1, groups=channels)
    return out[..., : xbc.shape[1]].transpose(1, 2)


def mamba(
    mamba: Mamba2,
    x: Tensor,
    convolve: Callable[[Tensor, Tensor, Tensor], Tensor] = convolve,
    chunk: int = CHUNK,
) -> Tensor:
    """A Mamba-2 layer without a carried state: (B, L, C) → (B, L, C)."""
    E, H = mamba.norm.weight.shape[0], mamba.D.shape[0]
    N = (mamba.conv1d.weight.shape[0] - E) // 2
    z, xbc, dt = mamba.in_proj(x).split([E, E + 2 * N, H], -1)
    assert mamba.conv1d.bias is not None
    convolved = F.silu(convolve(xbc, mamba.conv1d.weight, mamba.conv1d.bias))
    inner, B, C = convolved.float().split([E, N, N], -1)
    heads = inner.unflatten(-1, (H, E // H))
    with torch.autocast(x.device.type, enabled=False):
        y, _ = scan(heads, F.softplus(dt.float() + mamba.dt_bias), -mamba.A_log.exp(), B, C, None, chunk=chunk)
    gated = (y + mamba.D[:, None] * heads).flatten(2) * F.silu(z.float())
    return mamba.out_proj(F.rms_norm(gated, (E,), mamba.norm.weight, eps=1e-5))
