"""Backward kernels of scale attention: queries, then keys and values, then the temperature (see triton.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.plan import plan
from mvar_kernels.ops.scale_attention.triton_parts import (
    LN_2,
    LOG2_E,
    MAX_LOG_TEMPERATURE,
    candidates,
    load_rows,
    load_spans,
    load_tile,
    operand,
    row_mask,
    row_offsets,
    score_factor,
    scores_of,
    shape_class,
    strides,
    through_norm,
    tile,
    unit_rows,
)

# The exponent of a weight that is not there: finite, as the temperature's gradient multiplies it by zero.
ABSENT = tl.constexpr(-1e30)


# By the padded head dimension. Of the side that is walked through, 32 rows a step: with 64 the norms' gradients spill
# on sm_80, and on sm_90 two blocks fit on a multiprocessor instead of three.
HALVES = {
    64: (tile(64, 32, 4, 2), tile(128, 32, 8, 2)),
    128: (tile(32, 32, 4, 2),),
    256: (tile(32, 32, 8, 1),),
}
KEY_HALVES = HALVES | {64: (tile(32, 64, 4, 2), tile(32, 128, 8, 2))}
SINGLE = {64: (tile(32, 32, 8, 1),), 128: (tile(16, 16, 4, 1),), 256: (tile(16, 16, 4, 1),)}


@triton.jit
def _through_keys(
    q,
    q_factor,
    factor,
    grad,
    lse,
    delta,
    dq,
    total,
    slope,
    drift,
    level,
    k_ptr,
    v_ptr,
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
    MASKED: tl.constexpr,
):
    """One block of keys: dq and the rows' sums of dS·x, of dS and of P·x, with it."""
    offs_n = start + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, stride_kl, hi, HEAD_DIM, BLOCK_D, MASKED)
    v = load_rows(v_ptr, offs_n, stride_vl, hi, HEAD_DIM, BLOCK_D, MASKED)
    k_rows = k
    if NORM:
        k_rows = unit_rows(k)  # at once: later it would keep k in registers until then
    scores = scores_of(q, k, NORM) * q_factor[:, None]  # [BLOCK_M, BLOCK_N]
    exponents = scores - lse[:, None]
    if MASKED:
        key_lo, key_hi = load_spans(spans_ptr, Lq, offs_m, mask_m)
        seen = (offs_n[None, :] >= key_lo[:, None]) & (offs_n[None, :] < key_hi[:, None])
        exponents = tl.where(seen, exponents, ABSENT)
    weights = tl.exp2(exponents)
    if NORM:
        level += tl.sum(weights * scores, 1)
    dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    dscores = weights * (dweights * factor - delta[:, None])
    if MASKED:
        dscores = tl.where((key_hi - key_lo == 1)[:, None], 0.0, dscores)
    if q.dtype == tl.float32:
        total += tl.sum(weights, 1)
    if NORM:
        slope += tl.sum(dscores * scores, 1)
        drift += tl.sum(dscores, 1)
    dq = tl.dot(dscores.to(k.dtype), k_rows, dq, input_precision="ieee")
    return dq, total, slope, drift, level


