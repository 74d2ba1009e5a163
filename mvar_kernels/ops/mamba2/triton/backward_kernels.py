"""The kernels of ssd_scan's backward, which are the heart of the mixer's, too.

The sequence is cut into chunks. Nothing but the inputs was saved, so, with h the state before a
chunk and λ the gradient of the state after it:

1. `prepare`, one program per (batch row, chunk): Δ and the prefix sums of log a of every head, along the tokens, and
   B and C as the matmuls take them.
2. `sweep`, one program per (batch row, head, rows of P): chunk by chunk, each h from the one before; all are stored.
3. `sweep` once more, with dy and C in place of x and B, from the last chunk to the first: every λ, then the
   gradient of the initial state.
4. `grads`, one program per (batch row, chunk, group of heads): every gradient of the chunk from its h and λ.
   dB and dC are shared by the heads: a program adds those of its group in registers, head after head, and writes
   one float32 partial per group. What is summed over tokens (dA, dD) is stored token by token, in float32.
   torch.sum adds it and the partials, in an order that the shape alone decides.

With decay[t, s] = a_{s+1} … a_t, since_t = a_first … a_t, until_s = a_{s+1} … a_last, and sums over s < t,

    dx_s = Σ_t C_t·B_s decay Δ_s dy_t + Δ_s until_s λ B_s + (Δ_s C_s·B_s + D) dy_s
    dC_t = Σ_s dG[t, s] B_s + Σ_heads since_t hᵀ dy_t                  dG[t, s] = Σ_heads dy_t·x_s decay Δ_s
    dB_s = Σ_t dG[t, s] C_t + Σ_heads Δ_s until_s λᵀ x_s

Tokens' own terms (s = t) pass over no step: they are the diagonal of dG, and vectors elsewhere.

The gradient of log a_u gathers all that passes over the step from u−1 to u: from s to t where s < u ≤ t, from h to
t ≥ u, from s < u to λ, and from h to λ. Of the pairs (s, t) it is a sum over t, as a matmul with a triangle of
ones, then over s. Differences of row and column sums, the pairs that end at t ≥ u less those that start at s ≥ u, are
cheaper and cancel, down to float32's rounding of the chunk's sum: nothing beside the roundings of bfloat16 operands,
so that Hopper's kernel for bfloat16 takes them.

The direction inside the scales is the mirror image: its pairs fill the other triangle of the same matrices, its
state comes to a chunk from the right, and a scale that ends cuts it off. Both directions share the
launches.

Precision, by the dtype of the inputs. float32: all matmuls in float32, and no fast exponentials and quotients
(EXACT, mvar_kernels/triton_math.py). float16: float32 operands, as x, h and C·B can leave float16's range; matmuls that
a float32 gradient depends on (of A, D, dt, the state) as three tf32 matmuls (PRECISE = tf32x3), the others as one
(COARSE = tf32, no coarser than float16). bfloat16: OPERAND = bfloat16, summed in float32, and h and λ, float32 in
registers, are bfloat16 in memory; what a sweep adds to them has its second operand in two bfloat16 parts
(TWO_PARTS) and C there is float32: otherwise the gradient of the initial state is off by up to 3.2 times the tolerance
without a rounding of bfloat16, so by 2.4 (simulated on all cases, three seeds each).

Every tensor is passed as rows of all batch rows, b·L + t, with one row stride; those that `prepare` writes, as chunks
of CHUNK rows, b·chunks + chunk, with zeros after the last token. A column of Δ, and an entry of A and dt_bias, is a
head of one direction: direction·H + head.

A group of heads that share B and C is computed as a batch row of its own: between the kernels b counts the groups of
all batch rows and H the heads of one. Where a kernel reads or writes what it shares with the others (x, y, dt, B, C,
A, D and their gradients), it starts at the first of the group's channels or columns (`group_of`).
"""

import triton
import triton.language as tl

from mvar_kernels.ops.mamba2.triton.common import (
    clamped,
    conv_rows,
    finite_rate,
    group_of,
    limited,
    sigmoids,
    softplus,
    split_log_decays,
)
from mvar_kernels.triton_math import LOG2_E, exp

PLANES = tl.constexpr(7)  # of steps: three vectors or four for `grads`, then three of its results


@triton.jit
def operand(v, OPERAND: tl.constexpr):
    """v as it is multiplied, and as a state is stored."""
    return v.to(OPERAND)


