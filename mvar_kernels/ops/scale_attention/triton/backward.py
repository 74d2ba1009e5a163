"""Backward kernels of scale attention: whole scales, or queries, then keys; the temperature (see the package)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.plan import plan
from mvar_kernels.ops.scale_attention.triton.backward_tiles import key_tile, query_tile
from mvar_kernels.ops.scale_attention.triton.common import (
    MAX_LOG_TEMPERATURE,
    candidates,
    key_head,
    load_tile,
    score_factor,
    seen_blocks,
    shape_class,
    strides,
    tile,
)

# Of heads of at most 64: 64 rows of either side of a scale, against 32 of the other. 64 would spill on sm_80, and two
# stages do with norms; on sm_90 three programs share a multiprocessor (168 registers), with norms two (223).
WHOLE = (tile(64, 32, 4, 1),)
# By the padded head dimension.
HALVES = {
    64: (tile(64, 32, 4, 2), tile(128, 32, 8, 2)),
    128: (tile(32, 32, 4, 2),),
    256: (tile(32, 32, 8, 1),),
}
# In one stage for 64: in two, m, 1/l, δ and the spans of the queries went through the pipeline in copies of four bytes,
# in the kernel of whole scales 128 instructions (sm_90, Triton 3.6.0; 16 with 3.7.1).
KEY_HALVES = HALVES | {64: (tile(32, 64, 4, 1), tile(32, 128, 8, 1))}
# Of rotated rows, which need registers: heads of 128 spill with 32 keys at a time (sm_80, sm_90).
ROTARY_HALVES = HALVES | {128: (tile(32, 16, 4, 1),)}
SINGLE = {64: (tile(32, 32, 8, 1),), 128: (tile(16, 16, 4, 1),), 256: (tile(16, 16, 4, 1),)}


@triton.jit(do_not_specialize=["Lq", "skipped"])
def _scale_attention_dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    log_temperature_ptr,
    cos_ptr,
    sin_ptr,
    key_lengths_ptr,
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
    skipped,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H, B = tl.num_programs(1), tl.num_programs(2)
    row, rows, lo, _, full_hi, hi = load_tile(tiles_ptr)
    full_hi, hi = seen_blocks(lo, full_hi, hi, key_lengths_ptr, b, BLOCK_N)
    first = (b * Lq * H + h) * HEAD_DIM  # of the contiguous tensors
    part = query_tile(
        *(grad_ptr + first, q_ptr + b * stride_qb + h * stride_qh),
        k_ptr + b * stride_kb + key_head(h, GROUP) * stride_kh,
        v_ptr + b * stride_vb + key_head(h, GROUP) * stride_vh,
        *(dq_ptr + first, rows_ptr + (b * H + h) * Lq),
        *((cos_ptr, sin_ptr, skipped), spans_ptr),
        *(stride_ql, stride_kl, stride_vl, H * HEAD_DIM, H.to(tl.int64) * B * Lq),
        *(score_factor(scale, log_temperature_ptr, h, NORM), row, row + rows, lo, full_hi, hi, Lq),
        *(HEAD_DIM, BLOCK_D, NORM, ANGLES, INTERLEAVED, LANES, BLOCK_M, BLOCK_N, BLOCK_N),
    )
    if NORM:
        tl.store(partials_ptr + (h * B + b) * tl.num_programs(0) + tl.program_id(0), part)


@triton.jit(do_not_specialize=["Lq", "L", "skipped"])
def _scale_attention_dkdv_kernel(
    grad_ptr,
    rows_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    log_temperature_ptr,
    cos_ptr,
    sin_ptr,
    key_lengths_ptr,
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
    key_h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads, B = tl.num_programs(1), tl.num_programs(2)
    h, H = key_h * GROUP, heads * GROUP
    row, rows, lo, full_lo, full_hi, hi = load_tile(tiles_ptr)
    first = (b * L * heads + key_h) * HEAD_DIM
    stored = row + rows
    end = stored
    if key_lengths_ptr is not None:
        end = tl.maximum(tl.minimum(tl.load(key_lengths_ptr + b), stored), 0).to(tl.int32)
    key_tile(
        *(grad_ptr + (b * Lq * H + h) * HEAD_DIM, rows_ptr + (b * H + h) * Lq, q_ptr + b * stride_qb + h * stride_qh),
        *(k_ptr + b * stride_kb + key_h * stride_kh, v_ptr + b * stride_vb + key_h * stride_vh, dk_ptr + first),
        dv_ptr + first,
        *((cos_ptr, sin_ptr, skipped), spans_ptr, stride_ql, stride_kl, stride_vl, heads * HEAD_DIM),
        H.to(tl.int64) * B * Lq,
        *(score_factor(scale, log_temperature_ptr, h, NORM), (scale, log_temperature_ptr, h, stride_qh), row, stored),
        *(end, lo, full_lo, full_hi, hi, Lq),
        *(HEAD_DIM, BLOCK_D, NORM, ANGLES, INTERLEAVED, GROUP, BLOCK_M, BLOCK_N, key_lengths_ptr is not None),
    )


@triton.jit(do_not_specialize=["L"])
def _scale_attention_bwd_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    log_temperature_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
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
    L,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A whole scale, or several packed into one tile: its queries' tiles, then its keys', of BLOCK_M rows."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H, B = tl.num_programs(1), tl.num_programs(2)
    row, rows, lo, full_lo, full_hi, hi = load_tile(tiles_ptr)
    first = (b * L * H + h) * HEAD_DIM
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    grad_ptr += first
    rows_ptr += (b * H + h) * L
    kind = H.to(tl.int64) * B * L
    factor = score_factor(scale, log_temperature_ptr, h, NORM)
    rotary = 0, 0, 0  # none, and no other heads

    part = 0.0
    for start in range(row, row + rows, BLOCK_M):
        part += query_tile(
            *(grad_ptr, q_ptr, k_ptr, v_ptr, dq_ptr + first, rows_ptr, rotary, spans_ptr, stride_ql, stride_kl),
            *(stride_vl, H * HEAD_DIM, kind, factor, start, row + rows, lo, full_hi, hi, L),
            *(HEAD_DIM, BLOCK_D, NORM, 0, False, LANES, BLOCK_M, BLOCK_M, BLOCK_N),
        )
    if NORM:
        tl.store(partials_ptr + (h * B + b) * tl.num_programs(0) + tl.program_id(0), part)
    tl.debug_barrier()  # all threads' m, 1/l and δ are in memory
    for start in range(row, row + rows, BLOCK_M):
        key_tile(
            *(grad_ptr, rows_ptr, q_ptr, k_ptr, v_ptr, dk_ptr + first, dv_ptr + first, rotary, spans_ptr, stride_ql),
            *(stride_kl, stride_vl, H * HEAD_DIM, kind, factor, rotary, start, row + rows, row + rows, lo, full_lo),
            full_hi,
            *(hi, L),
            *(HEAD_DIM, BLOCK_D, NORM, 0, False, 1, BLOCK_N, BLOCK_M, False),
        )


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


def _longest_whole(call: Attention) -> int:
    """The tokens of the longest scale whose backward one program computes; of longer ones two kernels share the tiles.

    0, so that all are shared, where keys have queries of other scales, or none; in float32, whose products need the
    registers, as a rotation does; for grouped keys; and for wide heads.
    """
    q = call.q
    own_scale = not call.causal and q.shape[1] == call.k.shape[1] and call.key_lengths is None
    return (
        256
        if own_scale and q.shape[2] == call.k.shape[2] and q.itemsize == 2 and q.shape[-1] <= 64 and call.cos is None
        else 0
    )


def backward(grads: Sequence[Tensor], call: Attention) -> list[Tensor]:
    """Gradients of q, k, v and, where given, log_temperature."""
    q, k, v, temperature, _, causal, scale, cos, sin, interleaved, key_lengths = call.readable()
    scales = call.lengths()
    grad_out = grads[0].contiguous()
    B, Lq, H, D = q.shape
    L, device, shapes = k.shape[1], q.device, shape_class(q, cos)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (q, k, v))
    rows = torch.empty((3, B, H, Lq), dtype=torch.float32, device=device)  # of each query: m, 1/l, δ
    sizes = {"HEAD_DIM": D, "BLOCK_D": tiling.dot_block(D), "NORM": temperature is not None}
    angles = {"ANGLES": 0 if cos is None else cos.shape[1], "INTERLEAVED": interleaved, "GROUP": H // k.shape[2]}
    skipped = None if cos is None else k.shape[1] - Lq
    lanes = {"LANES": 1 if q.itemsize == 4 else 4}

    longest = _longest_whole(call)
    whole, shared = range(1, longest + 1), range(longest + 1, max(L, Lq) + 1)
    sums = []  # each launch's parts of the temperature's gradient, (H, B, tiles)
    if any(n in whole for n in scales):
        chosen = tiling.chosen("scale_attention_bwd", shapes, WHOLE, device)
        made = plan(
            scales, Lq, causal, False, chosen.sizes["BLOCK_M"], chosen.sizes["BLOCK_N"], device, whole, cut=False
        )
        sums.append(torch.empty((H, B, len(made.tiles)), dtype=torch.float32, device=device))
        _scale_attention_bwd_kernel[(len(made.tiles), H, B)](
            *(grad_out, q, k, v, temperature, dq, dk, dv, rows, sums[-1], made.tiles, made.spans),
            *(*strides(q, k, v), scale, L),
            **sizes,
            **lanes,
            **chosen.arguments(),
        )
    if any(n in shared for n in scales):
        chosen = tiling.chosen(
            "scale_attention_dq", shapes, candidates(q, HALVES if cos is None else ROTARY_HALVES, SINGLE), device
        )
        made = plan(scales, Lq, causal, False, chosen.sizes["BLOCK_M"], chosen.sizes["BLOCK_N"], device, shared)
        sums.append(torch.empty((H, B, len(made.tiles)), dtype=torch.float32, device=device))
        _scale_attention_dq_kernel[(len(made.tiles), H, B)](
            *(grad_out, q, k, v, temperature, cos, sin, key_lengths, dq, rows, sums[-1], made.tiles),
            made.spans if key_lengths is None else None,
            *(*strides(q, k, v), scale, Lq, skipped),
            **sizes,
            **angles,
            **lanes,
            **chosen.arguments(),
        )
        chosen = tiling.chosen("scale_attention_dkdv", shapes, candidates(q, KEY_HALVES, SINGLE), device)
        made = plan(scales, Lq, causal, True, chosen.sizes["BLOCK_N"], chosen.sizes["BLOCK_M"], device, shared)
        _scale_attention_dkdv_kernel[(len(made.tiles), k.shape[2], B)](
            *(grad_out, rows, q, k, v, temperature, cos, sin, key_lengths, dk, dv, made.tiles, made.spans),
            *(*strides(q, k, v), scale, Lq, L, skipped),
            **sizes,
            **angles,
            **chosen.arguments(),
        )
    if temperature is None:
        return [dq, dk, dv]
    partials = sums[0] if len(sums) == 1 else torch.cat(sums, 2)
    dtemperature = torch.empty((H,), dtype=temperature.dtype, device=device)
    _scale_attention_dtemperature_kernel[(H,)](
        partials, temperature, dtemperature, partials.shape[1] * partials.shape[2], BLOCK=1024
    )
    return [dq, dk, dv, dtemperature]