@triton.jit(do_not_specialize=["Lq"])
def _scale_attention_dq_kernel(
    grad_ptr,
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    log_temperature_ptr,
    dq_ptr,
    delta_ptr,
    partials_ptr,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H, B = tl.num_programs(1), tl.num_programs(2)
    row, rows, lo, _, full_hi, hi = load_tile(tiles_ptr)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row + rows
    offs_lse = (b * H + h) * Lq + offs_m
    offs_out = (b * Lq * H + h) * HEAD_DIM + row_offsets(offs_m, H * HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    mask_out = row_mask(mask_m, HEAD_DIM, BLOCK_D)

    grad = tl.load(grad_ptr + offs_out, mask=mask_out, other=0.0)
    out = tl.load(out_ptr + offs_out, mask=mask_out, other=0.0)
    factor = score_factor(scale, log_temperature_ptr, h, NORM)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1) * factor
    tl.store(delta_ptr + offs_lse, delta, mask=mask_m)
    lse = tl.load(lse_ptr + offs_lse, mask=mask_m, other=0.0) * LOG2_E
    q = load_rows(q_ptr, offs_m, stride_ql, row + rows, HEAD_DIM, BLOCK_D, True)
    q, q_factor = operand(q, factor * LOG2_E, NORM)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    drift = tl.zeros([BLOCK_M], tl.float32)
    level = tl.zeros([BLOCK_M], tl.float32)
    for start in range(lo, full_hi, BLOCK_N):
        dq, total, slope, drift, level = _through_keys(
            *(q, q_factor, factor, grad, lse, delta, dq, total, slope, drift, level, k_ptr, v_ptr, spans_ptr),
            *(stride_kl, stride_vl, start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, False),
        )
    for start in range(full_hi, hi, BLOCK_N):
        dq, total, slope, drift, level = _through_keys(
            *(q, q_factor, factor, grad, lse, delta, dq, total, slope, drift, level, k_ptr, v_ptr, spans_ptr),
            *(stride_kl, stride_vl, start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, True),
        )

    if q.dtype == tl.float32:
        total = tl.div_rn(1.0, tl.where(mask_m, total, 1.0))
        tl.store(delta_ptr + H.to(tl.int64) * B * Lq + offs_lse, total, mask=mask_m)
        dq *= total[:, None]
        slope, drift, level = slope * total, drift * total, level * total
    if NORM:
        part = (h * B + b) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partials_ptr + part, tl.sum(slope - drift * level, 0) * LN_2 / factor)
        # Loaded again, after a store, rather than kept in registers through the loops.
        dq = through_norm(dq, load_rows(q_ptr, offs_m, stride_ql, row + rows, HEAD_DIM, BLOCK_D, True))
    tl.store(dq_ptr + offs_out, dq.to(dq_ptr.dtype.element_ty), mask=mask_out)


@triton.jit
def _through_queries(
    k,
    k_rows,
    k_factor,
    factor,
    v,
    dk,
    dv,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    spans_ptr,
    stride_gl,
    stride_ql,
    stride_total,
    start,
    hi,
    offs_n,
    Lq,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of queries: dk and dv with it. All squares of scores are transposed, keys by queries."""
    offs_m = start + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, offs_m, stride_ql, hi, HEAD_DIM, BLOCK_D, MASKED)
    grad = load_rows(grad_ptr, offs_m, stride_gl, hi, HEAD_DIM, BLOCK_D, MASKED)
    if MASKED:
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < hi, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < hi, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m) * LOG2_E
        delta = tl.load(delta_ptr + offs_m)
    q_rows = q
    if NORM:
        q_rows = unit_rows(q)
    if q.dtype == tl.float32:
        # Transposed afterwards: to the last bit the scores that `total` was summed from.
        rows, _ = operand(q, factor * LOG2_E, NORM)
        scores = tl.trans(scores_of(rows, k, NORM))
    else:
        scores = scores_of(k_rows, q, NORM) * k_factor[:, None]
    exponents = scores - lse[None, :]  # [BLOCK_N, BLOCK_M]
    if MASKED:
        key_lo, key_hi = load_spans(spans_ptr, Lq, offs_m, offs_m < hi)
        seen = (offs_n[:, None] >= key_lo[None, :]) & (offs_n[:, None] < key_hi[None, :])
        exponents = tl.where(seen, exponents, ABSENT)
    weights = tl.exp2(exponents)
    if q.dtype == tl.float32:
        weights *= tl.load(delta_ptr + stride_total + offs_m, mask=offs_m < hi, other=0.0)[None, :]
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
    dweights = tl.dot(v, tl.trans(grad), input_precision="ieee")
    dscores = weights * (dweights * factor - delta[None, :])
    if MASKED:
        dscores = tl.where((key_hi - key_lo == 1)[None, :], 0.0, dscores)
    dk = tl.dot(dscores.to(q.dtype), q_rows, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["Lq", "L"])
def _scale_attention_dkdv_kernel(
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    log_temperature_ptr,
    dk_ptr,
    dv_ptr,
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
    L,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    row, rows, lo, full_lo, full_hi, hi = load_tile(tiles_ptr)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    grad_ptr += (b * Lq * H + h) * HEAD_DIM
    lse_ptr += (b * H + h) * Lq
    delta_ptr += (b * H + h) * Lq
    offs_n = row + tl.arange(0, BLOCK_N)
    stride_total = tl.num_programs(2).to(tl.int64) * H * Lq

    k = load_rows(k_ptr, offs_n, stride_kl, row + rows, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, offs_n, stride_vl, row + rows, HEAD_DIM, BLOCK_D, True)
    factor = score_factor(scale, log_temperature_ptr, h, NORM)
    k_rows, k_factor = operand(k, factor * LOG2_E, NORM)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(full_lo, full_hi, BLOCK_M):
        dk, dv = _through_queries(
            *(k, k_rows, k_factor, factor, v, dk, dv, grad_ptr, lse_ptr, delta_ptr, q_ptr, spans_ptr),
            *(H * HEAD_DIM, stride_ql, stride_total, start, hi, offs_n, Lq, HEAD_DIM, BLOCK_M, BLOCK_D, NORM, False),
        )
    # What needs a mask lies before and after: packed scales begin to be seen at different queries.
    before, after = full_lo - lo, hi - full_hi
    for i in range(0, before + after, BLOCK_M):
        start = tl.where(i < before, lo + i, full_hi + i - before)
        dk, dv = _through_queries(
            *(k, k_rows, k_factor, factor, v, dk, dv, grad_ptr, lse_ptr, delta_ptr, q_ptr, spans_ptr),
            *(H * HEAD_DIM, stride_ql, stride_total, start, hi, offs_n, Lq, HEAD_DIM, BLOCK_M, BLOCK_D, NORM, True),
        )

    offs_out = (b * L * H + h) * HEAD_DIM + row_offsets(offs_n, H * HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    mask_out = row_mask(offs_n < row + rows, HEAD_DIM, BLOCK_D)
    tl.store(dv_ptr + offs_out, dv.to(dv_ptr.dtype.element_ty), mask=mask_out)
    if NORM:
        # Loaded again, after a store, rather than kept in registers through the loops.
        dk = through_norm(dk, load_rows(k_ptr, offs_n, stride_kl, row + rows, HEAD_DIM, BLOCK_D, True))
    tl.store(dk_ptr + offs_out, dk.to(dk_ptr.dtype.element_ty), mask=mask_out)


@triton.jit(do_not_specialize=["count"])
def _scale_attention_dtemperature_kernel(partials_ptr, log_temperature_ptr, grad_ptr, count, BLOCK: tl.constexpr):
    """The second stage: a program adds one head's partial sums, in their order."""
    h = tl.program_id(0)
    partials_ptr += h.to(tl.int64) * count
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + offs, mask=offs < count, other=0.0)
    temperature = tl.load(log_temperature_ptr + h).to(tl.float32)
    grad = tl.where(temperature <= MAX_LOG_TEMPERATURE, tl.sum(sums, 0), 0.0)
    tl.store(grad_ptr + h, grad.to(grad_ptr.dtype.element_ty))


