"""The forward kernels of ssd_scan and mamba2_mixer.

One program owns a head of a batch row, or BLOCK_P of its P channels, and walks the sequence in chunks of CHUNK
tokens with h in registers, float32 [BLOCK_P, BLOCK_N]. With S the prefix sums of log decays in the chunk and
W[t, s] = exp(S_t − S_s) Δ_s for s < t (common.py), a chunk is four small matmuls:

    y_t = ((C Bᵀ ⊙ W) x)_t + exp(S_t) h C_t + (D + Δ_t C_t·B_t) x_t
    h ← exp(S_end) h + (x ⊙ Δ exp(S_end − S))ᵀ B

The chunk's y is made transposed, [BLOCK_P, CHUNK]: then h is the left operand of its matmul and the warps divide
its rows among them, where each would hold all of C on the left. On Hopper h goes from one matmul to the next
without leaving its registers.

Precision: with bfloat16 inputs the operands of the three matmuls that give y are rounded to bfloat16, and
summed in float32; with float16 inputs to tf32, which is as precise and has float32's range: C·B, h and x after its
convolution leave float16's where y fits. A token's own term stays in float32, together with the skip: where Δ is
large they are all there is to y, a factor common to a head's channels, which RMSNorm scales up again where it nearly
cancels. h is an output in float32 and lives for the sequence, so its own matmul keeps float32's precision:
three tf32 matmuls (tf32x3). It is added to the decayed h outside the tensor cores, whose accumulators truncate.

Bidirectional: the backward direction only adds to W's upper triangle, so C Bᵀ and the matmul with x are shared.
What enters a chunk from its right, g, is found in a first sweep from right to left and kept in a workspace
(B, H, chunks, P, N) of bfloat16 or float32, as it is only ever an operand of C gᵀ. The same program reads it
back in the sweep from left to right.
"""

import triton
import triton.language as tl

from mvar_kernels.ops.mamba2.triton.common import (
    backward_decays,
    conv_silu,
    conv_weights,
    finite_rate,
    forward_decays,
    load_rows,
    silu,
    softplus,
    softplus_steps,
    steps,
    store_rows,
)
from mvar_kernels.triton_math import divide, exp


