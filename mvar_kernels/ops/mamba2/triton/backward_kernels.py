"""The kernels of ssd_scan's backward, which are the heart of the mixer's, too.

The sequence is cut into chunks. Nothing but the inputs was saved, so, with h the state before a
chunk and λ the gradient of the state after it:

1. `sweep`, one program per (batch row, head, rows of P): chunk by chunk, each h from the one before; all are stored.
2. `sweep` once more, with dy and C in place of x and B, from the last chunk to the first: every λ, then the
   gradient of the initial state.
3. `grads`, one program per (batch row, chunk, group of heads): every gradient of the chunk from its h and λ.
   dB and dC are shared by the heads: a program adds those of its group in registers, head after head, and writes
   one float32 partial per group. What is summed over tokens (dA, dD) leaves one partial per chunk and head.
   torch.sum adds the partials, in an order that the shape alone decides.

With decay[t, s] = a_{s+1} … a_t, since_t = a_first … a_t, until_s = a_{s+1} … a_last, and sums over s < t,

    dx_s = Σ_t C_t·B_s decay Δ_s dy_t + Δ_s until_s λ B_s + (Δ_s C_s·B_s + D) dy_s
    dC_t = Σ_s dG[t, s] B_s + Σ_heads since_t hᵀ dy_t                  dG[t, s] = Σ_heads dy_t·x_s decay Δ_s
    dB_s = Σ_t dG[t, s] C_t + Σ_heads Δ_s until_s λᵀ x_s

The gradient of log a_u gathers all that passes over the step from u−1 to u: from s to t where s < u ≤ t, from h to
t ≥ u, from s < u to λ, and from h to λ. Of the pairs (s, t) it is a sum over t, as a matmul with a triangle of
ones, then over s: differences of row and column sums would be cheaper and cancel.

The direction inside the scales is the mirror image: its pairs fill the other triangle of the same matrices, its
state comes to a chunk from the right, and a scale that ends cuts it off. Both directions share the
launches. Tokens' own terms (s = t) pass over no step and are kept apart.

Precision, by the dtype of the inputs. float32: all matmuls in float32, and no fast exponentials and quotients
(EXACT, mvar_kernels/triton_math.py). float16: matmuls that a float32 gradient depends on (of A, D, dt_bias, the state)
as three tf32 matmuls (PRECISE = tf32x3), the others as one (COARSE = tf32: float32's range, and no coarser than
float16). bfloat16: tf32, whose rounding is an eighth of that of dy as it is given, and bfloat16 operands where only a
bfloat16 gradient comes of it. Tensor cores cut tf32 operands off instead of rounding them: emulated, the errors of
float32 gradients are at most 0.8 of the tolerance (tests/kernels/test_gpu_arithmetic.py).

Every tensor is passed as rows of all batch rows, b·L + t, with one row stride. A column of dt, and an entry of A
and dt_bias, is a head of one direction: direction·H + head.
"""

import triton
import triton.language as tl

from mvar_kernels.ops.mamba2.triton.common import (
    clamped,
    decay_matrix,
    finite_rate,
    sigmoids,
    softplus,
    split_log_decays,
)
from mvar_kernels.triton_math import exp


@triton.jit
def head_steps(dt_ptr, bias_ptr, A_ptr, offs_dt, mask_t, column, always, MIXER: tl.constexpr, EXACT: tl.constexpr):
    """Δ (0 where masked), the slope of Δ in dt, and A. The mixer's dt is before softplus, and A_ptr holds A_log.

    `always` is true: the branch keeps the compiler from computing softplus again for every register layout.
    """
    A = tl.load(A_ptr + column).to(tl.float32)
    delta = tl.zeros([mask_t.shape[0]], tl.float32)
    slope = tl.zeros([mask_t.shape[0]], tl.float32)
    if always:
        delta = tl.load(dt_ptr + offs_dt + column, mask=mask_t, other=0.0).to(tl.float32)
        slope = tl.where(mask_t, 1.0, 0.0)
        if MIXER:
            delta += tl.load(bias_ptr + column).to(tl.float32)
            slope *= sigmoids(clamped(delta), EXACT)[0]
            delta = tl.where(mask_t, softplus(delta), 0.0)
    if MIXER:
        A = -exp(A)
    return delta, slope, finite_rate(A)


