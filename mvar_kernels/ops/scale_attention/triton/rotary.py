"""Rows of q and k as they are multiplied: as they came, or normalized and rotated (see the package)."""

import triton
import triton.language as tl

from mvar_kernels.ops.scale_attention.triton.common import (
    inverse_norm,
    load_rows,
    row_mask,
    row_offsets,
    unit_rows,
)


@triton.jit
def _side_by_side(first, second):
    """[BLOCK, BLOCK_D/2] twice as [BLOCK, BLOCK_D]: in turn a channel of either."""
    return tl.reshape(tl.join(first, second), [first.shape[0], 2 * first.shape[1]])


@triton.jit
def _apart(rows):
    return tl.split(tl.reshape(rows, [rows.shape[0], rows.shape[1] // 2, 2]))


@triton.jit
def load_pairs(
    ptr,
    offs,
    stride,
    hi,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows `offs`, as load_rows, with the two channels of a pair side by side."""
    if INTERLEAVED:
        rows = load_rows(ptr, offs, stride, hi, HEAD_DIM, BLOCK_D, MASKED)
    else:
        first = load_rows(ptr, offs, stride, hi, HEAD_DIM // 2, BLOCK_D // 2, MASKED)
        second = load_rows(ptr + HEAD_DIM // 2, offs, stride, hi, HEAD_DIM // 2, BLOCK_D // 2, MASKED)
        rows = _side_by_side(first, second)
    return rows  # [BLOCK, BLOCK_D]


@triton.jit
def _load_table(
    ptr,
    offs,
    hi,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Cosines or sines of the first and of the second channels, in float32."""
    if ANGLES == HEAD_DIM:
        first, second = _apart(load_pairs(ptr, offs, ANGLES, hi, HEAD_DIM, BLOCK_D, INTERLEAVED, MASKED))
    else:
        first = load_rows(ptr, offs, ANGLES, hi, ANGLES, BLOCK_D // 2, MASKED)
        second = first
    return first.to(tl.float32), second.to(tl.float32)  # [BLOCK, BLOCK_D/2]


@triton.jit
def load_multiplied(
    ptr,
    rotary,
    skipped,
    offs,
    stride,
    hi,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows `offs` of q or k, the first of which is row `skipped` of the sequence.

    As load_rows; where there are ANGLES in a row of `rotary`, its cosines and sines, over their lengths with NORM, then
    rotated, and rounded to their dtype.
    """
    if ANGLES:
        x = load_pairs(ptr, offs, stride, hi, HEAD_DIM, BLOCK_D, INTERLEAVED, MASKED)
        if NORM:
            if x.dtype == tl.float32:
                x = unit_rows(x)
            else:
                x = x.to(tl.float32) * inverse_norm(x)[:, None]
        x1, x2 = _apart(x.to(tl.float32))
        c1, c2 = _load_table(rotary[0], offs + skipped, hi + skipped, HEAD_DIM, BLOCK_D, ANGLES, INTERLEAVED, MASKED)
        s1, s2 = _load_table(rotary[1], offs + skipped, hi + skipped, HEAD_DIM, BLOCK_D, ANGLES, INTERLEAVED, MASKED)
        rows = _side_by_side(x1 * c1 - x2 * s1, x2 * c2 + x1 * s2).to(ptr.dtype.element_ty)
    else:
        rows = load_rows(ptr, offs, stride, hi, HEAD_DIM, BLOCK_D, MASKED)
    return rows  # [BLOCK, BLOCK_D]


@triton.jit
def rotate_back(
    grad,
    rotary,
    skipped,
    offs,
    hi,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The gradient of rows, from that of the rotated ones."""
    c1, c2 = _load_table(rotary[0], offs + skipped, hi + skipped, HEAD_DIM, BLOCK_D, ANGLES, INTERLEAVED, True)
    s1, s2 = _load_table(rotary[1], offs + skipped, hi + skipped, HEAD_DIM, BLOCK_D, ANGLES, INTERLEAVED, True)
    g1, g2 = _apart(grad)
    return _side_by_side(g1 * c1 + g2 * s2, g2 * c2 - g1 * s1)


@triton.jit
def store_pairs(ptr, rows, offs, stride, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores rows with the channels of a pair side by side where channels i and i + HEAD_DIM/2 are one."""
    first, second = _apart(rows.to(ptr.dtype.element_ty))
    ptrs = ptr + row_offsets(offs, stride, BLOCK_D // 2)
    mask = row_mask(inside, HEAD_DIM // 2, BLOCK_D // 2)
    tl.store(ptrs, first, mask=mask)
    tl.store(ptrs + HEAD_DIM // 2, second, mask=mask)


@triton.jit
def load_keys(
    k_ptr,
    v_ptr,
    rotary,
    stride_kl,
    stride_vl,
    start,
    hi,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys and values from row `start` on, and the numbers of its rows."""
    offs_n = start + tl.arange(0, BLOCK_N)
    k = load_multiplied(k_ptr, rotary, 0, offs_n, stride_kl, hi, HEAD_DIM, BLOCK_D, NORM, ANGLES, INTERLEAVED, MASKED)
    v = load_rows(v_ptr, offs_n, stride_vl, hi, HEAD_DIM, BLOCK_D, MASKED)
    return k, v, offs_n
