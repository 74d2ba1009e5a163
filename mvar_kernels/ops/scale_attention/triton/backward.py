"""Backward kernels of scale attention: queries, then keys and values, then the temperature (see the package)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.plan import plan
from mvar_kernels.ops.scale_attention.triton.common import (
    ABSENT,
    LEAST_FACTOR,
    LOWEST,
    MAX_LOG_TEMPERATURE,
    candidates,
    exponents_of,
    inverse_norm,
    load_keys,
    load_rows,
    load_spans,
    load_tile,
    next_weights,
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
    where_seen,
)
from mvar_kernels.triton_math import LN_2, LOG2_E, exp2

# By the padded head dimension. Of the side that is walked through, 32 rows a step: with norms these take all 255
# registers on sm_80, and 174 to 200 on sm_90 (docs/generated/compiled_kernels.md).
HALVES = {
    64: (tile(64, 32, 8, 2), tile(128, 32, 8, 2)),
    128: (tile(32, 32, 4, 2),),
    256: (tile(32, 32, 8, 1),),
}
KEY_HALVES = HALVES | {64: (tile(32, 64, 4, 2), tile(32, 128, 8, 2))}
SINGLE = {64: (tile(32, 32, 8, 1),), 128: (tile(16, 16, 4, 1),), 256: (tile(16, 16, 4, 1),)}


@triton.jit
def _sum_weights(
    q,
    q_factor,
    grad,
    peak,
    total,
    product,
    largest,
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
    """One block of keys: the rows' largest score, sums of weights and of weights times dO·v, and largest |dO·v|."""
    k, v, offs_n = load_keys(k_ptr, v_ptr, stride_kl, stride_vl, start, hi, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    scores = scores_of(q, k, NORM)  # [BLOCK_M, BLOCK_N]
    scores = where_seen(scores, float("-inf"), spans_ptr, Lq, offs_m, mask_m, offs_n, MASKED)
    weights, shrink, new_peak = next_weights(scores, peak, q_factor, q.dtype == tl.float32)
    dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    total = total * shrink + tl.sum(weights, 1)
    product = product * shrink + tl.sum(weights * dweights, 1)
    largest = tl.maximum(largest, tl.max(tl.abs(dweights), 1))
    return new_peak, total, product, largest


@triton.jit
def add_product(x, y, acc):
    """acc + x y with x in float32 to its last bits: the rows of dS add up to 0, and what all keys have in common must
    cancel in dq. A product on 16-bit tensor cores takes x as a sum of as many parts as hold 22 bits of it."""
    part = x.to(y.dtype)
    acc = tl.dot(part, y, acc, input_precision="ieee")
    if y.dtype != tl.float32:
        x -= part.to(tl.float32)
        part = x.to(y.dtype)
        acc = tl.dot(part, y, acc)
    if y.dtype == tl.bfloat16:
        x -= part.to(tl.float32)
        acc = tl.dot(x.to(y.dtype), y, acc)
    return acc


@triton.jit
def _through_keys(
    q,
    q_factor,
    grad,
    peak,
    delta,
    ds_factor,
    dq,
    slope,
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
    """One block of keys: dq and the rows' sums of dS times the exponent, with it."""
    k, v, offs_n = load_keys(k_ptr, v_ptr, stride_kl, stride_vl, start, hi, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    k_rows = k
    if NORM:
        k_rows = unit_rows(k)  # at once: later it would keep k in registers until then
    exponents = exponents_of(scores_of(q, k, NORM), peak[:, None], q_factor[:, None])  # [BLOCK_M, BLOCK_N]
    exponents = where_seen(exponents, ABSENT, spans_ptr, Lq, offs_m, mask_m, offs_n, MASKED)
    dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    changes = exp2(exponents, q.dtype == tl.float32) * (dweights - delta[:, None])
    if NORM:
        slope += tl.sum(changes * exponents, 1)
    dq = add_product(changes * ds_factor[:, None], k_rows, dq)
    return dq, slope


@triton.jit(do_not_specialize=["Lq"])
def _scale_attention_dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    log_temperature_ptr,
    dq_ptr,
    rows_ptr,
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
    offs_rows = (b * H + h) * Lq + offs_m
    offs_out = (b * Lq * H + h) * HEAD_DIM + row_offsets(offs_m, H * HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    mask_out = row_mask(mask_m, HEAD_DIM, BLOCK_D)

    grad = tl.load(grad_ptr + offs_out, mask=mask_out, other=0.0)
    factor = score_factor(scale, log_temperature_ptr, h, NORM)
    q = load_rows(q_ptr, offs_m, stride_ql, row + rows, HEAD_DIM, BLOCK_D, True)
    q, q_factor = operand(q, factor, NORM)

    sum_factor = tl.maximum(q_factor, LEAST_FACTOR)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    product = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.zeros([BLOCK_M], tl.float32)
    for start in range(lo, full_hi, BLOCK_N):
        peak, total, product, largest = _sum_weights(
            *(q, sum_factor, grad, peak, total, product, largest, k_ptr, v_ptr, spans_ptr, stride_kl, stride_vl),
            *(start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, False),
        )
    for start in range(full_hi, hi, BLOCK_N):
        peak, total, product, largest = _sum_weights(
            *(q, sum_factor, grad, peak, total, product, largest, k_ptr, v_ptr, spans_ptr, stride_kl, stride_vl),
            *(start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, True),
        )
    total = tl.where(mask_m, total, 1.0)
    inverse, delta = tl.div_rn(1.0, total), tl.div_rn(product, total)
    kind = H.to(tl.int64) * B * Lq  # from one of a row's numbers to the next
    tl.store(rows_ptr + offs_rows, peak, mask=mask_m)
    tl.store(rows_ptr + kind + offs_rows, inverse, mask=mask_m)
    tl.store(rows_ptr + 2 * kind + offs_rows, delta, mask=mask_m)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    # With it |dS| is at most 2, so that neither it nor its last part leaves float16's range.
    ds_factor = tl.div_rn(1.0, tl.maximum(largest, 1e-30))
    for start in range(lo, full_hi, BLOCK_N):
        dq, slope = _through_keys(
            *(q, q_factor, grad, peak, delta, ds_factor, dq, slope, k_ptr, v_ptr, spans_ptr),
            *(stride_kl, stride_vl, start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, False),
        )
    for start in range(full_hi, hi, BLOCK_N):
        dq, slope = _through_keys(
            *(q, q_factor, grad, peak, delta, ds_factor, dq, slope, k_ptr, v_ptr, spans_ptr),
            *(stride_kl, stride_vl, start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, True),
        )

    dq *= (tl.maximum(largest, 1e-30) * inverse * factor)[:, None]
    if NORM:
        part = (h * B + b) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partials_ptr + part, tl.sum(tl.where(mask_m, slope * inverse, 0.0), 0) * LN_2)
        # Loaded again, after a store, rather than kept in registers through the loops.
        dq = through_norm(dq, load_rows(q_ptr, offs_m, stride_ql, row + rows, HEAD_DIM, BLOCK_D, True))
    tl.store(dq_ptr + offs_out, dq.to(dq_ptr.dtype.element_ty), mask=mask_out)


@triton.jit
def _through_queries(
    k,
    k_inverse,
    factor,
    v,
    dk,
    dv,
    grad_ptr,
    rows_ptr,
    q_ptr,
    spans_ptr,
    stride_gl,
    stride_ql,
    kind,
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
        peak = tl.load(rows_ptr + offs_m, mask=offs_m < hi, other=0.0)
        inverse = tl.load(rows_ptr + kind + offs_m, mask=offs_m < hi, other=0.0)
        delta = tl.load(rows_ptr + 2 * kind + offs_m, mask=offs_m < hi, other=0.0)
    else:
        peak = tl.load(rows_ptr + offs_m)
        inverse = tl.load(rows_ptr + kind + offs_m)
        delta = tl.load(rows_ptr + 2 * kind + offs_m)
    q_rows = q
    if NORM:
        q_rows = unit_rows(q)
    if q.dtype == tl.bfloat16:
        # Tensor cores add in the order of the columns, whichever operand is the left one.
        q_factor = tl.full([q.shape[0]], factor * LOG2_E, tl.float32)
        scores = tl.dot(k, tl.trans(q))
        if NORM:
            q_factor *= inverse_norm(q)
            scores *= k_inverse[:, None]
        dweights = tl.dot(v, tl.trans(grad))
    else:
        # Transposed afterwards: to the last bit those that `peak` and δ are from. At 1e10 rounding is hundreds.
        rows, q_factor = operand(q, factor, NORM)
        scores = tl.trans(scores_of(rows, k, NORM))
        dweights = tl.trans(tl.dot(grad, tl.trans(v), input_precision="ieee"))
    exponents = exponents_of(scores, peak[None, :], q_factor[None, :])  # [BLOCK_N, BLOCK_M]
    if MASKED:
        key_lo, key_hi = load_spans(spans_ptr, Lq, offs_m, offs_m < hi)
        seen = (offs_n[:, None] >= key_lo[None, :]) & (offs_n[:, None] < key_hi[None, :])
        exponents = tl.where(seen, exponents, ABSENT)
    weights = exp2(exponents, q.dtype == tl.float32) * inverse[None, :]
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
    dscores = weights * (dweights - delta[None, :]) * factor
    dk = tl.dot(dscores.to(q.dtype), q_rows, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["Lq", "L"])
def _scale_attention_dkdv_kernel(
    grad_ptr,
    rows_ptr,
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
    rows_ptr += (b * H + h) * Lq
    offs_n = row + tl.arange(0, BLOCK_N)
    kind = tl.num_programs(2).to(tl.int64) * H * Lq

    k = load_rows(k_ptr, offs_n, stride_kl, row + rows, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, offs_n, stride_vl, row + rows, HEAD_DIM, BLOCK_D, True)
    factor = score_factor(scale, log_temperature_ptr, h, NORM)
    k_inverse = inverse_norm(k)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(full_lo, full_hi, BLOCK_M):
        dk, dv = _through_queries(
            *(k, k_inverse, factor, v, dk, dv, grad_ptr, rows_ptr, q_ptr, spans_ptr, H * HEAD_DIM, stride_ql, kind),
            *(start, hi, offs_n, Lq, HEAD_DIM, BLOCK_M, BLOCK_D, NORM, False),
        )
    # What needs a mask lies before and after: packed scales begin to be seen at different queries.
    before, after = full_lo - lo, hi - full_hi
    for i in range(0, before + after, BLOCK_M):
        start = tl.where(i < before, lo + i, full_hi + i - before)
        dk, dv = _through_queries(
            *(k, k_inverse, factor, v, dk, dv, grad_ptr, rows_ptr, q_ptr, spans_ptr, H * HEAD_DIM, stride_ql, kind),
            *(start, hi, offs_n, Lq, HEAD_DIM, BLOCK_M, BLOCK_D, NORM, True),
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


def backward(grads: Sequence[Tensor], call: Attention) -> list[Tensor]:
    """Gradients of q, k, v and, where given, log_temperature."""
    q, k, v, temperature, scales, causal, scale = call.readable()
    grad_out = grads[0].contiguous()
    B, Lq, H, D = q.shape
    L, device, shapes = k.shape[1], q.device, shape_class(q)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (q, k, v))
    rows = torch.empty((3, B, H, Lq), dtype=torch.float32, device=device)  # of each query: m, 1/l, δ
    sizes = {"HEAD_DIM": D, "BLOCK_D": tiling.dot_block(D), "NORM": temperature is not None}

    chosen = tiling.chosen("scale_attention_dq", shapes, candidates(q, HALVES, SINGLE), device)
    made = plan(scales, Lq, causal, False, chosen.sizes["BLOCK_M"], chosen.sizes["BLOCK_N"], device)
    partials = torch.empty((H, B, len(made.tiles)), dtype=torch.float32, device=device)
    _scale_attention_dq_kernel[(len(made.tiles), H, B)](
        *(grad_out, q, k, v, temperature, dq, rows, partials, made.tiles, made.spans),
        *(*strides(q, k, v), scale, Lq),
        **sizes,
        **chosen.arguments(),
    )

    chosen = tiling.chosen("scale_attention_dkdv", shapes, candidates(q, KEY_HALVES, SINGLE), device)
    made = plan(scales, Lq, causal, True, chosen.sizes["BLOCK_N"], chosen.sizes["BLOCK_M"], device)
    _scale_attention_dkdv_kernel[(len(made.tiles), H, B)](
        *(grad_out, rows, q, k, v, temperature, dk, dv, made.tiles, made.spans),
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