@triton.jit
def prefix_sums(log_a, direction):
    """Prefix sums of log a in two exact parts and their totals: inclusive, or exclusive in direction 1."""
    coarse, fine = split_log_decays(log_a)
    exclude = direction * 1.0
    before_coarse = tl.cumsum(coarse, 0) - exclude * coarse
    before_fine = tl.cumsum(fine, 0) - exclude * fine
    return before_coarse, before_fine, tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit
def edges(scale_ptr, chunk, L, CHUNK: tl.constexpr):
    """The scales of the chunk's tokens, and of the tokens before and after the chunk (−1 where there is none)."""
    offs_t = chunk * CHUNK + tl.arange(0, CHUNK)
    scale = tl.load(scale_ptr + offs_t, mask=offs_t < L, other=-2)
    before = tl.load(scale_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    after = tl.load(scale_ptr + (chunk + 1) * CHUNK, mask=(chunk + 1) * CHUNK < L, other=-1)
    return scale, before, after


@triton.jit(do_not_specialize=["L"])
def _ssd_scan_bwd_sweep_kernel(
    from_ptr,
    to_ptr,
    dt_ptr,
    bias_ptr,
    A_ptr,
    scale_ptr,
    first_ptr,
    last_ptr,
    states_ptr,
    from_stride,
    to_stride,
    dt_stride,
    L,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BOTH: tl.constexpr,
    ADJOINT: tl.constexpr,
    MIXER: tl.constexpr,
    PRECISE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """states[direction, b, chunk, h] (P, N): what enters the chunk, h, or with ADJOINT (0 or 1) its gradient λ.

    Adds Σ_t weight_t from_t ⊗ to_t: from and to are x and B, or dy and C. Program ids: batch row and head, rows of
    P, direction. From left to right where direction = ADJOINT.
    """
    EXACT: tl.constexpr = PRECISE == "ieee"
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
    state = tl.load(first_ptr + sequence * P * N + offs_state, mask=mask_state & (direction == 0), other=0.0)
    before_b = direction * (tl.num_programs(0) // H) + b
    rightwards = direction == ADJOINT
    for i in range(chunks):
        chunk = tl.where(rightwards, i, chunks - 1 - i)
        tl.store(states_ptr + ((before_b * chunks + chunk) * H + h) * P * N + offs_state, state, mask=mask_state)
        mask_t = chunk * CHUNK + offs_i < L
        row = b * L + chunk * CHUNK
        at, column, always = dt_ptr + row * dt_stride, direction * H + h, chunk * CHUNK < L
        delta, _, A = head_steps(at, bias_ptr, A_ptr, offs_i * dt_stride, mask_t, column, always, MIXER, EXACT)
        coarse, fine, all_coarse, all_fine = prefix_sums(delta * A, direction)
        weight = exp(tl.where(rightwards, (all_coarse - coarse) + (all_fine - fine), coarse + fine), EXACT)
        chunk_decay = exp(all_coarse + all_fine, EXACT)
        if BOTH:
            scale, before, after = edges(scale_ptr, chunk, L, CHUNK)
            weight = tl.where((direction == 0) | (scale == (after if ADJOINT else before)), weight, 0.0)
            chunk_decay = tl.where((direction == 0) | (before == after), chunk_decay, 0.0)
        mask_from, mask_to = mask_t[:, None] & mask_p[None, :], mask_t[:, None] & mask_n[None, :]
        came = tl.load(from_ptr + row * from_stride + h * P + offs_from, mask=mask_from, other=0.0).to(tl.float32)
        went = tl.load(to_ptr + row * to_stride + offs_to, mask=mask_to, other=0.0).to(tl.float32)
        if not ADJOINT:
            weight *= delta
        state = chunk_decay * state + tl.dot(tl.trans(came), went * weight[:, None], input_precision=PRECISE)
    if ADJOINT:
        tl.store(last_ptr + sequence * P * N + offs_state, state, mask=mask_state & (direction == 0))


@triton.jit
def matmul(a, b_at, b_mask, once, TRANSPOSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """a b, or a bᵀ, with both operands converted to OPERAND; b is loaded.

    `once` is 1, the grid's third size, which the compiler does not know. The loop keeps it from loading operands long
    before, from computing the operand of a matmul again for each layout that it is needed in, and from treating matmuls
    as one chain, in which all warps lie along one side and hold all of the other operand.
    """
    out = tl.zeros([a.shape[0], b_at.shape[0] if TRANSPOSE else b_at.shape[1]], tl.float32)
    a = a.to(OPERAND)
    for i in range(once):
        b = tl.load(b_at + i * 64, mask=b_mask, other=0.0).to(OPERAND)
        out = tl.dot(a, tl.trans(b) if TRANSPOSE else b, input_precision=PRECISION)
    return out


@triton.jit
def matmul_of_loaded(
    a_at, a_mask, b_at, b_mask, once, TRANSPOSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """matmul, with a loaded in the loop as well."""
    out = tl.zeros([a_at.shape[0], b_at.shape[0] if TRANSPOSE else b_at.shape[1]], tl.float32)
    for i in range(once):
        a = tl.load(a_at + i * 64, mask=a_mask, other=0.0).to(OPERAND)
        b = tl.load(b_at + i * 64, mask=b_mask, other=0.0).to(OPERAND)
        out = tl.dot(a, tl.trans(b) if TRANSPOSE else b, input_precision=PRECISION)
    return out


@triton.jit
def _direction_grads(
    x_at, dy_at, B_at, C_at, h_at, adjoint_at, mask_x, mask_bc, mask_state, dB, dC, dx,
    delta, A, direction, scale, before, after, once,
    BOTH: tl.constexpr, OPERAND: tl.constexpr, PRECISE: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """One direction of one head in one chunk. h and λ are (P, N) as they enter.

    Registers are what this kernel is short of: tiles are loaded, and B Cᵀ and x dyᵀ computed, again rather than kept.
    Nor is a sum over heads the accumulator of a matmul: Triton would lay it out with every warp's rows twice.
    Returns dB, dC and dx with their parts added, and the gradients of Δ and of A, all without tokens' own terms.
    """
    EXACT: tl.constexpr = PRECISE == "ieee"
    coarse, fine, all_coarse, all_fine = prefix_sums(delta * A, direction)
    entering = exp(coarse + fine, EXACT)
    leaving = exp((all_coarse - coarse) + (all_fine - fine), EXACT)
    chunk_decay = exp(all_coarse + all_fine, EXACT)
    offs = tl.arange(0, delta.shape[0])
    # [t, u]: whether what comes to t passes over step u; if not, what goes from there may.
    passes = offs[:, None] >= offs[None, :]
    pairs = offs[:, None] < offs[None, :]  # [s, t]: whether s reaches t
    if BOTH:
        back = direction == 1
        entering, leaving = (
            tl.where(back, tl.where(scale == after, leaving, 0.0), entering),
            tl.where(back, tl.where(scale == before, entering, 0.0), leaving),
        )
        chunk_decay = tl.where(back & (before != after), 0.0, chunk_decay)
        coarse, fine = tl.where(back, -coarse, coarse), tl.where(back, -fine, fine)
        passes = tl.where(back, offs[:, None] <= offs[None, :], passes)
        pairs = tl.where(back, (offs[:, None] > offs[None, :]) & (scale[:, None] == scale[None, :]), pairs)

    through = 0.0
    for i in range(once):
        h = tl.load(h_at + i * 64, mask=mask_state, other=0.0)  # [BLOCK_P, BLOCK_N]
        adjoint = tl.load(adjoint_at + i * 64, mask=mask_state, other=0.0)  # [BLOCK_P, BLOCK_N]
        through = chunk_decay * tl.sum(tl.sum(h * adjoint, 1), 0)
    from_h = matmul_of_loaded(dy_at, mask_x, h_at, mask_state, once, False, tl.float32, PRECISE)
    from_h *= entering[:, None]  # [CHUNK, BLOCK_N]
    dC += from_h
    arrived = tl.sum(from_h * tl.load(C_at, mask=mask_bc, other=0.0).to(tl.float32), 1)
    xs = matmul_of_loaded(x_at, mask_x, adjoint_at, mask_state, once, False, OPERAND, COARSE)
    dB += xs * (leaving * delta)[:, None]  # [CHUNK, BLOCK_N]
    from_adjoint = matmul_of_loaded(B_at, mask_bc, adjoint_at, mask_state, once, True, tl.float32, PRECISE)
    from_adjoint *= leaving[:, None]  # [CHUNK, BLOCK_P]
    left = tl.sum(from_adjoint * tl.load(x_at, mask=mask_x, other=0.0).to(tl.float32), 1)
    dx += from_adjoint * delta[:, None]

    G = matmul_of_loaded(B_at, mask_bc, C_at, mask_bc, once, True, tl.float32, PRECISE)  # [s, t]
    scores_grad = matmul_of_loaded(x_at, mask_x, dy_at, mask_x, once, True, tl.float32, PRECISE)  # [s, t]
    decay = decay_matrix(-coarse, -fine, pairs, EXACT)  # [s, t]
    slopes = scores_grad * G * decay  # [s, t]: the gradient of Δ_s
    ddelta = left + tl.sum(slopes, 1)
    over = tl.zeros([delta.shape[0], delta.shape[0]], tl.float32)  # [s, u]
    weighted = slopes * delta[:, None]
    for i in range(once):
        over = tl.dot(weighted, tl.where(passes, 1.0, i * 1.0), input_precision=PRECISE)
    dlog_a = through + tl.sum(tl.where(passes, arrived[:, None], over + (left * delta)[:, None]), 0)
    ddelta += A * dlog_a

    dx += matmul(G * decay, dy_at, mask_x, once, False, OPERAND, COARSE) * delta[:, None]
    dG = scores_grad * decay
    dB += matmul(dG, C_at, mask_bc, once, False, OPERAND, COARSE) * delta[:, None]
    dC += matmul(tl.trans(dG * delta[:, None]), B_at, mask_bc, once, False, OPERAND, COARSE)
    return dB, dC, dx, ddelta, tl.sum(delta * dlog_a, 0)


@triton.jit(do_not_specialize=["L", "heads"])
def _ssd_scan_bwd_grads_kernel(
    x_ptr,
    dt_ptr,
    bias_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    dy_ptr,
    scale_ptr,
    states_ptr,
    adjoints_ptr,
    dx_ptr,
    ddt_ptr,
    dbc_ptr,
    sums_ptr,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    dy_stride,
    ddt_stride,
    L,
    heads,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BOTH: tl.constexpr,
    MIXER: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISE: tl.constexpr,
    COARSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx and ddt of a chunk's tokens and `heads` heads, and partials: dbc (group of heads, b·L + t, [B, C]) and sums
    (chunk of b, kind, head), the kinds being A of each direction, D, and the mixer's dt_bias of each direction.

    Program ids: chunk of a batch row, group of heads. MIXER: through softplus and A = −exp(A_log), too.
    """
    EXACT: tl.constexpr = PRECISE == "ieee"
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    KINDS: tl.constexpr = DIRECTIONS * (2 if MIXER else 1) + 1
    chunks = tl.cdiv(L, CHUNK)
    program = tl.program_id(0).to(tl.int64)
    b, chunk = program // chunks, tl.program_id(0) % chunks
    row = b * L + chunk * CHUNK
    offs_i, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_t, mask_p, mask_n = chunk * CHUNK + offs_i < L, offs_p < P, offs_n < N
    mask_x, mask_bc = mask_t[:, None] & mask_p[None, :], mask_t[:, None] & mask_n[None, :]
    mask_state = mask_p[:, None] & mask_n[None, :]
    offs_dt = offs_i * dt_stride
    B_at = B_ptr + row * B_stride + offs_i[:, None] * B_stride + offs_n[None, :]
    C_at = C_ptr + row * C_stride + offs_i[:, None] * C_stride + offs_n[None, :]
    x_ptr += row * x_stride
    dy_ptr += row * dy_stride
    dx_ptr += row * H * P
    dt_ptr += row * dt_stride
    ddt_ptr += row * ddt_stride
    sums_ptr += program * KINDS * H
    states_ptr += program * H * P * N
    adjoints_ptr += program * H * P * N
    offs_state = offs_p[:, None] * N + offs_n[None, :]
    direction_states = tl.num_programs(0).to(tl.int64) * H * P * N

    scale, before, after = None, None, None
    if BOTH:
        scale, before, after = edges(scale_ptr, chunk, L, CHUNK)

    dB = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    dC = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    always = chunk * CHUNK < L
    once = tl.num_programs(2)
    first_head = tl.program_id(1) * heads
    # Nothing is hoisted out of the loops: addresses, in the layout of every use, would take the registers of tiles. Two
    # directions are a loop, too: one after the other the compiler would keep of the first what the second needs.
    for head in tl.range(first_head, tl.minimum(first_head + heads, H), disable_licm=True):
        x_at = x_ptr + head * P + offs_i[:, None] * x_stride + offs_p[None, :]
        dy_at = dy_ptr + head * P + offs_i[:, None] * dy_stride + offs_p[None, :]
        h_at, adjoint_at = states_ptr + head * P * N + offs_state, adjoints_ptr + head * P * N + offs_state
        dx = tl.zeros([CHUNK, BLOCK_P], tl.float32)
        for direction in tl.range(DIRECTIONS, disable_licm=True):
            column = direction * H + head
            delta, slope, A = head_steps(dt_ptr, bias_ptr, A_ptr, offs_dt, mask_t, column, always, MIXER, EXACT)
            dB, dC, dx, ddelta, dA = _direction_grads(
                x_at, dy_at, B_at, C_at, h_at + direction * direction_states, adjoint_at + direction * direction_states,
                mask_x, mask_bc, mask_state, dB, dC, dx, delta, A, direction, scale, before, after, once,
                BOTH, OPERAND, PRECISE, COARSE,
            )  # fmt: skip
            forward = direction == 0  # which tokens' own terms belong to
            x = tl.load(x_at, mask=mask_x, other=0.0).to(tl.float32)  # [CHUNK, BLOCK_P]
            dy = tl.load(dy_at, mask=mask_x, other=0.0).to(tl.float32)  # [CHUNK, BLOCK_P]
            x_dy = tl.where(forward, tl.sum(x * dy, 1), 0.0)
            B = tl.load(B_at, mask=mask_bc, other=0.0).to(tl.float32)
            C = tl.load(C_at, mask=mask_bc, other=0.0).to(tl.float32)
            own = tl.sum(B * C, 1)
            dB += (x_dy * delta)[:, None] * C
            dC += (x_dy * delta)[:, None] * B
            dx += tl.where(forward, own * delta + tl.load(D_ptr + head).to(tl.float32), 0.0)[:, None] * dy
            ddt = (ddelta + own * x_dy) * slope
            tl.store(ddt_ptr + offs_i * ddt_stride + column, ddt.to(ddt_ptr.dtype.element_ty), mask=mask_t)
            tl.store(sums_ptr + column, dA * A if MIXER else dA)
            tl.store(sums_ptr + DIRECTIONS * H + head, tl.sum(x_dy, 0), mask=forward)
            if MIXER:
                tl.store(sums_ptr + (DIRECTIONS + 1) * H + column, tl.sum(tl.where(mask_t, ddt, 0.0), 0))
        dx_at = dx_ptr + head * P + offs_i[:, None] * (H * P) + offs_p[None, :]
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask_x)

    dbc_ptr += (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // chunks) * L + row) * (2 * N)
    dbc_at = dbc_ptr + offs_i[:, None] * (2 * N) + offs_n[None, :]
    tl.store(dbc_at, dB, mask=mask_bc)
    tl.store(dbc_at + N, dC, mask=mask_bc)
