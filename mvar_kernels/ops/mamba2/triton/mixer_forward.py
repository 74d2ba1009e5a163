"""The forward of mamba2_mixer in Triton, in two launches.

1. prepare: what the heads share, and what no head should compute in its inner loop: conv + SiLU of B and C, and the
   decay vectors (chunk.py) of every head, written along the tokens. Rows are padded to whole chunks, so that 2. reads
   them without masks.
2. forward: programs of two kinds. A scan program owns a head of a batch row, or BLOCK_P of its channels: conv + SiLU of
   x, scan, skip, gate, both states; it writes y · SiLU(z) and counts itself done. A norm program waits until all scan
   programs of a row are done and applies RMSNorm, which is over all heads, to a few of its tokens.

A GPU starts programs in their order (what decoupled look-back scans rely on, too; Merrill and Garland, 2016). Norm
programs come after the scan programs that they wait for, which wait for nothing, so none waits in vain. They come one
group of rows later: then the rows are finished, as a rule, and still in L2. Each token is normalized by one program,
from numbers in memory: the result does not depend on the order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels.dispatch import multiprocessors
from mvar_kernels.ffi import last_dim_contiguous
from mvar_kernels.ops.mamba2.inputs import Mixer
from mvar_kernels.ops.mamba2.triton.chunk import (
    VECTORS,
    add_from_tokens,
    advance,
    decay_of_state,
    decay_until,
    from_state,
    load_decays,
    operand,
    pair_decays,
    scale_numbers,
    scores_of,
)
from mvar_kernels.ops.mamba2.triton.common import (
    BEFORE_GATE,
    ONLY_GATE,
    conv_rows,
    conv_weights,
    group_of,
    load_rows,
    load_skip,
    load_tile,
    load_vector,
    norm_kind,
    refined_silu,
    scale_of_tokens,
    silu,
    store_rows,
    store_tile,
)
from mvar_kernels.ops.mamba2.triton.forward import plan, wide
from mvar_kernels.ops.mamba2.triton.prepare import prepare
from mvar_kernels.tiling import Tile
from mvar_kernels.triton_math import divide, exp, prefetch, reciprocal, tanh, widen

MIXER = {  # as forward.SCAN
    "short": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 4, 1),),
    "short float32": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 8, 1),),
    "forward": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 4, 1),),
    "forward bfloat16": (
        Tile({"CHUNK": 64, "BLOCK_P": 64}, 4, 2),
        Tile({"CHUNK": 64, "BLOCK_P": 64}, 4, 1),
        Tile({"CHUNK": 32, "BLOCK_P": 64}, 4, 1),
    ),
    "forward bfloat16 mma.sync": (Tile({"CHUNK": 32, "BLOCK_P": 64}, 4, 1),),
    "forward bfloat16 tcgen05": (Tile({"CHUNK": 32, "BLOCK_P": 64}, 4, 1),),
    "forward float32": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 8, 1),),
    "both": (Tile({"CHUNK": 16, "BLOCK_P": 32}, 8, 1),),
    "both float32": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 8, 1),),
    "both bfloat16": (Tile({"CHUNK": 32, "BLOCK_P": 64}, 4, 1),),
}
NORM_ROWS = 8  # tokens of a norm program
RESIDENT = 2  # programs that a multiprocessor holds, by registers


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


@triton.jit
def _fast_silu(v, EXACT: tl.constexpr):
    """SiLU in float32; for 16-bit inputs to about 2⁻²¹, in five instructions."""
    if EXACT:
        value = refined_silu(v, EXACT)
    else:
        value = v * reciprocal(1.0 + exp(-v, EXACT))
    return value


@triton.jit
def _gate(z, DTYPE: tl.constexpr):
    """SiLU(z); for bfloat16 to 2⁻¹² of z, by tanh, in three instructions."""
    if DTYPE == tl.float32:
        gate = silu(z, True)
    elif DTYPE == tl.float16:
        gate = _fast_silu(z, False)
    else:
        half = 0.5 * z
        gate = tl.fma(half, tanh(half), half)
    return gate


@triton.jit
def _conv_x(
    xbc_ptr, stride_l, conv_ptr, stride_row, weights, channel, offs_p, mask_p, start, L,
    TAPS: tl.constexpr, CHUNK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """SiLU of the convolution of x.

    start < L always: the branch keeps the compiler from computing the tile again for every register layout in which
    the matmuls need it.
    """
    tile = tl.zeros([CHUNK, offs_p.shape[0]], tl.float32)
    if start < L:
        tile = _fast_silu(
            conv_rows(xbc_ptr, stride_l, conv_ptr, stride_row, weights, channel, offs_p, mask_p, start, L, TAPS, CHUNK),
            EXACT,
        )
    return tile


@triton.jit
def _load_B(ptr, start, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk's B and, in bfloat16, its low part; else None."""
    PARTS: tl.constexpr = 2 if ptr.dtype.element_ty == tl.bfloat16 else 1
    offs = (start + tl.arange(0, CHUNK))[:, None] * (PARTS * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
    if PARTS == 2:
        parts = (tl.load(ptr + offs), tl.load(ptr + BLOCK_N + offs))
    else:
        parts = (tl.load(ptr + offs), None)
    return parts


@triton.jit
def _norm(
    gated_ptr, weight_ptr, z_ptr, y_ptr, first, L, eps, stride_zl, E: tl.constexpr, STRIDE: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """RMSNorm of E channels of ROWS tokens from `first` on, BEFORE_GATE times SiLU(z). Pointers are the batch row's;
    gated may be y, of which a program reads and writes the same rows."""
    EXACT: tl.constexpr = y_ptr.dtype.element_ty == tl.float32
    offs_l, offs_e = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    offs = offs_l.to(tl.int64)[:, None] * STRIDE + offs_e[None, :]
    mask_l = (offs_l < L)[:, None]
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, E, BLOCK_E):
        mask_e = None if E % BLOCK_E == 0 else start + offs_e < E
        gated = widen(load_tile(gated_ptr + offs + start, mask_l, mask_e))
        squares += tl.sum(gated * gated, 1)
    factor = divide(1.0, tl.sqrt_rn(divide(squares, tl.cast(E, tl.float32), EXACT) + eps), EXACT)  # [ROWS]
    for start in range(0, E, BLOCK_E):
        mask_e = None if E % BLOCK_E == 0 else start + offs_e < E
        gated = widen(load_tile(gated_ptr + offs + start, mask_l, mask_e))
        weight = load_vector(weight_ptr + start + offs_e, mask_e).to(tl.float32)
        y_at = y_ptr + offs + start
        normed = gated * factor[:, None] * weight[None, :]
        if NORM == BEFORE_GATE:
            z_at = z_ptr + offs_l.to(tl.int64)[:, None] * stride_zl + start + offs_e[None, :]
            normed *= _gate(load_tile(z_at, mask_l, mask_e).to(tl.float32), y_ptr.dtype.element_ty)
        store_tile(y_at, normed, mask_l, mask_e)


@triton.jit
def _scan(
    zxbcdt_ptr,
    conv_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    D_ptr,
    B_ptr,
    C_ptr,
    own_ptr,
    decays_ptr,
    scale_ptr,
    edges_ptr,
    gated_ptr,
    conv_out_ptr,
    state_out_ptr,
    row,
    part,
    stride_zb,
    stride_zl,
    L,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNEL_D: tl.constexpr,
    NORM: tl.constexpr,
    TAPS: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    DTYPE: tl.constexpr = zxbcdt_ptr.dtype.element_ty
    EXACT: tl.constexpr = DTYPE == tl.float32
    SLICES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    E: tl.constexpr = GROUPS * H * P
    CHANNELS: tl.constexpr = E + 2 * GROUPS * N
    COLUMNS: tl.constexpr = 2 * H if BOTH else H
    PARTS: tl.constexpr = 2 if DTYPE == tl.bfloat16 else 1
    head = part // SLICES
    first_p = (part % SLICES) * BLOCK_P
    batch_row, group = group_of(row, GROUPS)
    channel = (group * H + head) * P + first_p
    offs_t, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p = None if P % BLOCK_P == 0 else offs_p < P - first_p
    mask_n = None if N == BLOCK_N else offs_n < N
    mask_rows = None if mask_p is None else mask_p[:, None]  # of the state
    offs_h = offs_p[:, None] * N + offs_n[None, :]
    chunks = tl.cdiv(L, CHUNK)
    padded = chunks * CHUNK
    z_ptr = zxbcdt_ptr + batch_row * stride_zb + channel
    xbc_ptr = zxbcdt_ptr + batch_row * stride_zb + E
    conv_ptr += batch_row * (TAPS - 1) * CHANNELS
    gated_ptr += batch_row * L * E + channel
    B_ptr += row * padded * PARTS * BLOCK_N
    C_ptr += row * padded * BLOCK_N
    own_ptr += row * padded
    decays_ptr += (row * COLUMNS + head) * VECTORS * padded
    offs_state = ((row * H + head) * P + first_p) * N
    D, skip = load_skip(D_ptr, group * H + head, first_p, offs_p, mask_p, P, CHANNEL_D)
    weights = conv_weights(weight_ptr, bias_ptr, channel, offs_p, mask_p, TAPS)

    if BOTH:
        back_ptr = decays_ptr + H * VECTORS * padded
        edges_ptr += ((row * H + head) * chunks * P + first_p) * N
        g = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for left in range(chunks):
            chunk = chunks - 1 - left
            start = chunk * CHUNK
            store_tile(edges_ptr + chunk * P * N + offs_h, g, mask_rows, mask_n)
            x = _conv_x(
                xbc_ptr, stride_zl, conv_ptr, CHANNELS, weights, channel, offs_p, mask_p, start, L, TAPS, CHUNK, EXACT
            )
            B, B_low = _load_B(B_ptr, start, BLOCK_N, CHUNK)
            back = load_decays(back_ptr, start, offs_t, CHUNK)
            end = load_decays(back_ptr, start, 0, CHUNK)
            scale, first, last, continues = scale_numbers(scale_ptr, start, L, CHUNK)
            into = tl.where(scale == first, decay_until(end, back, EXACT), 0.0)
            chunk_decay = tl.where(first == last, decay_of_state(end, EXACT), 0.0)
            g = tl.where(continues, advance(g, chunk_decay, x, into, B, B_low, DTYPE), 0.0)
        tl.debug_barrier()

    h = load_tile(state_ptr + offs_state + offs_h, mask_rows, mask_n)
    for start in range(0, L, CHUNK):
        ahead = tl.minimum(start + CHUNK + offs_t, L - 1).to(tl.int64) * stride_zl
        prefetch(xbc_ptr + channel + ahead)
        prefetch(z_ptr + ahead)
        x = _conv_x(
            xbc_ptr, stride_zl, conv_ptr, CHANNELS, weights, channel, offs_p, mask_p, start, L, TAPS, CHUNK, EXACT
        )
        B, B_low = _load_B(B_ptr, start, BLOCK_N, CHUNK)
        C = tl.load(C_ptr + (start + offs_t)[:, None] * BLOCK_N + offs_n[None, :])
        vectors = load_decays(decays_ptr, start, offs_t, CHUNK)
        end = load_decays(decays_ptr, start, CHUNK - 1, CHUNK)
        entered, tokens = operand(h, DTYPE), operand(x, DTYPE)
        h = advance(h, decay_of_state(end, EXACT), x, decay_until(end, vectors, EXACT), B, B_low, DTYPE)
        decays = pair_decays(vectors, offs_t[:, None] > offs_t[None, :], EXACT)
        if BOTH:
            back = load_decays(back_ptr, start, offs_t, CHUNK)
            scale, first, last, _ = scale_numbers(scale_ptr, start, L, CHUNK)
            later = (offs_t[:, None] < offs_t[None, :]) & (scale[:, None] == scale[None, :])
            decays += pair_decays(back, later, EXACT)
        own = tl.load(own_ptr + start + offs_t)
        scores = scores_of(C, B, decays, (own * vectors[3] + D)[:, None], DTYPE)
        y = from_state(C, entered, decay_of_state(vectors, EXACT), DTYPE)
        if BOTH:
            right = load_tile(edges_ptr + start // CHUNK * P * N + offs_h, mask_rows, mask_n)
            y += from_state(C, operand(right, DTYPE), tl.where(scale == last, decay_of_state(back, EXACT), 0.0), DTYPE)
        y = add_from_tokens(y, scores, tokens, DTYPE)
        if CHANNEL_D:
            y += skip[None, :] * x
        if NORM == BEFORE_GATE:
            gated = y
        else:
            z = load_rows(z_ptr, stride_zl, start, offs_p, mask_p, L, CHUNK)
            gated = y * _gate(z.to(tl.float32), DTYPE)
        store_rows(gated_ptr, E, gated, start, offs_p, mask_p, L, CHUNK)
    store_tile(state_out_ptr + offs_state + offs_h, h, mask_rows, mask_n)

    # The state of the convolution: each program copies the rows of its channels of x, head 0 also those of B and C.
    if TAPS > 1:
        conv_out_ptr += batch_row * (TAPS - 1) * CHANNELS
        every_p, every_n = offs_p < P - first_p, offs_n < N
        _last_rows(xbc_ptr, stride_zl, conv_ptr, conv_out_ptr, CHANNELS, channel + offs_p, every_p, L, TAPS, BLOCK_TAPS)
        if part == 0:
            offs_B = E + group * N + offs_n
            _last_rows(xbc_ptr, stride_zl, conv_ptr, conv_out_ptr, CHANNELS, offs_B, every_n, L, TAPS, BLOCK_TAPS)
            _last_rows(
                xbc_ptr, stride_zl, conv_ptr, conv_out_ptr, CHANNELS, offs_B + GROUPS * N, every_n, L, TAPS, BLOCK_TAPS
            )


@triton.jit(do_not_specialize=["L", "rows", "group"])
def _mamba2_mixer_fwd_kernel(
    zxbcdt_ptr,
    conv_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    D_ptr,
    norm_weight_ptr,
    B_ptr,
    C_ptr,
    own_ptr,
    decays_ptr,
    done_ptr,
    scale_ptr,
    edges_ptr,
    gated_ptr,
    y_ptr,
    conv_out_ptr,
    state_out_ptr,
    stride_zb,
    L,
    rows,
    group,
    eps,
    stride_zl: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNEL_D: tl.constexpr,
    NORM: tl.constexpr,
    TAPS: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program id: `group` rows' scan programs, then the norm programs of the `group` rows before them, and so on.
    ONLY_GATE there are none of these, and gated is y.

    rows, H and what prepare.py writes: a batch row, and its heads, for each group of GROUPS.
    """
    PARTS: tl.constexpr = H * ((P + BLOCK_P - 1) // BLOCK_P)
    norms = 0 if NORM == ONLY_GATE else tl.cdiv(L, NORM_ROWS)
    first_row = tl.program_id(0) // (group * (PARTS + norms)) * group
    program = tl.program_id(0) % (group * (PARTS + norms))
    if program < group * PARTS:
        row = (first_row + program // PARTS).to(tl.int64)
        if row < rows:
            _scan(
                zxbcdt_ptr, conv_ptr, state_ptr, weight_ptr, bias_ptr, D_ptr, B_ptr, C_ptr, own_ptr, decays_ptr,
                scale_ptr, edges_ptr, gated_ptr, conv_out_ptr, state_out_ptr, row, program % PARTS,
                stride_zb, stride_zl, L, H, P, N, GROUPS, CHANNEL_D, NORM, TAPS, BOTH, BLOCK_TAPS, BLOCK_N, BLOCK_P,
                CHUNK,
            )  # fmt: skip
            tl.debug_barrier()  # what all threads have written comes before the count
            tl.atomic_add(done_ptr + row, 1, sem="release")
    elif NORM != ONLY_GATE:
        program -= group * PARTS
        row = (first_row - group + program // norms).to(tl.int64)
        if (row >= 0) & (row < rows):
            done = tl.atomic_add(done_ptr + row, 0, sem="acquire")
            while done < PARTS:
                done = tl.atomic_add(done_ptr + row, 0, sem="acquire")
            batch_row, of_group = group_of(row, GROUPS)
            E: tl.constexpr = GROUPS * H * P
            at = batch_row * L * E + of_group * (H * P)
            first = program % norms * NORM_ROWS
            norm_weight_ptr += of_group * (H * P)
            z_ptr = zxbcdt_ptr + batch_row * stride_zb + of_group * (H * P)
            _norm(
                gated_ptr + at, norm_weight_ptr, z_ptr, y_ptr + at, first, L, eps, stride_zl, H * P, E, NORM,
                NORM_ROWS, BLOCK_E,
            )  # fmt: skip


def _norm_block(E: int) -> int:
    """Channels of a norm program at a time: all, or 1,024 (with 512 the kernel spills 16 bytes; sm_90, Triton 3.7)."""
    return triton.next_power_of_2(E) if E <= 2048 else 1024


def mamba2_mixer(call: Mixer) -> tuple[Tensor, Tensor, Tensor]:
    conv_weight, conv_bias, _, A_log, D = (t.contiguous() for t in call.parameters)
    norm_weight = None if call.norm_weight is None else call.norm_weight.contiguous()
    conv, ssm = call.conv.contiguous(), call.ssm.contiguous()
    zxbcdt = last_dim_contiguous(call.zxbcdt)
    (batch, L, _), (_, heads, P, N), groups = zxbcdt.shape, ssm.shape, call.groups
    rows, H = batch * groups, heads // groups
    taps, both, dtype = conv_weight.shape[1], A_log.dim() == 2, zxbcdt.dtype
    launch = plan("mamba2_mixer", MIXER, L, P, N, both, zxbcdt)
    B, C, own, decays, done = prepare(call._replace(zxbcdt=zxbcdt, conv=conv), launch["CHUNK"], launch["BLOCK_N"])
    y = zxbcdt.new_empty(batch, L, heads * P)
    gated = y if norm_weight is None or wide(dtype) == dtype else y.new_empty(y.shape, dtype=wide(dtype))
    last_conv, last_ssm = torch.empty_like(conv), torch.empty_like(ssm)
    edges = y.new_empty(rows, H, triton.cdiv(L, launch["CHUNK"]), P, N, dtype=wide(dtype)) if both else None
    scale = scale_of_tokens(call.scales, y.device) if both else None
    parts = H * triton.cdiv(P, launch["BLOCK_P"])
    group = max(1, min(rows, RESIDENT * multiprocessors(y.device) // parts))
    if norm_weight is None:
        grid = (triton.cdiv(rows, group) * group * parts,)
    else:
        grid = ((triton.cdiv(rows, group) + 1) * group * (parts + triton.cdiv(L, NORM_ROWS)),)
    _mamba2_mixer_fwd_kernel[grid](
        *(zxbcdt, conv, ssm, conv_weight, conv_bias, D, norm_weight, B, C, own, decays, done, scale, edges),
        *(gated, y, last_conv, last_ssm, zxbcdt.stride(0), L, rows, group, call.eps),
        stride_zl=zxbcdt.stride(1),
        H=H,
        GROUPS=groups,
        CHANNEL_D=D.dim() == 2,
        NORM=norm_kind(call),
        TAPS=taps,
        BLOCK_TAPS=triton.next_power_of_2(max(taps - 1, 1)),
        NORM_ROWS=NORM_ROWS,
        BLOCK_E=_norm_block(H * P),
        **launch,
    )
    return y, last_conv, last_ssm
