"""The backward of mamba2_mixer in Triton: what is around the two kernels of backward.py.

    v            = causal convolution of xBC, with bias
    [x, B, C]    = SiLU(v),  Δ = softplus(dt + dt_bias),  A = −exp(A_log)
    y            = ssd_scan(x, Δ, A, B, C, D)
    gated        = y · SiLU(z),  r = 1/√(mean(gated²) + eps),  out = gated · r · norm_weight

1. `conv`: SiLU(v) and SiLU'(v) in float32, once, instead of in every kernel and, for B and C, by every head.
2. `sweep`: the state before each chunk.
3. `outputs`, one program per (batch row, chunk, group of heads): y in float32; the heads share C Bᵀ.
4. `norm`, one program per few tokens: with g the gradient of out, w·g = norm_weight · g and r of each token,

       dgated = r · (w·g) − r³ · mean(gated · w·g) · gated,   dz = dgated · y · SiLU'(z),   dy = dgated · SiLU(z)

   dy takes y's place. norm_weight's gradient g · gated · r leaves one partial per program.
5. `sweep` and `grads` of the scan; the latter go through softplus' to ddt.
6. `conv_grads`, one program per (batch row, rows, channels), goes through SiLU' to dv: with `rows` = [conv state,
   xBC], row r has weight k in token r − k's sum, so drows_r = Σ_k weight_k dv_{r−k}, and the state handed on is the
   last rows. The gradients of weights, Σ_l dv_l rows_{l+k}, and of the bias leave one partial per program.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ffi import empty_contiguous
from mvar_kernels.ops.mamba2.inputs import Mixer
from mvar_kernels.ops.mamba2.triton.backward import CHUNKS, ScanGradients, rows_of
from mvar_kernels.ops.mamba2.triton.backward_kernels import edges, head_steps, prefix_sums
from mvar_kernels.ops.mamba2.triton.common import (
    clamped,
    conv_rows,
    conv_weights,
    decay_matrix,
    sigmoids,
    store_rows,
)
from mvar_kernels.tiling import Tile
from mvar_kernels.triton_math import divide, exp

CONV_TILES = (
    Tile({"BLOCK_C": 64}, warps=4, stages=1),
    Tile({"BLOCK_C": 128}, warps=8, stages=1),
    Tile({"BLOCK_C": 128}, warps=4, stages=1),
)
# With 4 warps matmuls in float32 spill 248 bytes a thread (sm_90, Triton 3.6); with 8, those of three tf32 parts 8
# (sm_80, Triton 3.6 and 3.7).
OUTPUTS_TILES = {
    torch.float32: (Tile({}, warps=8, stages=1),),
    torch.float16: (Tile({}, warps=4, stages=1),),
    torch.bfloat16: (Tile({}, warps=4, stages=1), Tile({}, warps=8, stages=1)),
}
NORM_TILES = (
    Tile({"BLOCK_L": 8, "BLOCK_E": 256}, warps=4, stages=1),
    Tile({"BLOCK_L": 4, "BLOCK_E": 512}, warps=4, stages=1),
    Tile({"BLOCK_L": 16, "BLOCK_E": 256}, warps=8, stages=1),
)
# Unbounded, ptxas takes 80 registers a thread, for three blocks a multiprocessor, and in float32 spills 8 bytes (sm_90,
# Triton 3.6).
CONV_GRADS_TILES = {
    torch.float32: (Tile({"BLOCK_L": 32, "BLOCK_C": 32, "maxnreg": 96}, warps=8, stages=1),),
    torch.float16: (Tile({"BLOCK_L": 32, "BLOCK_C": 32}, warps=8, stages=1),),
    torch.bfloat16: (Tile({"BLOCK_L": 32, "BLOCK_C": 32}, warps=8, stages=1),),
}


@triton.jit(do_not_specialize=["L"])
def _mamba2_mixer_bwd_conv_kernel(
    xbc_ptr,
    conv_ptr,
    weight_ptr,
    bias_ptr,
    silu_ptr,
    slope_ptr,
    xbc_stride,
    L,
    channels,
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """SiLU(v) and SiLU'(v), both (B·L, channels). Program ids: chunk of a batch row, channels.

    The conv state is (B, TAPS−1, channels).
    """
    chunks = tl.cdiv(L, CHUNK)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks) * CHUNK
    channel = tl.program_id(1) * BLOCK_C
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = channel + offs_c < channels
    xbc_ptr += b * L * xbc_stride
    conv_ptr += b * (TAPS - 1) * channels
    weights = conv_weights(weight_ptr, bias_ptr, channel, offs_c, mask_c, TAPS)
    v = clamped(
        conv_rows(xbc_ptr, xbc_stride, conv_ptr, channels, weights, channel, offs_c, mask_c, start, L, TAPS, CHUNK)
    )  # [CHUNK, BLOCK_C]
    open, shut = sigmoids(v, xbc_ptr.dtype.element_ty == tl.float32)
    at = b * L * channels + channel
    store_rows(silu_ptr + at, channels, v * open, start, offs_c, mask_c, L, CHUNK)
    store_rows(slope_ptr + at, channels, open + v * open * shut, start, offs_c, mask_c, L, CHUNK)


@triton.jit(do_not_specialize=["L", "heads"])
def _mamba2_mixer_bwd_outputs_kernel(
    xbc_ptr,
    dt_ptr,
    bias_ptr,
    A_ptr,
    D_ptr,
    scale_ptr,
    states_ptr,
    y_ptr,
    dt_stride,
    L,
    heads,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BOTH: tl.constexpr,
    MIXER: tl.constexpr,
    PRECISE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y (B·L, H·P) from [x, B, C] after SiLU and the states that enter the chunks.

    Program ids: chunk of a batch row, group of heads.
    """
    EXACT: tl.constexpr = PRECISE == "ieee"
    chunks = tl.cdiv(L, CHUNK)
    program = tl.program_id(0).to(tl.int64)
    b, chunk = program // chunks, tl.program_id(0) % chunks
    row = b * L + chunk * CHUNK
    offs_i, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_t, mask_p, mask_n = chunk * CHUNK + offs_i < L, offs_p < P, offs_n < N
    mask_x, mask_bc = mask_t[:, None] & mask_p[None, :], mask_t[:, None] & mask_n[None, :]
    mask_state = mask_p[:, None] & mask_n[None, :]
    offs_dt = offs_i * dt_stride
    dt_ptr += row * dt_stride
    xbc_ptr += row * (H * P + 2 * N)
    x_at = xbc_ptr + offs_i[:, None] * (H * P + 2 * N) + offs_p[None, :]
    y_at = y_ptr + row * (H * P) + offs_i[:, None] * (H * P) + offs_p[None, :]
    bc_at = xbc_ptr + H * P + offs_i[:, None] * (H * P + 2 * N) + offs_n[None, :]
    B = tl.load(bc_at, mask=mask_bc, other=0.0)  # [CHUNK, BLOCK_N]
    C = tl.load(bc_at + N, mask=mask_bc, other=0.0)  # [CHUNK, BLOCK_N]
    G = tl.dot(C, tl.trans(B), input_precision=PRECISE)  # [t, s]
    own = tl.sum(B * C, 1)
    earlier = offs_i[:, None] > offs_i[None, :]
    if BOTH:
        scale, before, after = edges(scale_ptr, chunk, L, CHUNK)
        later = (offs_i[:, None] < offs_i[None, :]) & (scale[:, None] == scale[None, :])
    states_at = states_ptr + program * H * P * N + offs_p[:, None] * N + offs_n[None, :]
    direction_states = tl.num_programs(0).to(tl.int64) * H * P * N
    always = chunk * CHUNK < L
    first_head = tl.program_id(1) * heads
    for head in range(first_head, tl.minimum(first_head + heads, H)):
        x = tl.load(x_at + head * P, mask=mask_x, other=0.0)  # [CHUNK, BLOCK_P]
        h = tl.load(states_at + head * P * N, mask=mask_state, other=0.0)  # [BLOCK_P, BLOCK_N]
        delta, _, A = head_steps(dt_ptr, bias_ptr, A_ptr, offs_dt, mask_t, head, always, MIXER, EXACT)
        coarse, fine, _, _ = prefix_sums(delta * A, 0)
        y = tl.dot(C, tl.trans(h), input_precision=PRECISE) * exp(coarse + fine, EXACT)[:, None]
        y += (own * delta + tl.load(D_ptr + head).to(tl.float32))[:, None] * x
        mix = decay_matrix(coarse, fine, earlier, EXACT) * delta[None, :]
        if BOTH:
            h = tl.load(states_at + direction_states + head * P * N, mask=mask_state, other=0.0)
            delta, _, A = head_steps(dt_ptr, bias_ptr, A_ptr, offs_dt, mask_t, H + head, always, MIXER, EXACT)
            coarse, fine, all_coarse, all_fine = prefix_sums(delta * A, 1)
            entering = tl.where(scale == after, exp((all_coarse - coarse) + (all_fine - fine), EXACT), 0.0)
            y += tl.dot(C, tl.trans(h), input_precision=PRECISE) * entering[:, None]
            mix += decay_matrix(-coarse, -fine, later, EXACT) * delta[None, :]
        y = tl.dot(G * mix, x, y, input_precision=PRECISE)
        tl.store(y_at + head * P, y, mask=mask_x)


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
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dz, dy in y's place, and a partial of norm_weight's gradient (program, E). Program id: a few tokens.

    Reads its rows twice: they stay in the cache in between.
    """
    EXACT: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    offs_l = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    mask_l = offs_l < rows
    y_ptr += offs_l[:, None] * E
    z_ptr += offs_l[:, None] * z_stride
    grad_ptr += offs_l[:, None] * grad_stride
    squares = tl.zeros([BLOCK_L], tl.float32)
    products = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, E, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask = mask_l[:, None] & (offs_e < E)[None, :]
        y = tl.load(y_ptr + offs_e[None, :], mask=mask, other=0.0)  # [BLOCK_L, BLOCK_E]
        z = clamped(tl.load(z_ptr + offs_e[None, :], mask=mask, other=0.0).to(tl.float32))
        grad = tl.load(grad_ptr + offs_e[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)
        gated = y * (z * sigmoids(z, EXACT)[0])
        squares += tl.sum(gated * gated, 1)
        products += tl.sum(gated * grad * weight[None, :], 1)
    width = tl.cast(E, tl.float32)
    r = divide(1.0, tl.sqrt_rn(divide(squares, width, EXACT) + eps), EXACT)
    m = r * r * r * divide(products, width, EXACT)
    for start in range(0, E, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask = mask_l[:, None] & (offs_e < E)[None, :]
        y = tl.load(y_ptr + offs_e[None, :], mask=mask, other=0.0)  # [BLOCK_L, BLOCK_E]
        z = clamped(tl.load(z_ptr + offs_e[None, :], mask=mask, other=0.0).to(tl.float32))
        grad = tl.load(grad_ptr + offs_e[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)
        open, shut = sigmoids(z, EXACT)
        gate = z * open
        gated = y * gate
        dgated = r[:, None] * (grad * weight[None, :]) - m[:, None] * gated
        dz = dgated * y * (open + gate * shut)
        tl.store(y_ptr + offs_e[None, :], dgated * gate, mask=mask)
        dz_at = dz_ptr + offs_l[:, None] * dz_stride + offs_e[None, :]
        tl.store(dz_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        tl.store(sums_ptr + tl.program_id(0) * E + offs_e, tl.sum(grad * gated * r[:, None], 0), mask=offs_e < E)


@triton.jit
def _dv(dx_ptr, dbc_ptr, slope_ptr, group_rows, offs_t, offs_c, mask_c, L, E, channels, groups):
    """dv of a batch row's tokens offs_t, 0 where there is none: through SiLU, B's and C's from partials.

    Pointers are the batch row's.
    """
    mask = ((offs_t >= 0) & (offs_t < L))[:, None] & mask_c[None, :]
    slope = tl.load(slope_ptr + offs_t[:, None] * channels + offs_c[None, :], mask=mask, other=0.0)
    dv = tl.load(dx_ptr + offs_t[:, None] * E + offs_c[None, :], mask=mask & (offs_c < E)[None, :], other=0.0)
    dv = dv.to(tl.float32)
    if tl.max(offs_c, 0) >= E:
        mask &= (offs_c >= E)[None, :]
        dbc_at = dbc_ptr + offs_t[:, None] * (channels - E) + (offs_c - E)[None, :]
        for group in range(groups):
            dv += tl.load(dbc_at + group * group_rows * (channels - E), mask=mask, other=0.0)
    return dv * slope


@triton.jit(do_not_specialize=["group_rows", "L", "groups"])
def _mamba2_mixer_bwd_conv_grads_kernel(
    dx_ptr,
    dbc_ptr,
    slope_ptr,
    xbc_ptr,
    conv_ptr,
    weight_ptr,
    dlast_ptr,
    dxbc_ptr,
    dconv_ptr,
    sums_ptr,
    xbc_stride,
    dxbc_stride,
    group_rows,
    L,
    E,
    channels,
    groups,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows r of [conv state, xBC], BLOCK_L of a batch row by BLOCK_C channels, and the weights' gradients from tokens
    l = r: partials (program, taps and bias, channels). Both conv states are (B, TAPS−1, channels).
    """
    blocks = tl.cdiv(L + TAPS - 1, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    offs_r = (tl.program_id(0) % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    dx_ptr += b * L * E
    dbc_ptr += b * L * (channels - E)
    slope_ptr += b * L * channels
    xbc_ptr += b * L * xbc_stride
    dxbc_ptr += b * L * dxbc_stride
    conv_ptr += b * (TAPS - 1) * channels
    dconv_ptr += b * (TAPS - 1) * channels
    dlast_ptr += b * (TAPS - 1) * channels
    sums_ptr += program * (TAPS + 1) * channels + offs_c
    dv_here = _dv(dx_ptr, dbc_ptr, slope_ptr, group_rows, offs_r, offs_c, mask_c, L, E, channels, groups)
    tl.store(sums_ptr + TAPS * channels, tl.sum(dv_here, 0), mask=mask_c)
    handed = ((offs_r >= L) & (offs_r < L + TAPS - 1))[:, None] & mask_c[None, :]
    dlast_at = dlast_ptr + (offs_r - L)[:, None] * channels + offs_c[None, :]
    drow = tl.load(dlast_at, mask=handed, other=0.0).to(tl.float32)  # [BLOCK_L, BLOCK_C]
    for tap in tl.static_range(TAPS):
        weight = tl.load(weight_ptr + offs_c * TAPS + tap, mask=mask_c, other=0.0).to(tl.float32)
        dv = dv_here
        if tap > 0:
            dv = _dv(dx_ptr, dbc_ptr, slope_ptr, group_rows, offs_r - tap, offs_c, mask_c, L, E, channels, groups)
        drow += weight[None, :] * dv
        offs_l = offs_r + tap - (TAPS - 1)
        is_new = ((offs_l >= 0) & (offs_l < L))[:, None] & mask_c[None, :]
        row = tl.load(xbc_ptr + offs_l[:, None] * xbc_stride + offs_c[None, :], mask=is_new, other=0.0).to(tl.float32)
        is_old = (offs_l < 0)[:, None] & mask_c[None, :]
        row += tl.load(conv_ptr + (offs_r + tap)[:, None] * channels + offs_c[None, :], mask=is_old, other=0.0)
        tl.store(sums_ptr + tap * channels, tl.sum(dv_here * row, 0), mask=mask_c)
    offs_l = offs_r - (TAPS - 1)
    is_new = ((offs_l >= 0) & (offs_l < L))[:, None] & mask_c[None, :]
    dxbc_at = dxbc_ptr + offs_l[:, None] * dxbc_stride + offs_c[None, :]
    tl.store(dxbc_at, drow.to(dxbc_ptr.dtype.element_ty), mask=is_new)
    is_old = (offs_l < 0)[:, None] & mask_c[None, :]
    dconv_at = dconv_ptr + offs_r[:, None] * channels + offs_c[None, :]
    tl.store(dconv_at, drow.to(dconv_ptr.dtype.element_ty), mask=is_old)


def mamba2_mixer_backward(grads: Sequence[Tensor], call: Mixer) -> list[Tensor]:
    """Gradients of the inputs, the parameters and the two states from those of y and of both states."""
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = (p.contiguous() for p in call.parameters)
    conv, initial = call.conv.contiguous(), call.ssm.contiguous()
    E, (channels, taps) = norm_weight.shape[0], conv_weight.shape
    batch, L, width = call.zxbcdt.shape
    N = (channels - E) // 2
    dtype, device = call.zxbcdt.dtype, call.zxbcdt.device
    z, xbc = rows_of(call.zxbcdt)[:, : E + channels].split([E, channels], 1)
    dt = rows_of(call.steps)
    dinputs = [empty_contiguous(call.zxbcdt), *([] if call.dt is None else [empty_contiguous(call.dt)])]
    dz, dxbc = dinputs[0].view(-1, width)[:, : E + channels].split([E, channels], 1)
    ddt = rows_of(call.steps_of(dinputs[0], None if call.dt is None else dinputs[1]))
    dconv, dinitial = torch.empty_like(conv), torch.empty_like(initial)

    def chosen(kernel: str, candidates: tuple[Tile, ...]) -> dict[str, Any]:
        shape_class = f"E{E} {str(dtype).removeprefix('torch.')}"
        return tiling.chosen(f"mamba2_mixer_bwd_{kernel}", shape_class, candidates, device).arguments()

    chunk = CHUNKS[dtype]
    silu, slope = torch.empty(2, batch * L, channels, dtype=torch.float32, device=device)
    tile = chosen("conv", CONV_TILES)
    grid = (batch * triton.cdiv(L, chunk), triton.cdiv(channels, tile["BLOCK_C"]))
    _mamba2_mixer_bwd_conv_kernel[grid](
        xbc, conv, conv_weight, conv_bias, silu, slope, xbc.stride(0), L, channels, TAPS=taps, CHUNK=chunk, **tile
    )
    x, B, C = silu.split([E, N, N], 1)
    scan = ScanGradients(x, dt, dt_bias, A_log, B, C, D, initial, call.scales, dtype)
    states = scan.sweep(x, B, initial, None)
    y = torch.empty(batch * L, E, dtype=torch.float32, device=device)
    _mamba2_mixer_bwd_outputs_kernel[scan.programs, scan.groups](
        silu,
        dt,
        dt_bias,
        A_log,
        D,
        scan.scale,
        states,
        y,
        dt.stride(0),
        L,
        scan.heads,
        BLOCK_P=tiling.dot_block(scan.P),
        **scan.options,
        **chosen("outputs", OUTPUTS_TILES[dtype]),
    )
    tile = chosen("norm", NORM_TILES)
    programs = triton.cdiv(batch * L, tile["BLOCK_L"])
    norm_sums = y.new_empty(programs, E)
    grad = rows_of(grads[0])
    _mamba2_mixer_bwd_norm_kernel[(programs,)](
        y, z, grad, norm_weight, dz, norm_sums, z.stride(0), grad.stride(0), width, batch * L, E, call.eps, **tile
    )
    adjoints = scan.sweep(y, C, grads[2], dinitial)
    # In float32 for float16, which dx can leave though dv cannot.
    dx = torch.empty(batch * L, E, dtype=torch.float32 if dtype == torch.float16 else dtype, device=device)
    dbc, sums = scan.grads(y, states, adjoints, dx, ddt)
    tile = chosen("conv_grads", CONV_GRADS_TILES[dtype])
    programs = batch * triton.cdiv(L + taps - 1, tile["BLOCK_L"])
    conv_sums = y.new_empty(programs, taps + 1, channels)
    _mamba2_mixer_bwd_conv_grads_kernel[programs, triton.cdiv(channels, tile["BLOCK_C"])](
        dx,
        dbc,
        slope,
        xbc,
        conv,
        conv_weight,
        grads[1].contiguous(),
        dxbc,
        dconv,
        conv_sums,
        xbc.stride(0),
        width,
        batch * L,
        L,
        E,
        channels,
        dbc.shape[0],
        TAPS=taps,
        **tile,
    )
    kinds = [scan.directions, 1, scan.directions]
    dA_log, dD, ddt_bias = (part.sum(0) for part in sums.split(kinds, 1))
    dweight, dbias = (part.sum(0) for part in conv_sums.split([taps, 1], 1))
    given = (dweight.t(), dbias, ddt_bias, dA_log, dD, norm_sums.sum(0))
    dparams = [d.reshape(p.shape).to(p.dtype).contiguous() for d, p in zip(given, call.parameters, strict=True)]
    return [*dinputs, *dparams, dconv, dinitial]
