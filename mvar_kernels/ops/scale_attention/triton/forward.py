"""Forward kernel of scale attention: online softmax over a tile of queries (see the package)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.plan import plan
from mvar_kernels.ops.scale_attention.triton.common import (
    LEAST_FACTOR,
    LOWEST,
    candidates,
    key_head,
    load_tile,
    next_weights,
    operand,
    row_mask,
    row_offsets,
    score_factor,
    scores_of,
    seen_blocks,
    shape_class,
    strides,
    tile,
    where_seen,
)
from mvar_kernels.ops.scale_attention.triton.rotary import load_keys, load_multiplied
from mvar_kernels.triton_math import LN_2, divide

# By the padded head dimension. 64 rows waste least on 100 and 169 tokens, and of blocks of 4 warps a multiprocessor of
# sm_90 holds four (126 registers), with norms three (158; docs/generated/compiled_kernels.md): with one to four blocks
# of keys a program, its beginning and end are hidden by the others'.
HALVES = {
    64: (tile(64, 64, 4, 2), tile(64, 64, 4, 3), tile(128, 64, 8, 2)),
    128: (tile(64, 32, 4, 2), tile(64, 64, 4, 2)),
    256: (tile(32, 32, 8, 1), tile(64, 32, 4, 1)),
}
# Exact float32 products are made of ordinary multiplications, whose operands fill the registers.
SINGLE = {64: (tile(64, 32, 8, 1), tile(32, 32, 4, 1)), 128: (tile(32, 16, 8, 1),), 256: (tile(16, 16, 4, 1),)}


@triton.jit
def _attend(
    q,
    q_factor,
    share,
    acc,
    total,
    peak,
    k_ptr,
    v_ptr,
    rotary,
    spans_ptr,
    stride_kl,
    stride_vl,
    start,
    hi,
    offs_m,
    mask_m,
    Lq,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys: (acc, total, peak) with it, sums of weights times v, of weights, and the largest score."""
    k, v, offs_n = load_keys(
        *(k_ptr, v_ptr, rotary, stride_kl, stride_vl, start, hi, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, ANGLES, INTERLEAVED),
        MASKED,
    )
    scores = scores_of(q, k, NORM and not ANGLES)  # [BLOCK_M, BLOCK_N]
    scores = where_seen(scores, float("-inf"), spans_ptr, Lq, offs_m, mask_m, offs_n, hi, MASKED)
    weights, shrink, new_peak = next_weights(scores, peak, q_factor, q.dtype == tl.float32)
    if v.dtype != tl.float16:
        weights *= share
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit(do_not_specialize=["Lq", "skipped"])
def _scale_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    log_temperature_ptr,
    cos_ptr,
    sin_ptr,
    key_lengths_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    spans_ptr,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    scale,
    Lq,
    skipped,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    row, rows, lo, _, full_hi, hi = load_tile(tiles_ptr)
    full_hi, hi = seen_blocks(lo, full_hi, hi, key_lengths_ptr, b, BLOCK_N)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + key_head(h, GROUP) * stride_kh
    v_ptr += b * stride_vb + key_head(h, GROUP) * stride_vh
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row + rows
    rotary = cos_ptr, sin_ptr

    q = load_multiplied(
        *(q_ptr, rotary, skipped, offs_m, stride_ql, row + rows, HEAD_DIM, BLOCK_D, NORM, ANGLES, INTERLEAVED, True),
    )
    q, q_factor = operand(q, score_factor(scale, log_temperature_ptr, h, NORM), NORM and not ANGLES)
    q_factor = tl.maximum(q_factor, LEAST_FACTOR)

    # With it weights of all keys add up to at most 1, and sums stay in the range of the values: up to 3e38, but in
    # float16, where smaller weights would be rounded away. A power of 2, it rounds nothing itself.
    share = 1.0
    if v_ptr.dtype.element_ty != tl.float16:
        share = tl.exp2(-tl.ceil(tl.log2((hi - lo).to(tl.float32))))
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    # Queries' whole blocks come first: where a tile has any, its rows see the same keys from lo on.
    for start in range(lo, full_hi, BLOCK_N):
        acc, total, peak = _attend(
            *(q, q_factor, share, acc, total, peak, k_ptr, v_ptr, rotary, spans_ptr, stride_kl, stride_vl),
            *(start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, ANGLES, INTERLEAVED, False),
        )
    for start in range(full_hi, hi, BLOCK_N):
        acc, total, peak = _attend(
            *(q, q_factor, share, acc, total, peak, k_ptr, v_ptr, rotary, spans_ptr, stride_kl, stride_vl),
            *(start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, ANGLES, INTERLEAVED, True),
        )

    out_ptrs = out_ptr + (b * Lq * H + h) * HEAD_DIM + row_offsets(offs_m, H * HEAD_DIM, BLOCK_D)
    out = divide(acc, total[:, None], q.dtype == tl.float32).to(out_ptr.dtype.element_ty)
    if key_lengths_ptr is not None:
        out = tl.where(hi > lo, out, 0.0)
    tl.store(out_ptrs, out, mask=row_mask(mask_m, HEAD_DIM, BLOCK_D))
    tl.store(lse_ptr + (b * H + h) * Lq + offs_m, (peak * q_factor + tl.log2(total / share)) * LN_2, mask=mask_m)


def forward(call: Attention) -> tuple[Tensor, Tensor]:
    """The output and the log of each row's sum of exponentials, as the reference's."""
    q, k, v, temperature, _, causal, scale, cos, sin, interleaved, key_lengths = call.readable()
    B, Lq, H, D = q.shape
    out = torch.empty((B, Lq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Lq), dtype=torch.float32, device=q.device)
    chosen = tiling.chosen("scale_attention_fwd", shape_class(q, cos), candidates(q, HALVES, SINGLE), q.device)
    made = plan(call.lengths(), Lq, causal, False, chosen.sizes["BLOCK_M"], chosen.sizes["BLOCK_N"], q.device)
    _scale_attention_fwd_kernel[(len(made.tiles), H, B)](
        *(q, k, v, temperature, cos, sin, key_lengths, out, lse, made.tiles),
        made.spans if key_lengths is None else None,
        *strides(q, k, v),
        *(scale, Lq, None if cos is None else k.shape[1] - Lq),
        HEAD_DIM=D,
        BLOCK_D=tiling.dot_block(D),
        NORM=temperature is not None,
        ANGLES=0 if cos is None else cos.shape[1],
        INTERLEAVED=interleaved,
        GROUP=H // k.shape[2],
        **chosen.arguments(),
    )
    return out, lse
