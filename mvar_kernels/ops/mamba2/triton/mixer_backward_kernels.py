"""The kernels of mamba2_mixer's backward that are not ssd_scan's: mixer_backward.py says what each is for."""

import triton
import triton.language as tl

from mvar_kernels.ops.mamba2.triton.backward_kernels import (
    PLANES,
    edges,
    exponent,
    gate,
    operand,
    packed_weights,
    pair_decays,
    power,
    prefix_sums,
    tile_matmul,
)
from mvar_kernels.ops.mamba2.triton.common import (
    BEFORE_GATE,
    ONLY_GATE,
    conv_rows,
    group_of,
    load_rows,
    load_skip,
    store_rows,
)
from mvar_kernels.triton_math import divide


@triton.jit
def _input_row(xbc_ptr, conv_ptr, stride_l, channels, token, offs_c, mask_c, L, TAPS: tl.constexpr):
    """A row of [conv state, xBC], in float32, 0 where there is none. token: from −TAPS+1 on of the conv state."""
    new = tl.load(xbc_ptr + token * stride_l + offs_c, mask=mask_c & (token >= 0) & (token < L), other=0.0)
    is_old = (token < 0) & (token >= 1 - TAPS)
    old = tl.load(conv_ptr + (token + TAPS - 1) * channels + offs_c, mask=mask_c & is_old, other=0.0)
    return new.to(tl.float32) + old.to(tl.float32)


@triton.jit
def _convolved(weights, rows, TAPS: tl.constexpr):
    v = weights[TAPS]
    for tap in tl.static_range(TAPS):
        v = tl.fma(weights[tap], rows[tap], v)
    return v