@triton.jit
def power(v, EXACT: tl.constexpr):
    """exp of what `prefix_sums` gives."""
    if EXACT:
        result = exp(v)
    else:
        result = tl.exp2(v)
    return result


@triton.jit
def gate(v, EXACT: tl.constexpr):
    """SiLU(v) and SiLU'(v). Where not EXACT, 1/(1 + e⁻ᵛ) is the square of rsqrt: a division takes five instructions."""
    if EXACT:
        v = clamped(v)
        open, shut = sigmoids(v, EXACT)
        silu = v * open
        slope = open + silu * shut
    else:
        root = tl.rsqrt(1.0 + tl.exp2(v * -LOG2_E))
        open = root * root
        silu = v * open
        slope = open + (silu - silu * open)
    return silu, slope


@triton.jit
def packed_weights(weight_ptr, channels, offs_c, mask_c, TAPS: tl.constexpr):
    """TAPS + 1 vectors, as conv_rows takes them, from (TAPS + 1, channels) in float32: the weights, then the bias."""
    weights = ()
    for tap in tl.static_range(TAPS + 1):
        weight = tl.load(weight_ptr + tap * channels + offs_c, mask=mask_c, other=0.0)
        weights = weights + (weight,)  # type: ignore[assignment]
    return weights


@triton.jit
def prefix_sums(at, offs, direction, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """Prefix sums of log a [CHUNK] and their totals: inclusive, or exclusive in direction 1. EXACT: in two exact parts.

    at: the chunk's Δ of one column. Loaded by every layout that needs them, they are cheaper than exchanged.
    """
    mask = offs >= direction
    coarse = tl.load(at + 2 * CHUNK + offs - direction, mask=mask, other=0.0)
    all_coarse = tl.load(at + 3 * CHUNK - 1)
    fine, all_fine = coarse, all_coarse
    if EXACT:
        fine = tl.load(at + 3 * CHUNK + offs - direction, mask=mask, other=0.0)
        all_fine = tl.load(at + 4 * CHUNK - 1)
    return coarse, fine, all_coarse, all_fine


@triton.jit
def exponent(coarse, fine, EXACT: tl.constexpr):
    if EXACT:
        coarse += fine
    return coarse


@triton.jit
def pair_decays(coarse, fine, mask, EXACT: tl.constexpr):
    """The powers of column − row, 0 where not `mask`."""
    exponents = coarse[None, :] - coarse[:, None]
    if EXACT:
        exponents += fine[None, :] - fine[:, None]
    return power(tl.where(mask, exponents, float("-inf")), EXACT)


@triton.jit
def tile_matmul(a, b, once, PRECISION: tl.constexpr):
    """a b. `once` is 1, the grid's third size, which the compiler does not know.

    Of a matmul and one that its result goes into it would make a chain, in which all warps lie along one side: with 64
    rows, half of eight warps hold what the other half does. The loop keeps it from that.
    """
    out = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    if a.dtype == tl.bfloat16:
        for _ in range(once):
            out = tl.dot(a, b, out, input_precision=PRECISION)
    else:
        out = tl.dot(a, b, input_precision=PRECISION)
    return out


@triton.jit
def edges(scale_ptr, chunk, L, CHUNK: tl.constexpr):
    """The scales of the chunk's tokens, and of the tokens before and after the chunk (−1 where there is none)."""
    offs_t = chunk * CHUNK + tl.arange(0, CHUNK)
    scale = tl.load(scale_ptr + offs_t, mask=offs_t < L, other=-2)
    before = tl.load(scale_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    after = tl.load(scale_ptr + (chunk + 1) * CHUNK, mask=(chunk + 1) * CHUNK < L, other=-1)
    return scale, before, after


@triton.jit(do_not_specialize=["dt_stride", "L", "columns"])
def _ssd_scan_bwd_prepare_kernel(
    B_ptr,
    C_ptr,
    conv_ptr,
    weight_ptr,
    dt_ptr,
    bias_ptr,
    A_ptr,
    steps_ptr,
    bc_ptr,
    C_out_ptr,
    B_stride,
    C_stride,
    dt_stride,
    L,
    E,
    columns,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    TAPS: tl.constexpr,
    MIXER: tl.constexpr,
    DT_MIN: tl.constexpr,
    DT_MAX: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """steps (chunks of b, columns + 1, PLANES, CHUNK): of each column Δ, its slope in dt, and the prefix sums of log a
    in one part or, EXACT, two; and last C·B. bc: [B, C] (chunks of b, CHUNK, 2N).

    MIXER: from xBC at B_ptr through the convolution and SiLU, dt through softplus, and A_ptr holds A_log; C_out is C in
    float32 (chunks of b, CHUNK, N). Sums for exp2, which is faster, unless EXACT. E: of all groups; columns: of one;
    GROUP_HEADS: its heads, read where there are others. Program id: chunk of a batch row.
    """
    chunks = tl.cdiv(L, CHUNK)
    program = tl.program_id(0).to(tl.int64)
    b, start = program // chunks, (tl.program_id(0) % chunks) * CHUNK
    b, group = group_of(b, GROUPS)
    offs_i, offs_n, offs_h = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    mask_t, mask_n, mask_h = start + offs_i < L, offs_n < N, offs_h < columns
    mask_bc = mask_t[:, None] & mask_n[None, :]
    if MIXER:
        channels = E + 2 * GROUPS * N
        B_ptr += b * L * B_stride
        conv_ptr += b * (TAPS - 1) * channels
        to_B, to_C = group * N, (GROUPS + group) * N
        weights = packed_weights(weight_ptr + E + to_B, channels, offs_n, mask_n, TAPS)
        B = conv_rows(B_ptr, B_stride, conv_ptr, channels, weights, E + to_B, offs_n, mask_n, start, L, TAPS, CHUNK)
        weights = packed_weights(weight_ptr + E + to_C, channels, offs_n, mask_n, TAPS)
        C = conv_rows(B_ptr, B_stride, conv_ptr, channels, weights, E + to_C, offs_n, mask_n, start, L, TAPS, CHUNK)
        B, C = tl.where(mask_bc, gate(B, EXACT)[0], 0.0), tl.where(mask_bc, gate(C, EXACT)[0], 0.0)
    else:
        row = b * L + start
        if GROUPS > 1:
            B_ptr += group * N
            C_ptr += group * N
        B = tl.load(B_ptr + (row + offs_i[:, None]) * B_stride + offs_n[None, :], mask=mask_bc, other=0.0)
        C = tl.load(C_ptr + (row + offs_i[:, None]) * C_stride + offs_n[None, :], mask=mask_bc, other=0.0)
        B, C = B.to(tl.float32), C.to(tl.float32)
    bc_at = bc_ptr + (program * CHUNK + offs_i[:, None]) * (2 * N) + offs_n[None, :]
    tl.store(bc_at, operand(B, OPERAND), mask=mask_n[None, :])
    tl.store(bc_at + N, operand(C, OPERAND), mask=mask_n[None, :])
    if MIXER and TWO_PARTS:
        tl.store(C_out_ptr + (program * CHUNK + offs_i[:, None]) * N + offs_n[None, :], C, mask=mask_n[None, :])

    mask_dt = mask_t[:, None] & mask_h[None, :]
    offs_c = offs_h
    if GROUPS > 1:
        offs_c += (group + (offs_h // GROUP_HEADS) * (GROUPS - 1)) * GROUP_HEADS
    dt_at = dt_ptr + (b * L + start + offs_i[:, None]) * dt_stride + offs_c[None, :]
    delta = tl.load(dt_at, mask=mask_dt, other=0.0).to(tl.float32)  # [CHUNK, BLOCK_H]
    A = tl.load(A_ptr + offs_c, mask=mask_h, other=0.0).to(tl.float32)
    steps_ptr += program * (columns + 1) * PLANES * CHUNK
    at = steps_ptr + offs_h[None, :] * (PLANES * CHUNK) + offs_i[:, None]
    if MIXER:
        A = -exp(A)
        v = delta + tl.load(bias_ptr + offs_c, mask=mask_h, other=0.0).to(tl.float32)[None, :]
        slope = sigmoids(clamped(v), EXACT)[0]
        if DT_MIN is not None:
            delta = softplus(v)
            slope = tl.where((delta < DT_MIN) | (delta > DT_MAX), 0.0, slope)
        tl.store(at + CHUNK, tl.where(mask_dt, slope, 0.0), mask=mask_h[None, :])
        delta = tl.where(mask_dt, limited(softplus(v), DT_MIN, DT_MAX), 0.0)
    tl.store(at, delta, mask=mask_h[None, :])
    coarse, fine = split_log_decays(delta * finite_rate(A)[None, :])
    coarse, fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    if EXACT:
        tl.store(at + 3 * CHUNK, fine, mask=mask_h[None, :])
    else:
        coarse = (coarse + fine) * LOG2_E
    tl.store(at + 2 * CHUNK, coarse, mask=mask_h[None, :])
    tl.store(steps_ptr + columns * (PLANES * CHUNK) + offs_i, tl.sum(B * C, 1))


@triton.jit
def advance(state, chunk_decay, came, went, OPERAND: tl.constexpr, PRECISE: tl.constexpr, TWO_PARTS: tl.constexpr):
    """chunk_decay · state + cameᵀ went."""
    came = tl.trans(operand(came, OPERAND))
    part = operand(went, OPERAND)
    added = tl.dot(came, part, input_precision=PRECISE)
    if TWO_PARTS:
        added = tl.dot(came, operand(went - part.to(tl.float32), OPERAND), added, input_precision=PRECISE)
    return chunk_decay * state + added


@triton.jit(do_not_specialize=["L"])
def _ssd_scan_bwd_sweep_kernel(
    from_ptr,
    to_ptr,
    steps_ptr,
    scale_ptr,
    first_ptr,
    last_ptr,
    states_ptr,
    from_stride,
    to_stride,
    L,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BOTH: tl.constexpr,
    ADJOINT: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISE: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """states[b, chunk, h, direction, ADJOINT] (P, N): what enters the chunk, h, or with ADJOINT = 1 its gradient λ.

    Adds Σ_t weight_t from_t ⊗ to_t: from and to are x and B, or dy and C; to is in chunks. Program ids: batch row and
    head, rows of P, direction. From left to right where direction = ADJOINT.
    """
    sequence = tl.program_id(0).to(tl.int64)
    b, h = sequence // H, sequence % H
    direction = tl.program_id(2)
    chunks = tl.cdiv(L, CHUNK)
    offs_i = tl.arange(0, CHUNK)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    offs_state = offs_p[:, None] * N + offs_n[None, :]
    mask_state = mask_p[:, None] & mask_n[None, :]
    offs_from = offs_i[:, None] * from_stride + offs_p[None, :]
    offs_to = offs_i[:, None] * to_stride + offs_n[None, :]
    COLUMNS: tl.constexpr = 2 * H if BOTH else H
    steps_ptr += (direction * H + h) * (PLANES * CHUNK)
    row, group = group_of(b, GROUPS)
    from_ptr += row * L * from_stride + (group * H + h) * P
    states_ptr += ((h * (2 if BOTH else 1) + direction) * 2 + ADJOINT) * P * N
    state = tl.load(first_ptr + sequence * P * N + offs_state, mask=mask_state & (direction == 0), other=0.0)
    rightwards = direction == ADJOINT
    for i in range(chunks):
        chunk = tl.where(rightwards, i, chunks - 1 - i)
        at_chunk = b * chunks + chunk
        tl.store(states_ptr + at_chunk * COLUMNS * 2 * P * N + offs_state, operand(state, OPERAND), mask=mask_state)
        at = steps_ptr + at_chunk * (COLUMNS + 1) * PLANES * CHUNK
        coarse, fine, all_coarse, all_fine = prefix_sums(at, offs_i, direction, CHUNK, EXACT)
        coarse, fine = tl.where(rightwards, all_coarse - coarse, coarse), tl.where(rightwards, all_fine - fine, fine)
        weight = power(exponent(coarse, fine, EXACT), EXACT)
        chunk_decay = power(exponent(all_coarse, all_fine, EXACT), EXACT)
        if BOTH:
            scale, before, after = edges(scale_ptr, chunk, L, CHUNK)
            weight = tl.where((direction == 0) | (scale == (after if ADJOINT else before)), weight, 0.0)
            chunk_decay = tl.where((direction == 0) | (before == after), chunk_decay, 0.0)
        if not ADJOINT:
            weight *= tl.load(at + offs_i)
        mask_from = (chunk * CHUNK + offs_i < L)[:, None] & mask_p[None, :]
        came = tl.load(from_ptr + tl.cast(chunk, tl.int64) * CHUNK * from_stride + offs_from, mask=mask_from, other=0.0)
        went = tl.load(to_ptr + at_chunk * CHUNK * to_stride + offs_to, mask=mask_n[None, :], other=0.0)
        went = went.to(tl.float32) * weight[:, None]
        state = advance(state, chunk_decay, came, went, OPERAND, PRECISE, TWO_PARTS)
    if ADJOINT:
        tl.store(last_ptr + sequence * P * N + offs_state, state, mask=mask_state & (direction == 0))
