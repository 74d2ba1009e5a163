"""What mamba2_mixer's heads share, made once for all of them, and what no head should make in its inner loop."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels.ffi import last_dim_contiguous
from mvar_kernels.ops.mamba2.inputs import Mixer
from mvar_kernels.ops.mamba2.triton.chunk import VECTORS, decay_vectors
from mvar_kernels.ops.mamba2.triton.common import (
    conv_rows,
    conv_weights,
    finite_rate,
    group_of,
    limited,
    limits,
    load_rows,
    refined_silu,
    softplus,
)
from mvar_kernels.ops.mamba2.triton.forward import wide
from mvar_kernels.triton_math import as_bfloat16, bfloat16_parts, exp

HEADS = 32  # whose decays one program makes


@triton.jit
def _conv(
    zxbcdt_ptr,
    conv_ptr,
    weight_ptr,
    bias_ptr,
    stride_zb,
    stride_zl,
    row,
    start,
    L,
    channel,
    E: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """SiLU of the convolution of N channels of [x, B, C] from `channel` on, 0 in rows ≥ L [CHUNK, BLOCK_N]."""
    CHANNELS: tl.constexpr = E + 2 * GROUPS * N
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    xbc_ptr = zxbcdt_ptr + row * stride_zb + E
    conv_ptr += row * (TAPS - 1) * CHANNELS
    weights = conv_weights(weight_ptr, bias_ptr, channel, offs_n, mask_n, TAPS)
    rows = conv_rows(xbc_ptr, stride_zl, conv_ptr, CHANNELS, weights, channel, offs_n, mask_n, start, L, TAPS, CHUNK)
    return tl.where(mask_n[None, :] & (tl.arange(0, CHUNK)[:, None] < L - start), refined_silu(rows, EXACT), 0.0)


@triton.jit(do_not_specialize=["L", "stride_dl"])
def _mamba2_mixer_prepare_kernel(
    zxbcdt_ptr,
    dt_ptr,
    conv_ptr,
    weight_ptr,
    bias_ptr,
    dt_bias_ptr,
    A_log_ptr,
    B_ptr,
    C_ptr,
    own_ptr,
    decays_ptr,
    done_ptr,
    stride_zb,
    stride_zl,
    stride_db,
    stride_dl,
    L,
    H: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    BOTH: tl.constexpr,
    DT_MIN: tl.constexpr,
    DT_MAX: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """B and C (B, chunks·CHUNK, BLOCK_N), B in its two parts side by side where C is bfloat16; own
    (B, chunks·CHUNK), C·B of each token; decays (B, directions·H, chunks, VECTORS, CHUNK); done (B) = 0.

    What is written has a batch row, and H heads, for each group (`group_of`); E is of all groups. Program ids: chunk
    of such a row; B, C and own, or HEADS heads of one direction.
    """
    EXACT: tl.constexpr = zxbcdt_ptr.dtype.element_ty == tl.float32
    PARTS: tl.constexpr = 2 if C_ptr.dtype.element_ty == tl.bfloat16 else 1
    COLUMNS: tl.constexpr = 2 * H if BOTH else H
    BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    chunks = tl.cdiv(L, CHUNK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    start = chunk * CHUNK
    offs_t, part = tl.arange(0, CHUNK), tl.program_id(1)
    at = row * chunks * CHUNK + start
    batch_row, group = group_of(row, GROUPS)
    if part < 2:
        B = _conv(
            *(zxbcdt_ptr, conv_ptr, weight_ptr, bias_ptr, stride_zb, stride_zl, batch_row, start, L),
            *(E + group * N, E, N, GROUPS, TAPS, BLOCK_N, CHUNK, EXACT),
        )
        offs_n = tl.arange(0, BLOCK_N)
        if part == 1:
            C = _conv(
                *(zxbcdt_ptr, conv_ptr, weight_ptr, bias_ptr, stride_zb, stride_zl, batch_row, start, L),
                *(E + (GROUPS + group) * N, E, N, GROUPS, TAPS, BLOCK_N, CHUNK, EXACT),
            )
            tl.store(own_ptr + at + offs_t, tl.sum(B * C, 1))
            C_at = C_ptr + at * BLOCK_N + offs_t[:, None] * BLOCK_N + offs_n[None, :]
            tl.store(C_at, as_bfloat16(C) if PARTS == 2 else C)
            if chunk == 0:
                tl.store(done_ptr + row, 0)
        else:
            B_at = B_ptr + (at + offs_t[:, None]) * (PARTS * BLOCK_N) + offs_n[None, :]
            if PARTS == 2:
                high, low = bfloat16_parts(B)
                tl.store(B_at, high)
                tl.store(B_at + BLOCK_N, low)
            else:
                tl.store(B_at, B)
    else:
        direction = (part - 2) // BLOCKS
        offs_h = (part - 2) % BLOCKS * HEADS + tl.arange(0, HEADS)
        mask_h = offs_h < H
        column = (direction * GROUPS + group) * H + offs_h
        dt = load_rows(dt_ptr + batch_row * stride_db, stride_dl, start, column, mask_h, L, CHUNK).to(tl.float32)
        bias = tl.load(dt_bias_ptr + column, mask=mask_h, other=0.0).to(tl.float32)
        A = finite_rate(-exp(tl.load(A_log_ptr + column, mask=mask_h, other=0.0).to(tl.float32)))[None, :]
        delta = limited(softplus(dt + bias[None, :]), DT_MIN, DT_MAX)
        delta = tl.where(offs_t[:, None] < L - start, delta, 0.0)
        decays_at = decays_ptr + (row * COLUMNS * chunks + chunk) * (VECTORS * CHUNK)
        decays_at += (direction * H + offs_h)[None, :] * (chunks * VECTORS * CHUNK) + offs_t[:, None]
        if direction == 0:
            vectors, _ = decay_vectors(delta, A, False, EXACT)
        else:
            vectors, _ = decay_vectors(delta, A, True, EXACT)
        for vector in tl.static_range(VECTORS):
            tl.store(decays_at + vector * CHUNK, vectors[vector], mask=mask_h[None, :])


def prepare(call: Mixer, chunk: int, block_n: int) -> tuple[Tensor, ...]:
    """B, C, own, decays and done as the kernel leaves them, for chunks of `chunk` tokens and block_n ≥ N.
    Their first dimension is B·G.

    The last dimension of call.zxbcdt and all of call.conv are contiguous.
    """
    conv_weight, conv_bias, dt_bias, A_log = (t.contiguous() for t in call.parameters[:4])
    zxbcdt, dt, conv, ssm = call.zxbcdt, last_dim_contiguous(call.steps), call.conv, call.ssm
    (batch, L, _), (_, heads, P, N), groups = zxbcdt.shape, ssm.shape, call.groups
    rows, H, columns = batch * groups, heads // groups, dt_bias.numel() // groups
    dtype, chunks = zxbcdt.dtype, triton.cdiv(L, chunk)
    B = zxbcdt.new_empty(rows, chunks * chunk, (2 if dtype == torch.bfloat16 else 1) * block_n, dtype=wide(dtype))
    C = zxbcdt.new_empty(rows, chunks * chunk, block_n, dtype=wide(dtype))
    own = ssm.new_empty(rows, chunks * chunk)
    decays = ssm.new_empty(rows, columns, chunks, VECTORS.value, chunk)
    done = torch.empty(rows, dtype=torch.int32, device=zxbcdt.device)
    block_h = min(HEADS, triton.next_power_of_2(H))
    _mamba2_mixer_prepare_kernel[(rows * chunks, 2 + columns // H * triton.cdiv(H, block_h))](
        *(zxbcdt, dt, conv, conv_weight, conv_bias, dt_bias, A_log, B, C, own, decays, done),
        *(*zxbcdt.stride()[:2], *dt.stride()[:2], L),
        H=H,
        E=heads * P,
        N=N,
        GROUPS=groups,
        TAPS=conv_weight.shape[1],
        BOTH=A_log.dim() == 2,
        **limits(call),
        HEADS=block_h,
        BLOCK_N=block_n,
        CHUNK=chunk,
    )
    return B, C, own, decays, done
