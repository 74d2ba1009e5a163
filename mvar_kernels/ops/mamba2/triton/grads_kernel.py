"""The kernel of ssd_scan's backward that gives all gradients of a chunk; the formulas are in backward_kernels.py."""

import triton
import triton.language as tl

from mvar_kernels.ops.mamba2.triton.backward_kernels import (
    PLANES,
    edges,
    exponent,
    operand,
    pair_decays,
    power,
    prefix_sums,
    tile_matmul,
)
from mvar_kernels.ops.mamba2.triton.common import finite_rate, group_of
from mvar_kernels.triton_math import exp


@triton.jit
def _matmul(a, b_at, b_mask, once, TRANSPOSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """a b, or a bᵀ, with both operands converted to OPERAND; b is loaded.

    `once` is 1, the grid's third size, which the compiler does not know. The loop keeps it from loading operands long
    before, from computing the operand of a matmul again for each layout that it is needed in, and from treating matmuls
    as one chain, in which all warps lie along one side and hold all of the other operand.
    """
    out = tl.zeros([a.shape[0], b_at.shape[0] if TRANSPOSE else b_at.shape[1]], tl.float32)
    a = operand(a, OPERAND)
    for i in range(once):
        b = operand(tl.load(b_at + i * 64, mask=b_mask, other=0.0), OPERAND)
        out = tl.dot(a, tl.trans(b) if TRANSPOSE else b, input_precision=PRECISION)
    return out


@triton.jit
def _matmul_of_loaded(
    a_at, a_mask, b_at, b_mask, once, TRANSPOSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """_matmul, with a loaded in the loop as well."""
    out = tl.zeros([a_at.shape[0], b_at.shape[0] if TRANSPOSE else b_at.shape[1]], tl.float32)
    for i in range(once):
        a = operand(tl.load(a_at + i * 64, mask=a_mask, other=0.0), OPERAND)
        b = operand(tl.load(b_at + i * 64, mask=b_mask, other=0.0), OPERAND)
        out = tl.dot(a, tl.trans(b) if TRANSPOSE else b, input_precision=PRECISION)
    return out


@triton.jit
def _direction_grads(
    x_at, dy_at, bc_at, h_at, mask_x, mask_bc, mask_state, dB, dC, dx, at, A, direction, scale, before, after, once,
    P: tl.constexpr, N: tl.constexpr, BOTH: tl.constexpr, EXACT: tl.constexpr, OPERAND: tl.constexpr,
    PRECISE: tl.constexpr, COARSE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One direction of one head in one chunk. at: its Δ; h and λ are (P, N) as they enter.

    Registers are what this kernel is short of: tiles are loaded, and B Cᵀ and x dyᵀ computed, again rather than kept.
    Nor is a sum over heads the accumulator of a matmul: Triton would lay it out with every warp's rows twice.
    Returns dB, dC and dx with their parts added, the gradient of Δ and each token's part of that of A, all without
    tokens' own terms.
    """
    offs = tl.arange(0, CHUNK)
    delta = tl.load(at + offs)
    coarse, fine, all_coarse, all_fine = prefix_sums(at, offs, direction, CHUNK, EXACT)
    entering = power(exponent(coarse, fine, EXACT), EXACT)
    leaving = power(exponent(all_coarse - coarse, all_fine - fine, EXACT), EXACT)
    chunk_decay = power(exponent(all_coarse, all_fine, EXACT), EXACT)
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
        h = tl.load(h_at + i * 64, mask=mask_state, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_N]
        adjoint = tl.load(h_at + P * N + i * 64, mask=mask_state, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_N]
        through = chunk_decay * tl.sum(tl.sum(h * adjoint, 1), 0)
    from_h = _matmul_of_loaded(dy_at, mask_x, h_at, mask_state, once, False, OPERAND, PRECISE)
    from_h *= entering[:, None]  # [CHUNK, BLOCK_N]
    dC += from_h
    arrived = tl.sum(from_h * tl.load(bc_at + N, mask=mask_bc, other=0.0).to(tl.float32), 1)
    xs = _matmul_of_loaded(x_at, mask_x, h_at + P * N, mask_state, once, False, OPERAND, COARSE)
    dB += xs * (leaving * delta)[:, None]  # [CHUNK, BLOCK_N]
    from_adjoint = _matmul_of_loaded(bc_at, mask_bc, h_at + P * N, mask_state, once, True, OPERAND, PRECISE)
    from_adjoint *= leaving[:, None]  # [CHUNK, BLOCK_P]
    left = tl.sum(from_adjoint * tl.load(x_at, mask=mask_x, other=0.0).to(tl.float32), 1)
    dx += from_adjoint * delta[:, None]

    G = _matmul_of_loaded(bc_at, mask_bc, bc_at + N, mask_bc, once, True, OPERAND, PRECISE)  # [s, t]
    scores_grad = _matmul_of_loaded(x_at, mask_x, dy_at, mask_x, once, True, OPERAND, PRECISE)  # [s, t]
    decay = pair_decays(coarse, fine, pairs, EXACT)  # [s, t]
    slopes = scores_grad * G * decay  # [s, t]: the gradient of Δ_s
    ddelta = left + tl.sum(slopes, 1)
    over = tl.zeros([CHUNK, CHUNK], tl.float32)  # [s, u]
    weighted = operand(slopes * delta[:, None], OPERAND)
    for i in range(once):
        over = tl.dot(weighted, operand(tl.where(passes, 1.0, i * 1.0), OPERAND), input_precision=PRECISE)
    dlog_a = through + tl.sum(tl.where(passes, arrived[:, None], over + (left * delta)[:, None]), 0)
    ddelta += A * dlog_a

    dx += _matmul(G * decay, dy_at, mask_x, once, False, OPERAND, COARSE) * delta[:, None]
    dG = scores_grad * decay
    dB += _matmul(dG, bc_at + N, mask_bc, once, False, OPERAND, COARSE) * delta[:, None]
    dC += _matmul(tl.trans(dG * delta[:, None]), bc_at, mask_bc, once, False, OPERAND, COARSE)
    return dB, dC, dx, ddelta, delta * dlog_a


@triton.jit
def _wgmma_direction_grads(
    x, dy, bc_at, mask_bc, h_at, mask_state, dB, dC, dx, arrived, at, own_G, A, direction, scale, before, after, once,
    P: tl.constexpr, N: tl.constexpr, BOTH: tl.constexpr, OPERAND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """_direction_grads for bfloat16 on Hopper: of chunks of 64 tokens, whose tiles stay in shared memory.

    own_G: what dy_s itself has in dx_s. arrived: what the heads before gave to Σ_n C dC, whose difference is what comes
    to each token, from h and in the pairs; what goes from each in the pairs is a row of dG ⊙ G. Both are of dG as it is
    rounded and of the same products of B and C, so that what starts and ends on one side of a step cancels. Sums of
    columns, which this avoids, take 300 of 2,000 instructions.
    Returns dB, dC and dx with their parts added, arrived of all heads so far, the gradient of Δ and each token's
    part of that of A, both without tokens' own terms, and x·dy.
    """
    offs = tl.arange(0, CHUNK)
    delta = tl.maximum(tl.load(at + offs), 2.0**-60)  # it is divided by; beside other tokens' this is nothing
    sums, _, total, _ = prefix_sums(at, offs, direction, CHUNK, False)
    entering, leaving, chunk_decay = power(sums, False), power(total - sums, False), power(total, False)
    pairs = offs[:, None] < offs[None, :]  # [s, t]: whether s reaches t
    back = direction == 1
    if BOTH:
        entering, leaving = (
            tl.where(back, tl.where(scale == after, leaving, 0.0), entering),
            tl.where(back, tl.where(scale == before, entering, 0.0), leaving),
        )
        chunk_decay = tl.where(back & (before != after), 0.0, chunk_decay)
        sums = tl.where(back, -sums, sums)
        pairs = tl.where(back, (offs[:, None] > offs[None, :]) & (scale[:, None] == scale[None, :]), pairs)

    B = tl.load(bc_at, mask=mask_bc, other=0.0)  # [CHUNK, BLOCK_N]
    C = tl.load(bc_at + N, mask=mask_bc, other=0.0)  # [CHUNK, BLOCK_N]
    decay = pair_decays(sums, sums, pairs, False)  # [s, t]
    scores_grad = tile_matmul(x, tl.trans(dy), once, "ieee")  # [s, t]
    diagonal = offs[:, None] == offs[None, :]
    x_dy = tl.sum(tl.where(diagonal, scores_grad, 0.0), 1)
    dG = operand(scores_grad * decay * delta[:, None], OPERAND)
    dB = tl.dot(dG, C, dB, input_precision="ieee")
    dC = tl.dot(tl.trans(dG), B, dC, input_precision="ieee")
    G = tile_matmul(B, tl.trans(C), once, "ieee")  # [s, t]
    started = tl.sum(dG.to(tl.float32) * G, 1)
    mix = operand(tl.where(diagonal, own_G[:, None], decay * G * delta[:, None]), OPERAND)  # [s, t]
    if BOTH:
        dx = tl.dot(mix, dy, dx, input_precision="ieee")  # [s, BLOCK_P]
    else:
        dx = tl.dot(mix, dy, input_precision="ieee")  # [s, BLOCK_P]

    h = tl.load(h_at, mask=mask_state, other=0.0)  # [BLOCK_P, BLOCK_N]
    adjoint = tl.load(h_at + P * N, mask=mask_state, other=0.0)  # [BLOCK_P, BLOCK_N]
    through = chunk_decay * tl.sum(h.to(tl.float32) * adjoint.to(tl.float32))
    dC += tl.dot(dy, h, input_precision="ieee") * entering[:, None]
    from_x = tl.dot(x, adjoint, input_precision="ieee") * leaving[:, None]  # [s, BLOCK_N]
    left = tl.sum(from_x * B.to(tl.float32), 1) * delta
    dB += from_x * delta[:, None]
    dx += tl.dot(B, tl.trans(adjoint), input_precision="ieee") * (leaving * delta)[:, None]
    started += left
    all_arrived = tl.sum(dC * C.to(tl.float32), 1)
    here = (all_arrived - arrived) - started
    upto = tl.cumsum(here, 0)
    dlog_a = (through + tl.sum(left, 0)) + tl.where(back, upto, tl.sum(here, 0) - upto + here)
    # Where a step lets nothing pass, what is left of the difference would be multiplied by an A of any size.
    dlog_a = tl.where(delta * A > -104.0, dlog_a, 0.0)
    ddelta = started / delta + A * dlog_a
    return dB, dC, dx, all_arrived, ddelta, delta * dlog_a, x_dy


@triton.jit(do_not_specialize=["L", "heads"])
def _ssd_scan_bwd_grads_kernel(
    x_ptr,
    steps_ptr,
    A_ptr,
    bc_ptr,
    D_ptr,
    dy_ptr,
    scale_ptr,
    states_ptr,
    dx_ptr,
    dbc_ptr,
    L,
    heads,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNEL_D: tl.constexpr,
    BOTH: tl.constexpr,
    MIXER: tl.constexpr,
    WGMMA: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISE: tl.constexpr,
    COARSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx of a chunk's tokens and `heads` heads, the gradient of dt and each token's part of those of A and D in the
    last three planes of steps, and partials of dB and dC: dbc (`heads` heads, b·L + t, [B, C] of all groups).

    Program ids: chunk of a batch row, `heads` heads. MIXER: through softplus and A = −exp(A_log), too. x, dy and dx
    are (B·L, GROUPS·H·P), contiguous.
    """
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    chunks = tl.cdiv(L, CHUNK)
    program = tl.program_id(0).to(tl.int64)
    b, chunk = program // chunks, tl.program_id(0) % chunks
    row, group = group_of(b, GROUPS)
    row = row * L + chunk * CHUNK
    E: tl.constexpr = GROUPS * H * P
    offs_i, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_t, mask_p, mask_n = chunk * CHUNK + offs_i < L, offs_p < P, offs_n < N
    mask_x, mask_bc = mask_t[:, None] & mask_p[None, :], mask_t[:, None] & mask_n[None, :]
    mask_state = mask_p[:, None] & mask_n[None, :]
    x_ptr += row * E + group * (H * P)
    dy_ptr += row * E + group * (H * P)
    dx_ptr += row * E + group * (H * P)
    A_ptr += group * H
    D_ptr += group * (H * P if CHANNEL_D else H)
    bc_ptr += program * CHUNK * (2 * N)
    steps_ptr += program * (DIRECTIONS * H + 1) * PLANES * CHUNK
    states_ptr += program * H * DIRECTIONS * 2 * P * N
    offs_x = offs_i[:, None] * E + offs_p[None, :]
    offs_state = offs_p[:, None] * N + offs_n[None, :]
    bc_at = bc_ptr + offs_i[:, None] * (2 * N) + offs_n[None, :]

    scale, before, after = None, None, None
    if BOTH:
        scale, before, after = edges(scale_ptr, chunk, L, CHUNK)

    dB = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    dC = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    own_dG = tl.zeros([CHUNK], tl.float32)
    arrived = tl.zeros([CHUNK], tl.float32)
    once = tl.num_programs(2)
    first_head = tl.program_id(1) * heads
    # Nothing is hoisted out of the loops: addresses, in the layout of every use, would take the registers of tiles. Two
    # directions are a loop, too: one after the other the compiler would keep of the first what the second needs.
    for head in tl.range(first_head, tl.minimum(first_head + heads, H), disable_licm=True):
        x_at, dy_at = x_ptr + head * P + offs_x, dy_ptr + head * P + offs_x
        h_at = states_ptr + head * (DIRECTIONS * 2 * P * N) + offs_state
        dx = tl.zeros([CHUNK, BLOCK_P], tl.float32)
        if WGMMA:
            x, dy = tl.load(x_at, mask=mask_x, other=0.0), tl.load(dy_at, mask=mask_x, other=0.0)
            x, dy = operand(x, OPERAND), operand(dy, OPERAND)  # [CHUNK, BLOCK_P]
        for direction in tl.range(DIRECTIONS, disable_licm=True):
            column = direction * H + head
            at = steps_ptr + column * (PLANES * CHUNK)
            A = tl.load(A_ptr + direction * (GROUPS * H) + head).to(tl.float32)
            if MIXER:
                A = -exp(A, EXACT)
            A = finite_rate(A)
            forward = direction == 0  # which tokens' own terms and the skip belong to
            own_at = steps_ptr + DIRECTIONS * H * PLANES * CHUNK + offs_i
            if WGMMA:
                own = tl.load(own_at)
                own_G = own * tl.load(at + offs_i)
                if not CHANNEL_D:
                    own_G += tl.load(D_ptr + head).to(tl.float32)
                own_G = tl.where(forward, own_G, 0.0)
                dB, dC, dx, arrived, ddt, A_grad, x_dy = _wgmma_direction_grads(
                    x, dy, bc_at, mask_bc, h_at + direction * (2 * P * N), mask_state, dB, dC, dx, arrived, at, own_G,
                    A, direction, scale, before, after, once, P, N, BOTH, OPERAND, CHUNK,
                )  # fmt: skip
                x_dy = tl.where(forward, x_dy, 0.0)
                own_dG += x_dy * tl.load(at + offs_i)
            else:
                dB, dC, dx, ddt, A_grad = _direction_grads(
                    x_at, dy_at, bc_at, h_at + direction * (2 * P * N), mask_x, mask_bc, mask_state, dB, dC, dx, at, A,
                    direction, scale, before, after, once, P, N, BOTH, EXACT, OPERAND, PRECISE, COARSE, CHUNK,
                )  # fmt: skip
                x = tl.load(x_at, mask=mask_x, other=0.0).to(tl.float32)  # [CHUNK, BLOCK_P]
                dy = tl.load(dy_at, mask=mask_x, other=0.0).to(tl.float32)  # [CHUNK, BLOCK_P]
                x_dy = tl.where(forward, tl.sum(x * dy, 1), 0.0)
                delta, own = tl.load(at + offs_i), tl.load(own_at)
                dB += (x_dy * delta)[:, None] * tl.load(bc_at + N, mask=mask_bc, other=0.0).to(tl.float32)
                dC += (x_dy * delta)[:, None] * tl.load(bc_at, mask=mask_bc, other=0.0).to(tl.float32)
                own_G = own * delta
                if not CHANNEL_D:
                    own_G += tl.load(D_ptr + head).to(tl.float32)
                dx += tl.where(forward, own_G, 0.0)[:, None] * dy
            ddt += own * x_dy
            if MIXER:
                ddt *= tl.load(at + CHUNK + offs_i)
                A_grad *= A
            tl.store(at + 4 * CHUNK + offs_i, tl.where(mask_t, ddt, 0.0))
            tl.store(at + 5 * CHUNK + offs_i, tl.where(mask_t, A_grad, 0.0))  # Δ is 0 there, but divided by
            tl.store(at + 6 * CHUNK + offs_i, x_dy)
        if CHANNEL_D:
            skip = tl.load(D_ptr + head * P + offs_p, mask=mask_p, other=0.0).to(tl.float32)
            dx += skip[None, :] * tl.load(dy_at, mask=mask_x, other=0.0).to(tl.float32)
        tl.store(dx_ptr + head * P + offs_x, dx.to(dx_ptr.dtype.element_ty), mask=mask_x)

    if WGMMA:
        dB += own_dG[:, None] * tl.load(bc_at + N, mask=mask_bc, other=0.0).to(tl.float32)
        dC += own_dG[:, None] * tl.load(bc_at, mask=mask_bc, other=0.0).to(tl.float32)
    batch_rows = (tl.num_programs(0) // (chunks * GROUPS)).to(tl.int64) * L
    dbc_at = dbc_ptr + (tl.program_id(1) * batch_rows + row + offs_i[:, None]) * (2 * GROUPS * N) + offs_n[None, :]
    dbc_at += group * N
    tl.store(dbc_at, dB, mask=mask_bc)
    tl.store(dbc_at + GROUPS * N, dC, mask=mask_bc)