@triton.jit
def _convolved_x(
    xbc_ptr, xbc_stride, conv_ptr, channels, weight_ptr, x_ptr, start, offs_p, mask_p, L, E, TAPS: tl.constexpr,
    EXACT: tl.constexpr, OPERAND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk's x after the convolution and SiLU, which is stored [CHUNK, BLOCK_P]. The pointers: at offs_p = 0."""
    weights = packed_weights(weight_ptr, channels, offs_p, mask_p, TAPS)
    v = conv_rows(xbc_ptr, xbc_stride, conv_ptr, channels, weights, 0, offs_p, mask_p, start, L, TAPS, CHUNK)
    x = operand(gate(v, EXACT)[0], OPERAND)
    store_rows(x_ptr, E, x, start, offs_p, mask_p, L, CHUNK)
    return x


@triton.jit(do_not_specialize=["L"])
def _mamba2_mixer_bwd_outputs_kernel(
    xbc_ptr,
    conv_ptr,
    weight_ptr,
    x_ptr,
    steps_ptr,
    bc_ptr,
    D_ptr,
    scale_ptr,
    first_ptr,
    states_ptr,
    y_ptr,
    xbc_stride,
    L,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNEL_D: tl.constexpr,
    TAPS: tl.constexpr,
    BOTH: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """x after the convolution and SiLU, y, both (B·L, H·P), and the states that enter the chunks (b, chunk, head,
    direction, 0, P, N), of a row's head. b and H: as in backward_kernels.py.

    The direction inside the scales first, whose states the same program reads back. Tokens' own terms and the skip are
    the diagonal of the matrix that x is multiplied with. Program ids: batch row and head, rows of P.
    """
    sequence = tl.program_id(0).to(tl.int64)
    b, head = sequence // H, tl.program_id(0) % H
    chunks = tl.cdiv(L, CHUNK)
    DIRECTIONS: tl.constexpr = 2 if BOTH else 1
    STEPS: tl.constexpr = (DIRECTIONS * H + 1) * PLANES * CHUNK  # of a chunk
    STATES: tl.constexpr = DIRECTIONS * H * 2 * P * N
    offs_i, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    first_p = tl.program_id(1) * BLOCK_P
    mask_p, mask_n = offs_p < P - first_p, offs_n < N
    mask_state = mask_p[:, None] & mask_n[None, :]
    mask_bc = (offs_i >= 0)[:, None] & mask_n[None, :]
    offs_state = offs_p[:, None] * N + offs_n[None, :]
    offs_bc = offs_i[:, None] * (2 * N) + offs_n[None, :]
    E: tl.constexpr = GROUPS * H * P
    CHANNELS: tl.constexpr = E + 2 * GROUPS * N
    row, group = group_of(b, GROUPS)
    channel = (group * H + head) * P + first_p
    xbc_ptr += row * L * xbc_stride + channel
    conv_ptr += row * (TAPS - 1) * CHANNELS + channel
    weight_ptr += channel
    x_ptr += row * L * E + channel
    y_ptr += row * L * E + channel
    bc_ptr += b * chunks * CHUNK * (2 * N)
    states_ptr += b * chunks * STATES + head * DIRECTIONS * 2 * P * N + first_p * N
    back_states_ptr = states_ptr + 2 * P * N
    steps_ptr += b * chunks * STEPS
    own_ptr = steps_ptr + DIRECTIONS * H * PLANES * CHUNK
    steps_ptr += head * PLANES * CHUNK
    back_steps_ptr = steps_ptr + H * PLANES * CHUNK
    D, skip = load_skip(D_ptr, group * H + head, first_p, offs_p, mask_p, P, CHANNEL_D)

    if BOTH:
        state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for left in range(chunks):
            chunk = tl.cast(chunks - 1 - left, tl.int64)
            start = chunk * CHUNK
            tl.store(back_states_ptr + chunk * STATES + offs_state, operand(state, OPERAND), mask=mask_state)
            x = _convolved_x(
                *(xbc_ptr, xbc_stride, conv_ptr, CHANNELS, weight_ptr, x_ptr, start, offs_p, mask_p, L),
                *(E, TAPS, EXACT, OPERAND, CHUNK),
            )
            B = tl.load(bc_ptr + start * (2 * N) + offs_bc, mask=mask_bc, other=0.0)
            at = back_steps_ptr + chunk * STEPS
            coarse, fine, all_coarse, all_fine = prefix_sums(at, offs_i, 1, CHUNK, EXACT)
            scale, before, after = edges(scale_ptr, chunk, L, CHUNK)
            weight = power(exponent(coarse, fine, EXACT), EXACT) * tl.load(at + offs_i)
            weight = tl.where(scale == before, weight, 0.0)
            chunk_decay = tl.where(before == after, power(exponent(all_coarse, all_fine, EXACT), EXACT), 0.0)
            came = tl.trans(operand(x.to(tl.float32) * weight[:, None], OPERAND))
            state = chunk_decay * state + tl.dot(came, B, input_precision=PRECISE)
        tl.debug_barrier()

    state = tl.load(first_ptr + sequence * P * N + first_p * N + offs_state, mask=mask_state, other=0.0)
    for number in range(chunks):
        chunk = tl.cast(number, tl.int64)
        start = chunk * CHUNK
        h = operand(state, OPERAND)
        tl.store(states_ptr + chunk * STATES + offs_state, h, mask=mask_state)
        if BOTH:
            x = load_rows(x_ptr, E, start, offs_p, mask_p, L, CHUNK)
        else:
            x = _convolved_x(
                *(xbc_ptr, xbc_stride, conv_ptr, CHANNELS, weight_ptr, x_ptr, start, offs_p, mask_p, L),
                *(E, TAPS, EXACT, OPERAND, CHUNK),
            )
        bc_at = bc_ptr + start * (2 * N) + offs_bc
        B = tl.load(bc_at, mask=mask_bc, other=0.0)
        C = tl.load(bc_at + N, mask=mask_bc, other=0.0)
        at = steps_ptr + chunk * STEPS
        delta = tl.load(at + offs_i)
        coarse, fine, all_coarse, all_fine = prefix_sums(at, offs_i, 0, CHUNK, EXACT)
        mix = pair_decays(-coarse, -fine, offs_i[:, None] > offs_i[None, :], EXACT) * delta[None, :]  # [t, s]
        y = tl.dot(C, tl.trans(h), input_precision=PRECISE) * power(exponent(coarse, fine, EXACT), EXACT)[:, None]
        if BOTH:
            at = back_steps_ptr + chunk * STEPS
            before_coarse, before_fine, end_coarse, end_fine = prefix_sums(at, offs_i, 1, CHUNK, EXACT)
            scale, before, after = edges(scale_ptr, chunk, L, CHUNK)
            entering = power(exponent(end_coarse - before_coarse, end_fine - before_fine, EXACT), EXACT)
            entering = tl.where(scale == after, entering, 0.0)
            back = tl.load(back_states_ptr + chunk * STATES + offs_state, mask=mask_state, other=0.0)
            y += tl.dot(C, tl.trans(back), input_precision=PRECISE) * entering[:, None]
            later = (offs_i[:, None] < offs_i[None, :]) & (scale[:, None] == scale[None, :])
            mix += pair_decays(before_coarse, before_fine, later, EXACT) * tl.load(at + offs_i)[None, :]
        own = tl.load(own_ptr + chunk * STEPS + offs_i) * delta + D
        mix *= tile_matmul(C, tl.trans(B), tl.num_programs(2), PRECISE)
        mix = tl.where(offs_i[:, None] == offs_i[None, :], own[:, None], mix)
        y += tl.dot(operand(mix, OPERAND), x, input_precision=PRECISE)
        if CHANNEL_D:
            y += skip[None, :] * x.to(tl.float32)
        store_rows(y_ptr, E, operand(y, OPERAND), start, offs_p, mask_p, L, CHUNK)
        weight = power(exponent(all_coarse - coarse, all_fine - fine, EXACT), EXACT) * delta
        chunk_decay = power(exponent(all_coarse, all_fine, EXACT), EXACT)
        came = tl.trans(operand(x.to(tl.float32) * weight[:, None], OPERAND))
        state = chunk_decay * state + tl.dot(came, B, input_precision=PRECISE)


@triton.jit(do_not_specialize=["rows"])
def _mamba2_mixer_bwd_norm_kernel(
    y_ptr,
    z_ptr,
    grad_ptr,
    weight_ptr,
    dz_ptr,
    sums_ptr,
    z_stride,
    grad_stride,
    dz_stride,
    rows,
    E,
    eps,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dz, dy in y's place, and a partial of norm_weight's gradient (program, GROUPS·E). Program ids: ROWS tokens, and
    E channels, a group of GROUPS. NORM: as in the forward.

    A token's row stays in registers between the sums over it and what needs them.
    """
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    if GROUPS > 1:
        channel = tl.program_id(1) * E
        y_ptr += channel
        z_ptr += channel
        grad_ptr += channel
        dz_ptr += channel
        if NORM != ONLY_GATE:
            weight_ptr += channel
            sums_ptr += channel
    if NORM != ONLY_GATE:
        weight = tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    width = tl.cast(E, tl.float32)
    sums = tl.zeros([BLOCK_E], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        y = tl.load(y_ptr + row * (GROUPS * E) + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row * z_stride + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        silu, slope = gate(z, EXACT)
        if NORM == ONLY_GATE:
            dsilu, dy = grad * y, grad * silu
        else:
            if NORM == BEFORE_GATE:
                gated, dnormed = y, grad * silu
            else:
                gated, dnormed = y * silu, grad
            weighted, product = dnormed * weight, dnormed * gated
            squares = tl.sum(gated * gated, 0)
            products = tl.sum(product * weight, 0)
            r = divide(1.0, tl.sqrt_rn(divide(squares, width, EXACT) + eps), EXACT)
            m = r * r * r * divide(products, width, EXACT)
            dgated = r * weighted - m * gated
            sums = tl.fma(product, r, sums)
            if NORM == BEFORE_GATE:
                dsilu, dy = grad * weight * (y * r), dgated
            else:
                dsilu, dy = dgated * y, dgated * silu
        tl.store(dz_ptr + row * dz_stride + offs_e, (dsilu * slope).to(dz_ptr.dtype.element_ty), mask=mask_e)
        tl.store(y_ptr + row * (GROUPS * E) + offs_e, operand(dy, OPERAND), mask=mask_e)
    if NORM != ONLY_GATE:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * (GROUPS * E) + offs_e, sums, mask=mask_e)


@triton.jit(do_not_specialize=["L"])
def _mamba2_mixer_bwd_conv_grads_kernel(
    dx_ptr,
    xbc_ptr,
    conv_ptr,
    weight_ptr,
    dlast_ptr,
    dxbc_ptr,
    dconv_ptr,
    sums_ptr,
    dx_stride,
    xbc_stride,
    dxbc_stride,
    L,
    count,
    channels,
    TAPS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From dx (B·L, count), of `count` channels after SiLU, to dxbc, dconv and the weights' gradients from ROWS tokens:
    partials (program, taps and bias, channels). Program ids: ROWS tokens of a batch row, from 0 to L+TAPS−2; channels.

    Token t completes row t − TAPS + 1. A thread keeps its channels' last rows, and dv of the last tokens, in registers
    and goes through the tokens, after the TAPS−1 ones before its own.
    """
    blocks = tl.cdiv(L + TAPS - 1, ROWS)
    program = tl.program_id(0).to(tl.int64)
    b, start = program // blocks, (program % blocks) * ROWS
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < count
    dx_ptr += b * L * dx_stride + offs_c
    xbc_ptr += b * L * xbc_stride
    dxbc_ptr += b * L * dxbc_stride + offs_c
    conv_ptr += b * (TAPS - 1) * channels
    dconv_ptr += b * (TAPS - 1) * channels + offs_c
    dlast_ptr += b * (TAPS - 1) * channels + offs_c
    weights = packed_weights(weight_ptr, channels, offs_c, mask_c, TAPS)
    rows, grads, sums = (), (), (tl.zeros([BLOCK_C], tl.float32),)
    for tap in tl.static_range(TAPS - 1):
        token = start - 2 * (TAPS - 1) + tap
        rows = rows + (_input_row(xbc_ptr, conv_ptr, xbc_stride, channels, token, offs_c, mask_c, L, TAPS),)  # type: ignore[assignment]
    for tap in tl.static_range(TAPS - 1):
        token = start - (TAPS - 1) + tap
        rows = rows + (_input_row(xbc_ptr, conv_ptr, xbc_stride, channels, token, offs_c, mask_c, L, TAPS),)  # type: ignore[assignment]
        dx = tl.load(dx_ptr + token * dx_stride, mask=mask_c & (token >= 0) & (token < L), other=0.0).to(tl.float32)
        grads = grads + (dx * gate(_convolved(weights, rows[tap:], TAPS), EXACT)[1],)  # type: ignore[assignment]
        sums = sums + (tl.zeros([BLOCK_C], tl.float32),)  # type: ignore[assignment]
    rows = rows[TAPS - 1 :]  # type: ignore[assignment]
    if TAPS > 0:
        sums = sums + (tl.zeros([BLOCK_C], tl.float32),)  # type: ignore[assignment]
    for first in range(start, tl.minimum(start + ROWS, L + TAPS - 1), UNROLL):
        dxs = ()
        for i in tl.static_range(UNROLL):
            mask = mask_c & (first + i < L)
            row = tl.load(xbc_ptr + (first + i) * xbc_stride + offs_c, mask=mask, other=0.0)
            rows = rows + (row.to(tl.float32),)  # type: ignore[assignment]
            dxs = dxs + (tl.load(dx_ptr + (first + i) * dx_stride, mask=mask, other=0.0).to(tl.float32),)  # type: ignore[assignment]
        for i in tl.static_range(UNROLL):
            dv = dxs[i] * gate(_convolved(weights, rows[i : i + TAPS], TAPS), EXACT)[1]
            grads = grads + (dv,)  # type: ignore[assignment]
            past = first + i - L  # the row of the new conv state that this token completes
            is_last = mask_c & (past >= 0) & (past < TAPS - 1)
            drow = tl.load(dlast_ptr + past * channels, mask=is_last, other=0.0).to(tl.float32)
            for tap in tl.static_range(TAPS):
                drow = tl.fma(weights[tap], grads[i + TAPS - 1 - tap], drow)
            row = first + i - (TAPS - 1)
            tl.store(
                dxbc_ptr + row * dxbc_stride, drow.to(dxbc_ptr.dtype.element_ty), mask=mask_c & (row >= 0) & (row < L)
            )
            is_old = mask_c & (row < 0)
            tl.store(dconv_ptr + (row + TAPS - 1) * channels, drow.to(dconv_ptr.dtype.element_ty), mask=is_old)
        added = ()
        for tap in tl.static_range(TAPS + 1):
            part = tl.zeros([BLOCK_C], tl.float32)
            for i in tl.static_range(UNROLL):
                dv = grads[i + TAPS - 1]
                part = tl.fma(dv, rows[i + tap], part) if tap < TAPS else part + dv
            added = added + (sums[tap] + part,)  # type: ignore[assignment]
        sums = added  # type: ignore[assignment]
        rows, grads = rows[UNROLL:], grads[UNROLL:]  # type: ignore[assignment]
    sums_ptr += program * (TAPS + 1) * channels + offs_c
    for tap in tl.static_range(TAPS + 1):
        tl.store(sums_ptr + tap * channels, sums[tap], mask=mask_c)
