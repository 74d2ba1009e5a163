"""What the backward kernels of scale attention do with one tile of queries or keys (see the package)."""

import triton
import triton.language as tl

from mvar_kernels.ops.scale_attention.triton.common import (
    ABSENT,
    LEAST_FACTOR,
    LOWEST,
    exponents_of,
    inverse_norm,
    load_rows,
    load_spans,
    operand,
    row_mask,
    row_offsets,
    score_factor,
    scores_of,
    through_norm,
    unit_rows,
    where_seen,
)
from mvar_kernels.ops.scale_attention.triton.rotary import (
    load_keys,
    load_multiplied,
    load_pairs,
    rotate_back,
    store_pairs,
)
from mvar_kernels.triton_math import LN_2, LOG2_E, exp2


@triton.jit
def _by_lane(x, LANES: tl.constexpr):
    """[M, N] as [M, N/8, 4, 2] for 4 lanes, or [M, 1, 1, N] for 1: sums over the second and fourth axes are to come.

    In a tensor core's result a thread has the columns 8i + 2j and 8i + 2j + 1 of a row for one j: with 4 lanes these
    sums exchange nothing between threads, and what is left, [M, 4], is added once a tile.
    """
    COLUMNS: tl.constexpr = x.shape[1] if LANES == 1 else 2
    return tl.reshape(x, [x.shape[0], x.shape[1] // (LANES * COLUMNS), LANES, COLUMNS])


@triton.jit
def _sum_by_lane(x, LANES: tl.constexpr):
    return tl.sum(tl.sum(_by_lane(x, LANES), 3), 1)  # [M, LANES]


@triton.jit
def _max_by_lane(x, LANES: tl.constexpr):
    return tl.max(tl.max(_by_lane(x, LANES), 3), 1)  # [M, LANES]


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
    LANES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys: the lanes' largest score, sums of weights and of weights times dO·v, and largest |dO·v|."""
    k, v, offs_n = load_keys(
        *(k_ptr, v_ptr, rotary, stride_kl, stride_vl, start, hi, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, ANGLES, INTERLEAVED),
        MASKED,
    )
    scores = scores_of(q, k, NORM and not ANGLES)  # [BLOCK_M, BLOCK_N]
    scores = where_seen(scores, float("-inf"), spans_ptr, Lq, offs_m, mask_m, offs_n, hi, MASKED)
    dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    new_peak = tl.maximum(peak, _max_by_lane(scores, LANES))
    exponents = exponents_of(_by_lane(scores, LANES), new_peak[:, None, :, None], q_factor[:, None, None, None])
    weights = exp2(exponents, q.dtype == tl.float32)
    shrink = exp2(exponents_of(peak, new_peak, q_factor[:, None]), q.dtype == tl.float32)
    total = total * shrink + tl.sum(tl.sum(weights, 3), 1)
    product = product * shrink + tl.sum(tl.sum(weights * _by_lane(dweights, LANES), 3), 1)
    if q.dtype == tl.float16:
        largest = tl.maximum(largest, _max_by_lane(tl.abs(dweights), LANES))
    return new_peak, total, product, largest


@triton.jit
def _without_last_bits(x, BITS: tl.constexpr, ADDED: tl.constexpr):
    """x with its last BITS bits 0, after adding ADDED to them: half of what they hold rounds."""
    return ((x.to(tl.int32, bitcast=True) + ADDED) & (-1 << BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _add_product(x, y, acc):
    """acc + x y with x in float32 to its last bits: the rows of dS add up to 0, and what all keys have in common must
    cancel in dq. A product on 16-bit tensor cores takes x as a sum of parts: three of bfloat16's 8 bits are all of it;
    of two of float16's 11 bits, the first is rounded, so that they hold 23. Bits are cut off as integers: rounded to
    16 bits and back, each element took a conversion of its own (F2F), where F2FP converts two (Triton 3.7.1)."""
    if y.dtype == tl.bfloat16:
        part = _without_last_bits(x, 16, 0)
        acc = tl.dot(part.to(y.dtype), y, acc)
        x -= part
        part = _without_last_bits(x, 16, 0)
        acc = tl.dot(part.to(y.dtype), y, acc)
        x -= part
    elif y.dtype == tl.float16:
        part = _without_last_bits(x, 13, 1 << 12)
        acc = tl.dot(part.to(y.dtype), y, acc)
        x -= part
    return tl.dot(x.to(y.dtype), y, acc, input_precision="ieee")


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
    LANES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys: dq and the lanes' sums of dS times the exponent, with it."""
    k, v, offs_n = load_keys(
        *(k_ptr, v_ptr, rotary, stride_kl, stride_vl, start, hi, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, ANGLES, INTERLEAVED),
        MASKED,
    )
    k_rows = k
    if NORM and not ANGLES:
        k_rows = unit_rows(k)  # at once: later it would keep k in registers until then
    exponents = exponents_of(
        scores_of(q, k, NORM and not ANGLES), peak[:, None], q_factor[:, None]
    )  # [BLOCK_M, BLOCK_N]
    exponents = where_seen(exponents, ABSENT, spans_ptr, Lq, offs_m, mask_m, offs_n, hi, MASKED)
    dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    dscores = exp2(exponents, q.dtype == tl.float32) * (dweights - delta[:, None]) * ds_factor[:, None]
    if NORM:
        slope += _sum_by_lane(dscores * exponents, LANES)
    dq = _add_product(dscores, k_rows, dq)
    return dq, slope


@triton.jit
def query_tile(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    rows_ptr,
    rotary,
    spans_ptr,
    stride_ql,
    stride_kl,
    stride_vl,
    stride_out,
    kind,
    factor,
    row,
    end,
    lo,
    full_hi,
    hi,
    Lq,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_N: tl.constexpr,
):
    """Queries [row, end), at most BLOCK_M of a head: stores m, 1/l, δ and dq, and returns its part of dτ."""
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    offs_out = row_offsets(offs_m, stride_out, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    mask_out = row_mask(mask_m, HEAD_DIM, BLOCK_D)

    grad = tl.load(grad_ptr + offs_out, mask=mask_out, other=0.0)
    q = load_multiplied(
        *(q_ptr, rotary, rotary[2], offs_m, stride_ql, end, HEAD_DIM, BLOCK_D, NORM, ANGLES, INTERLEAVED, True),
    )
    q, q_factor = operand(q, factor, NORM and not ANGLES)

    sum_factor = tl.maximum(q_factor, LEAST_FACTOR)
    peak = tl.full([BLOCK_M, LANES], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M, LANES], tl.float32)
    product = tl.zeros([BLOCK_M, LANES], tl.float32)
    largest = tl.zeros([BLOCK_M, LANES], tl.float32)
    sums_hi = lo + (full_hi - lo) // BLOCK_N * BLOCK_N
    for start in range(lo, sums_hi, BLOCK_N):
        peak, total, product, largest = _sum_weights(
            *(q, sum_factor, grad, peak, total, product, largest, k_ptr, v_ptr, rotary, spans_ptr, stride_kl),
            *(stride_vl, start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, ANGLES, INTERLEAVED, LANES),
            False,
        )
    for start in range(sums_hi, hi, BLOCK_N):
        peak, total, product, largest = _sum_weights(
            *(q, sum_factor, grad, peak, total, product, largest, k_ptr, v_ptr, rotary, spans_ptr, stride_kl),
            *(stride_vl, start, hi, offs_m, mask_m, Lq, HEAD_DIM, BLOCK_N, BLOCK_D, NORM, ANGLES, INTERLEAVED, LANES),
            True,
        )
    row_peak = tl.max(peak, 1)
    shrink = exp2(exponents_of(peak, row_peak[:, None], sum_factor[:, None]), q.dtype == tl.float32)
    total = tl.where(mask_m, tl.sum(total * shrink, 1), 1.0)
    if spans_ptr is None:
        total = tl.where(hi > lo, total, 1.0)  # no keys
    inverse, delta = tl.div_rn(1.0, total), tl.div_rn(tl.sum(product * shrink, 1), total)
    tl.store(rows_ptr + offs_m, row_peak, mask=mask_m)
    tl.store(rows_ptr + kind + offs_m, inverse, mask=mask_m)
    tl.store(rows_ptr + 2 * kind + offs_m, delta, mask=mask_m)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slope = tl.zeros([BLOCK_M, LANES], tl.float32)
    ds_factor, undo = inverse, tl.full([BLOCK_M], 1.0, tl.float32)
    if q.dtype == tl.float16:
        # With it |dS| is at most 2, so that neither it nor its last part leaves the range.
        bound = tl.maximum(tl.max(largest, 1), 1e-30)
        ds_factor, undo = tl.div_rn(1.0, bound), bound * inverse
    for start in range(lo, full_hi, STEP_N):
        dq, slope = _through_keys(
            *(q, q_factor, grad, row_peak, delta, ds_factor, dq, slope, k_ptr, v_ptr, rotary, spans_ptr),
            *(stride_kl, stride_vl, start, hi, offs_m, mask_m, Lq, HEAD_DIM, STEP_N, BLOCK_D, NORM, ANGLES),
            INTERLEAVED,
            *(LANES, False),
        )
    for start in range(full_hi, hi, STEP_N):
        dq, slope = _through_keys(
            *(q, q_factor, grad, row_peak, delta, ds_factor, dq, slope, k_ptr, v_ptr, rotary, spans_ptr),
            *(stride_kl, stride_vl, start, hi, offs_m, mask_m, Lq, HEAD_DIM, STEP_N, BLOCK_D, NORM, ANGLES),
            INTERLEAVED,
            *(LANES, True),
        )

    dq *= (undo * factor)[:, None]
    part = 0.0
    if ANGLES:
        dq = rotate_back(dq, rotary, rotary[2], offs_m, end, HEAD_DIM, BLOCK_D, ANGLES, INTERLEAVED)
    if NORM:
        part = tl.sum(tl.where(mask_m, tl.sum(slope, 1) * undo, 0.0), 0) * LN_2
        # Loaded again, after a store, rather than kept in registers through the loops.
        if ANGLES:
            dq = through_norm(dq, load_pairs(q_ptr, offs_m, stride_ql, end, HEAD_DIM, BLOCK_D, INTERLEAVED, True))
        else:
            dq = through_norm(dq, load_rows(q_ptr, offs_m, stride_ql, end, HEAD_DIM, BLOCK_D, True))
    if ANGLES and not INTERLEAVED:
        store_pairs(dq_ptr, dq, offs_m, stride_out, mask_m, HEAD_DIM, BLOCK_D)
    else:
        tl.store(dq_ptr + offs_out, dq.to(dq_ptr.dtype.element_ty), mask=mask_out)
    return part


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
    rotary,
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
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of queries: dk and dv with it. All squares of scores are transposed, keys by queries."""
    offs_m = start + tl.arange(0, BLOCK_M)
    q = load_multiplied(
        *(q_ptr, rotary, rotary[2], offs_m, stride_ql, hi, HEAD_DIM, BLOCK_D, NORM, ANGLES, INTERLEAVED, MASKED),
    )
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
    if NORM and not ANGLES:
        q_rows = unit_rows(q)
    if q.dtype == tl.bfloat16:
        # Tensor cores add in the order of the columns, whichever operand is the left one.
        q_factor = tl.full([q.shape[0]], factor * LOG2_E, tl.float32)
        scores = tl.dot(k, tl.trans(q))
        if NORM and not ANGLES:
            q_factor *= inverse_norm(q)
            scores *= k_inverse[:, None]
        dweights = tl.dot(v, tl.trans(grad))
    else:
        # Transposed afterwards: to the last bit those that `peak` and δ are from. At 1e10 rounding is hundreds.
        rows, q_factor = operand(q, factor, NORM and not ANGLES)
        scores = tl.trans(scores_of(rows, k, NORM and not ANGLES))
        dweights = tl.trans(tl.dot(grad, tl.trans(v), input_precision="ieee"))
    exponents = exponents_of(scores, peak[None, :], q_factor[None, :])  # [BLOCK_N, BLOCK_M]
    if MASKED:
        key_lo, key_hi = load_spans(spans_ptr, Lq, offs_m, offs_m < hi)
        seen = (offs_n[:, None] >= key_lo[None, :]) & (offs_n[:, None] < key_hi[None, :])
        exponents = tl.where(seen, exponents, ABSENT)
    weights = exp2(exponents, q.dtype == tl.float32) * inverse[None, :]
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
    dscores = weights * (dweights - delta[None, :])
    if q.dtype == tl.float16 or GROUP > 1:
        dscores *= factor
    dk = tl.dot(dscores.to(q.dtype), q_rows, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _through_head(
    k,
    k_inverse,
    factor,
    v,
    dk,
    dv,
    grad_ptr,
    rows_ptr,
    q_ptr,
    rotary,
    spans_ptr,
    stride_gl,
    stride_ql,
    kind,
    offs_n,
    lo,
    full_lo,
    full_hi,
    hi,
    Lq,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """All queries of a head that see the keys: dk and dv with them."""
    for start in range(full_lo, full_hi, BLOCK_M):
        dk, dv = _through_queries(
            *(k, k_inverse, factor, v, dk, dv, grad_ptr, rows_ptr, q_ptr, rotary, spans_ptr, stride_gl),
            *(stride_ql, kind, start, hi, offs_n, Lq, HEAD_DIM, BLOCK_M, BLOCK_D, NORM, ANGLES, INTERLEAVED, GROUP),
            False,
        )
    # What needs a mask lies before and after: packed scales begin to be seen at different queries.
    before, after = full_lo - lo, hi - full_hi
    for i in range(0, before + after, BLOCK_M):
        start = tl.where(i < before, lo + i, full_hi + i - before)
        dk, dv = _through_queries(
            *(k, k_inverse, factor, v, dk, dv, grad_ptr, rows_ptr, q_ptr, rotary, spans_ptr, stride_gl),
            *(stride_ql, kind, start, hi, offs_n, Lq, HEAD_DIM, BLOCK_M, BLOCK_D, NORM, ANGLES, INTERLEAVED, GROUP),
            True,
        )
    return dk, dv


@triton.jit
def key_tile(
    grad_ptr,
    rows_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dk_ptr,
    dv_ptr,
    rotary,
    spans_ptr,
    stride_ql,
    stride_kl,
    stride_vl,
    stride_out,
    kind,
    factor,
    heads,
    row,
    stored,
    end,
    lo,
    full_lo,
    full_hi,
    hi,
    Lq,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Keys [row, stored), at most BLOCK_N of a head: stores dk and dv, where PADDED 0 from `end` on.

    Of a GROUP of several heads of queries `heads` has what makes a factor of each, scale, log_temperature and the first
    head's number, and the stride of q from one to the next; all other arguments are of the first head.
    """
    offs_n = row + tl.arange(0, BLOCK_N)
    k = load_multiplied(k_ptr, rotary, 0, offs_n, stride_kl, end, HEAD_DIM, BLOCK_D, NORM, ANGLES, INTERLEAVED, True)
    v = load_rows(v_ptr, offs_n, stride_vl, end, HEAD_DIM, BLOCK_D, True)
    k_inverse = inverse_norm(k)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if GROUP == 1:
        dk, dv = _through_head(
            *(k, k_inverse, factor, v, dk, dv, grad_ptr, rows_ptr, q_ptr, rotary, spans_ptr, stride_out, stride_ql),
            *(kind, offs_n, lo, full_lo, full_hi, hi, Lq, HEAD_DIM, BLOCK_M, BLOCK_D, NORM, ANGLES, INTERLEAVED, 1),
        )
    else:
        for g in range(GROUP):
            factor_g = score_factor(heads[0], heads[1], heads[2] + g, NORM)
            dk, dv = _through_head(
                *(k, k_inverse, factor_g, v, dk, dv, grad_ptr + g * HEAD_DIM, rows_ptr + g * Lq),
                *(q_ptr + g * heads[3], rotary, spans_ptr, stride_out * GROUP, stride_ql, kind, offs_n, lo, full_lo),
                *(full_hi, hi, Lq, HEAD_DIM, BLOCK_M, BLOCK_D, NORM, ANGLES, INTERLEAVED, GROUP),
            )

    offs_out = row_offsets(offs_n, stride_out, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    mask_out = row_mask(offs_n < stored, HEAD_DIM, BLOCK_D)
    if PADDED:
        # Of the zeros that were loaded there weights may be anything.
        dk = tl.where((offs_n < end)[:, None], dk, 0.0)
        dv = tl.where((offs_n < end)[:, None], dv, 0.0)
    tl.store(dv_ptr + offs_out, dv.to(dv_ptr.dtype.element_ty), mask=mask_out)
    if k.dtype != tl.float16 and GROUP == 1:
        dk *= factor
    if ANGLES:
        dk = rotate_back(dk, rotary, 0, offs_n, end, HEAD_DIM, BLOCK_D, ANGLES, INTERLEAVED)
    if NORM:
        # Loaded again, after a store, rather than kept in registers through the loops.
        if ANGLES:
            dk = through_norm(dk, load_pairs(k_ptr, offs_n, stride_kl, end, HEAD_DIM, BLOCK_D, INTERLEAVED, True))
        else:
            dk = through_norm(dk, load_rows(k_ptr, offs_n, stride_kl, end, HEAD_DIM, BLOCK_D, True))
    if ANGLES and not INTERLEAVED:
        store_pairs(dk_ptr, dk, offs_n, stride_out, offs_n < stored, HEAD_DIM, BLOCK_D)
    else:
        tl.store(dk_ptr + offs_out, dk.to(dk_ptr.dtype.element_ty), mask=mask_out)