def backward(grad_out: Tensor, out: Tensor, lse: Tensor, call: Attention) -> list[Tensor]:
    """Gradients of q, k, v and, where given, log_temperature."""
    q, k, v, temperature, scales, causal, scale = call.readable()
    grad_out = grad_out.contiguous()
    B, Lq, H, D = q.shape
    L, device, shapes = k.shape[1], q.device, shape_class(q)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (q, k, v))
    delta = torch.empty((2, *lse.shape), dtype=torch.float32, device=device)
    sizes = {"HEAD_DIM": D, "BLOCK_D": tiling.product_block(D), "NORM": temperature is not None}

    chosen = tiling.chosen("scale_attention_dq", shapes, candidates(q, HALVES, SINGLE), device)
    made = plan(scales, Lq, causal, False, chosen.sizes["BLOCK_M"], chosen.sizes["BLOCK_N"], device)
    partials = torch.empty((H, B, len(made.tiles)), dtype=torch.float32, device=device)
    _scale_attention_dq_kernel[(len(made.tiles), H, B)](
        *(grad_out, out, lse, q, k, v, temperature, dq, delta, partials, made.tiles, made.spans),
        *(*strides(q, k, v), scale, Lq),
        **sizes,
        **chosen.arguments(),
    )

    chosen = tiling.chosen("scale_attention_dkdv", shapes, candidates(q, KEY_HALVES, SINGLE), device)
    made = plan(scales, Lq, causal, True, chosen.sizes["BLOCK_N"], chosen.sizes["BLOCK_M"], device)
    _scale_attention_dkdv_kernel[(len(made.tiles), H, B)](
        *(grad_out, lse, delta, q, k, v, temperature, dk, dv, made.tiles, made.spans),
        *(*strides(q, k, v), scale, Lq, L),
        **sizes,
        **chosen.arguments(),
    )
    if temperature is None:
        return [dq, dk, dv]
    dtemperature = torch.empty((H,), dtype=temperature.dtype, device=device)
    _scale_attention_dtemperature_kernel[(H,)](
        partials, temperature, dtemperature, partials.shape[1] * partials.shape[2], BLOCK=1024
    )
    return [dq, dk, dv, dtemperature]