@triton.jit
def _operand(v, DTYPE: tl.constexpr):
    """v as an operand of a matmul that gives y. tf32 is rounded here, as tensor cores truncate; NaN and inf stay."""
    if DTYPE != tl.float16:
        operand = v.to(DTYPE)
    elif v.dtype == tl.float16:
        operand = v.to(tl.float32)
    else:
        rounded = (v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        operand = tl.where(tl.abs(v) < 3.4e38, rounded.to(tl.float32, bitcast=True), v)
    return operand


@triton.jit
def _chunk(x, B, C, h, from_right, inside, from_start, from_end, BOTH: tl.constexpr, DTYPE: tl.constexpr):
    """y without the skip, float32 [CHUNK, BLOCK_P]. B, C and x: float32, or already in DTYPE, that of the inputs."""
    PRECISION: tl.constexpr = "tf32" if DTYPE == tl.float16 else "ieee"
    Ct = tl.trans(_operand(C, DTYPE))
    scores = tl.dot(_operand(B, DTYPE), Ct, input_precision=PRECISION) * tl.trans(inside)  # [s, t]
    y = tl.dot(_operand(h, DTYPE), Ct, input_precision=PRECISION) * from_start[None, :]
    if BOTH:
        y += tl.dot(_operand(from_right, DTYPE), Ct, input_precision=PRECISION) * from_end[None, :]
    return tl.trans(y + tl.dot(tl.trans(_operand(x, DTYPE)), _operand(scores, DTYPE), input_precision=PRECISION))


@triton.jit
def _advance(state, chunk_decay, x, weights, B, PRECISION: tl.constexpr):
    """chunk_decay · state + (x ⊙ weights)ᵀ B in float32 [BLOCK_P, BLOCK_N]."""
    return tl.fma(state, chunk_decay, tl.dot(tl.trans(x * weights[:, None]), B, input_precision=PRECISION))


@triton.jit
def _scales(scale_ptr, start, L, CHUNK: tl.constexpr):
    """A chunk's scale numbers [CHUNK], those of its first and last token, and whether it continues to the left."""
    offs = start + tl.arange(0, CHUNK)
    scale = tl.load(scale_ptr + offs, mask=offs < L, other=-1)
    first = tl.load(scale_ptr + start)
    last = tl.load(scale_ptr + start + CHUNK - 1, mask=start + CHUNK <= L, other=-2)
    continues = tl.load(scale_ptr + start - 1, mask=start > 0, other=-2) == first
    return scale, first, last, continues


@triton.jit(do_not_specialize=["L"])
def _ssd_scan_fwd_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    state_ptr,
    scale_ptr,
    edges_ptr,
    y_ptr,
    state_out_ptr,
    stride_xb,
    stride_xl,
    stride_xh,
    stride_db,
    stride_dl,
    stride_dd,
    stride_Bb,
    stride_Bl,
    stride_Cb,
    stride_Cl,
    L,
    H,
    P: tl.constexpr,
    N: tl.constexpr,
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    EXACT: tl.constexpr = DTYPE == tl.float32
    slices: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    head = (pid // slices) % H
    row = (pid // (slices * H)).to(tl.int64)
    first_p = (pid % slices) * BLOCK_P
    offs_p, offs_n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = offs_p < P - first_p, offs_n < N
    mask_h = mask_p[:, None] & mask_n[None, :]
    offs_h = offs_p[:, None] * N + offs_n[None, :]
    chunks = tl.cdiv(L, CHUNK)
    x_ptr += row * stride_xb + head * stride_xh + first_p
    y_ptr += (row * L * H + head) * P + first_p
    dt_ptr += row * stride_db + head
    B_ptr += row * stride_Bb
    C_ptr += row * stride_Cb
    state_ptr += ((row * H + head) * P + first_p) * N
    state_out_ptr += ((row * H + head) * P + first_p) * N
    A = finite_rate(tl.load(A_ptr + head).to(tl.float32))
    D = tl.load(D_ptr + head).to(tl.float32)

    if BOTH:
        A_back = finite_rate(tl.load(A_ptr + H + head).to(tl.float32))
        edges_ptr += (row * H + head) * chunks * P * N + first_p * N
        g = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for left in range(chunks):
            chunk = chunks - 1 - left
            start = chunk * CHUNK
            tl.store(edges_ptr + chunk * P * N + offs_h, g.to(edges_ptr.dtype.element_ty), mask=mask_h)
            x = load_rows(x_ptr, stride_xl, start, offs_p, mask_p, L, CHUNK)
            B = load_rows(B_ptr, stride_Bl, start, offs_n, mask_n, L, CHUNK)
            delta = steps(dt_ptr + stride_dd, stride_dl, start, L, CHUNK)
            scale, first, last, continues = _scales(scale_ptr, start, L, CHUNK)
            _, _, to_start, chunk_decay = backward_decays(delta, A_back, scale, first, last, CHUNK, EXACT)
            g = _advance(g, chunk_decay, x.to(tl.float32), to_start, B.to(tl.float32), PRECISION)
            g = tl.where(continues, g, 0.0)
        tl.debug_barrier()

    h = tl.load(state_ptr + offs_h, mask=mask_h, other=0.0)
    for chunk in range(chunks):
        start = chunk * CHUNK
        x = load_rows(x_ptr, stride_xl, start, offs_p, mask_p, L, CHUNK)
        B = load_rows(B_ptr, stride_Bl, start, offs_n, mask_n, L, CHUNK)
        C = load_rows(C_ptr, stride_Cl, start, offs_n, mask_n, L, CHUNK)
        delta = steps(dt_ptr, stride_dl, start, L, CHUNK)
        own = delta * tl.sum(B.to(tl.float32) * C.to(tl.float32), 1)
        inside, from_start, until_end, chunk_decay = forward_decays(delta, A, CHUNK, EXACT)
        from_right, from_end = h, from_start
        if BOTH:
            scale, first, last, _ = _scales(scale_ptr, start, L, CHUNK)
            delta = steps(dt_ptr + stride_dd, stride_dl, start, L, CHUNK)
            upper, from_end, _, _ = backward_decays(delta, A_back, scale, first, last, CHUNK, EXACT)
            inside += upper
            from_right = tl.load(edges_ptr + chunk * P * N + offs_h, mask=mask_h, other=0.0)
        y = _chunk(x, B, C, h, from_right, inside, from_start, from_end, BOTH, DTYPE)
        y += (D + own)[:, None] * x.to(tl.float32)
        store_rows(y_ptr, H * P, y, start, offs_p, mask_p, L, CHUNK)
        h = _advance(h, chunk_decay, x.to(tl.float32), until_end, B.to(tl.float32), PRECISION)
    tl.store(state_out_ptr + offs_h, h, mask=mask_h)


@triton.jit
def _last_rows(
    xbc_ptr, stride_l, conv_ptr, out_ptr, channels, offs_c, mask_c, L, TAPS: tl.constexpr, ROWS: tl.constexpr
):
    """Copy the last TAPS−1 rows of [conv state; xBC] at some channels; ROWS is a power of two ≥ TAPS−1."""
    offs = tl.arange(0, ROWS)[:, None]
    rows = (L + offs).to(tl.int64)  # of the conv state and all new rows together
    mask = (offs < TAPS - 1) & mask_c[None, :]
    old = tl.load(conv_ptr + rows * channels + offs_c[None, :], mask=mask & (rows < TAPS - 1), other=0.0)
    xbc_ptr += (rows - (TAPS - 1)) * stride_l + offs_c[None, :]
    tile = tl.load(xbc_ptr, mask=mask & (rows >= TAPS - 1), other=0.0)
    tl.store(out_ptr + offs * channels + offs_c[None, :], tl.where(rows < TAPS - 1, old, tile), mask=mask)


@triton.jit(do_not_specialize=["L", "stride_dl", "columns"])
def _mamba2_mixer_prepare_kernel(
    zxbcdt_ptr,
    dt_ptr,
    conv_ptr,
    weight_ptr,
    bias_ptr,
    dt_bias_ptr,
    B_ptr,
    C_ptr,
    delta_ptr,
    own_ptr,
    stride_zb,
    stride_zl,
    stride_db,
    stride_dl,
    L,
    E,
    columns,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(L, CHUNK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks) * CHUNK
    channels = E + 2 * N
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    xbc_ptr = zxbcdt_ptr + row * stride_zb + E
    conv_ptr += row * (TAPS - 1) * channels
    weights = conv_weights(weight_ptr, bias_ptr, E, offs_n, mask_n, TAPS)
    B = conv_silu(xbc_ptr, stride_zl, conv_ptr, channels, weights, E, offs_n, mask_n, start, L, TAPS, CHUNK)
    store_rows(B_ptr + row * L * N, N, B, start, offs_n, mask_n, L, CHUNK)
    weights = conv_weights(weight_ptr, bias_ptr, E + N, offs_n, mask_n, TAPS)
    C = conv_silu(xbc_ptr, stride_zl, conv_ptr, channels, weights, E + N, offs_n, mask_n, start, L, TAPS, CHUNK)
    store_rows(C_ptr + row * L * N, N, C, start, offs_n, mask_n, L, CHUNK)
    offs_t = start + tl.arange(0, CHUNK)
    tl.store(own_ptr + row * L + offs_t, tl.sum(B * C, 1), mask=offs_t < L)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < columns
    dt = load_rows(dt_ptr + row * stride_db, stride_dl, start, offs_h, mask_h, L, CHUNK).to(tl.float32)
    bias = tl.load(dt_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    pointers = delta_ptr + row * columns * L + offs_h[None, :] * L + offs_t[:, None]
    tl.store(pointers, softplus(dt + bias[None, :]), mask=(offs_t < L)[:, None] & mask_h[None, :])


@triton.jit(do_not_specialize=["L", "stride_dl", "H"])
def _mamba2_mixer_fwd_kernel(
    zxbcdt_ptr,
    dt_ptr,
    conv_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    dt_bias_ptr,
    A_log_ptr,
    D_ptr,
    B_ptr,
    C_ptr,
    delta_ptr,
    own_ptr,
    scale_ptr,
    edges_ptr,
    gated_ptr,
    squares_ptr,
    conv_out_ptr,
    state_out_ptr,
    stride_zb,
    stride_zl,
    stride_db,
    stride_dl,
    L,
    H,
    P: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    PREPARED: tl.constexpr,
):
    DTYPE: tl.constexpr = zxbcdt_ptr.dtype.element_ty
    EXACT: tl.constexpr = DTYPE == tl.float32
    slices: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    part = pid % (slices * H)
    head = part // slices
    row = (pid // (slices * H)).to(tl.int64)
    E = H * P
    channels = E + 2 * N
    first_p = (part % slices) * BLOCK_P
    channel = head * P + first_p
    offs_p, offs_n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = offs_p < P - first_p, offs_n < N
    mask_h = mask_p[:, None] & mask_n[None, :]
    offs_h = offs_p[:, None] * N + offs_n[None, :]
    chunks = tl.cdiv(L, CHUNK)
    z_ptr = zxbcdt_ptr + row * stride_zb
    xbc_ptr = z_ptr + E
    dt_ptr += row * stride_db + head
    conv_ptr += row * (TAPS - 1) * channels
    state_ptr += ((row * H + head) * P + first_p) * N
    state_out_ptr += ((row * H + head) * P + first_p) * N
    gated_ptr += row * L * E + channel
    squares_ptr += row * L * H * slices + part
    A = finite_rate(-exp(tl.load(A_log_ptr + head).to(tl.float32)))
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    D = tl.load(D_ptr + head).to(tl.float32)
    weights_x = conv_weights(weight_ptr, bias_ptr, channel, offs_p, mask_p, TAPS)
    if PREPARED:
        B_ptr += row * L * N
        C_ptr += row * L * N
        own_ptr += row * L
        columns = 2 * H if BOTH else H
        delta_ptr += (row * columns + head) * L
    else:
        weights_B = conv_weights(weight_ptr, bias_ptr, E, offs_n, mask_n, TAPS)
        weights_C = conv_weights(weight_ptr, bias_ptr, E + N, offs_n, mask_n, TAPS)

    # The state of the convolution: each program copies the rows of its channels of x, head 0 also those of B and C.
    if TAPS > 1:
        conv_out_ptr += row * (TAPS - 1) * channels
        offs_x, offs_B = channel + offs_p, E + offs_n
        _last_rows(xbc_ptr, stride_zl, conv_ptr, conv_out_ptr, channels, offs_x, mask_p, L, TAPS, BLOCK_TAPS)
        if part == 0:
            _last_rows(xbc_ptr, stride_zl, conv_ptr, conv_out_ptr, channels, offs_B, mask_n, L, TAPS, BLOCK_TAPS)
            _last_rows(xbc_ptr, stride_zl, conv_ptr, conv_out_ptr, channels, offs_B + N, mask_n, L, TAPS, BLOCK_TAPS)

    if BOTH:
        A_back = finite_rate(-exp(tl.load(A_log_ptr + H + head).to(tl.float32)))
        dt_bias_back = tl.load(dt_bias_ptr + H + head).to(tl.float32)
        edges_ptr += ((row * H + head) * chunks * P + first_p) * N
        g = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for left in range(chunks):
            chunk = chunks - 1 - left
            start = chunk * CHUNK
            tl.store(edges_ptr + chunk * P * N + offs_h, g.to(edges_ptr.dtype.element_ty), mask=mask_h)
            x = conv_silu(
                xbc_ptr, stride_zl, conv_ptr, channels, weights_x, channel, offs_p, mask_p, start, L, TAPS, CHUNK
            )
            if PREPARED:
                B = load_rows(B_ptr, N, start, offs_n, mask_n, L, CHUNK)
            else:
                B = conv_silu(
                    xbc_ptr, stride_zl, conv_ptr, channels, weights_B, E, offs_n, mask_n, start, L, TAPS, CHUNK
                )
            if PREPARED:
                delta = steps(delta_ptr + H * L, 1, start, L, CHUNK)
            else:
                delta = softplus_steps(dt_ptr + H, stride_dl, dt_bias_back, start, L, CHUNK)
            scale, first, last, continues = _scales(scale_ptr, start, L, CHUNK)
            _, _, to_start, chunk_decay = backward_decays(delta, A_back, scale, first, last, CHUNK, EXACT)
            g = tl.where(continues, _advance(g, chunk_decay, x, to_start, B, PRECISION), 0.0)
        tl.debug_barrier()

    h = tl.load(state_ptr + offs_h, mask=mask_h, other=0.0)
    for chunk in range(chunks):
        start = chunk * CHUNK
        x = conv_silu(xbc_ptr, stride_zl, conv_ptr, channels, weights_x, channel, offs_p, mask_p, start, L, TAPS, CHUNK)
        if PREPARED:
            B = load_rows(B_ptr, N, start, offs_n, mask_n, L, CHUNK)
            C = load_rows(C_ptr, N, start, offs_n, mask_n, L, CHUNK)
        else:
            B = conv_silu(xbc_ptr, stride_zl, conv_ptr, channels, weights_B, E, offs_n, mask_n, start, L, TAPS, CHUNK)
            C = conv_silu(
                xbc_ptr, stride_zl, conv_ptr, channels, weights_C, E + N, offs_n, mask_n, start, L, TAPS, CHUNK
            )
        if PREPARED:
            delta = steps(delta_ptr, 1, start, L, CHUNK)
            own = delta * steps(own_ptr, 1, start, L, CHUNK)
        else:
            delta = softplus_steps(dt_ptr, stride_dl, dt_bias, start, L, CHUNK)
            own = delta * tl.sum(B * C, 1)
        inside, from_start, until_end, chunk_decay = forward_decays(delta, A, CHUNK, EXACT)
        from_right, from_end = h, from_start
        if BOTH:
            scale, first, last, _ = _scales(scale_ptr, start, L, CHUNK)
            if PREPARED:
                delta = steps(delta_ptr + H * L, 1, start, L, CHUNK)
            else:
                delta = softplus_steps(dt_ptr + H, stride_dl, dt_bias_back, start, L, CHUNK)
            upper, from_end, _, _ = backward_decays(delta, A_back, scale, first, last, CHUNK, EXACT)
            inside += upper
            from_right = tl.load(edges_ptr + chunk * P * N + offs_h, mask=mask_h, other=0.0)
        y = _chunk(x, B, C, h, from_right, inside, from_start, from_end, BOTH, DTYPE) + (D + own)[:, None] * x
        h = _advance(h, chunk_decay, x, until_end, B, PRECISION)
        z = load_rows(z_ptr + channel, stride_zl, start, offs_p, mask_p, L, CHUNK).to(tl.float32)
        gated = y * silu(z, EXACT)
        store_rows(gated_ptr, E, gated, start, offs_p, mask_p, L, CHUNK)
        offs_s = (start + tl.arange(0, CHUNK)).to(tl.int64) * H * slices
        tl.store(squares_ptr + offs_s, tl.sum(gated * gated, 1), mask=start + tl.arange(0, CHUNK) < L)
    tl.store(state_out_ptr + offs_h, h, mask=mask_h)


@triton.jit(do_not_specialize=["rows", "parts"])
def _mamba2_mixer_norm_kernel(
    gated_ptr,
    squares_ptr,
    weight_ptr,
    y_ptr,
    rows,
    E,
    parts,
    eps,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    EXACT: tl.constexpr = y_ptr.dtype.element_ty == tl.float32
    offs_l = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_s = tl.arange(0, BLOCK_PARTS)
    mask_l, mask_e = offs_l[:, None] < rows, offs_e < E
    mask_s = mask_l & (offs_s < parts)[None, :]
    squares = tl.load(squares_ptr + offs_l[:, None] * parts + offs_s[None, :], mask=mask_s, other=0.0)
    mean = divide(tl.sum(squares, 1), tl.cast(E, tl.float32), EXACT)
    factor = divide(1.0, tl.sqrt_rn(mean + eps), EXACT)  # [BLOCK_L]
    weight = tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    offs, mask = offs_l[:, None] * E + offs_e[None, :], mask_l & mask_e[None, :]
    gated = tl.load(gated_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (gated * factor[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), mask=mask)
