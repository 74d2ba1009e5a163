"""The forward of ssd_scan in Triton.

One program owns a head of a batch row, or BLOCK_P of its P channels, and walks the sequence in chunks of CHUNK tokens
with h in registers, float32 [BLOCK_P, BLOCK_N]; chunk.py has the formulas.

Bidirectional: the backward direction only adds to the decays of the scores, so that C Bᵀ and the matmul with x are
shared. What enters a chunk from its right, g, is found in a first sweep from right to left and kept in a workspace
(B, H, chunks, P, N) of bfloat16 or float32, as it is only ever an operand of C gᵀ. The same program reads it back in
the sweep from left to right.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ffi import last_dim_contiguous
from mvar_kernels.ops.mamba2.inputs import Scan
from mvar_kernels.ops.mamba2.triton.chunk import (
    add_from_tokens,
    advance,
    decay_of_state,
    decay_until,
    decay_vectors,
    from_state,
    operand,
    pair_decays,
    scale_numbers,
    scores_of,
)
from mvar_kernels.ops.mamba2.triton.common import (
    finite_rate,
    load_rows,
    load_skip,
    scale_of_tokens,
    store_rows,
)
from mvar_kernels.tiling import Tile
from mvar_kernels.triton_math import widen

SHORT = 16  # tokens: one chunk
# By kind, dtype and, where that is not wgmma, the matmul instruction. First what takes the fewest instructions of those
# that do not spill (Triton 3.7).
SCAN = {
    "short": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 4, 1), Tile({"CHUNK": 16, "BLOCK_P": 32}, 4, 1)),
    "forward": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 4, 1),),
    "forward bfloat16": (Tile({"CHUNK": 64, "BLOCK_P": 64}, 4, 1), Tile({"CHUNK": 32, "BLOCK_P": 64}, 4, 1)),
    "forward bfloat16 mma.sync": (Tile({"CHUNK": 32, "BLOCK_P": 64}, 4, 2),),
    "forward float32": (Tile({"CHUNK": 16, "BLOCK_P": 64}, 8, 1),),
    "both": (Tile({"CHUNK": 16, "BLOCK_P": 32}, 4, 1),),
    "both bfloat16": (Tile({"CHUNK": 32, "BLOCK_P": 64}, 4, 2), Tile({"CHUNK": 32, "BLOCK_P": 64}, 8, 1)),
    "both bfloat16 mma.sync": (Tile({"CHUNK": 32, "BLOCK_P": 64}, 4, 1),),
    "both float32": (Tile({"CHUNK": 16, "BLOCK_P": 32}, 8, 1),),
}


def plan(
    kernel: str, tiles: Mapping[str, tuple[Tile, ...]], L: int, P: int, N: int, both: bool, like: Tensor
) -> dict[str, Any]:
    """The launch's keyword arguments: tile and padded sizes.

    Tiles are chosen by how many tokens there are (one short chunk, or more), the directions and the dtype, so that
    sums are taken in the same order whatever the batch.
    """
    kind = "both" if both else "short" if L <= SHORT else "forward"
    dtype = str(like.dtype).removeprefix("torch.")
    keys = (f"{kind} {dtype} {tiling.matmul_instruction(like.device)}", f"{kind} {dtype}", kind)
    candidates = next(tiles[key] for key in keys if key in tiles)
    arguments = tiling.chosen(kernel, f"{kind} P{P} N{N} {dtype}", candidates, like.device).arguments()
    arguments["BLOCK_P"] = min(arguments["BLOCK_P"], tiling.dot_block(P))
    if N > 128:  # two stages of the mixer's tiles of 64 tokens take 247,040 bytes of shared memory, of Hopper's 232,448
        arguments["num_stages"] = 1
    return arguments | {"P": P, "N": N, "BOTH": both, "BLOCK_N": tiling.dot_block(N)}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what goes through memory between two matmuls: one with the range for it."""
    return torch.float32 if dtype == torch.float16 else dtype


@triton.jit
def _delta(dt_ptr, stride_l, start, L, CHUNK: tl.constexpr):
    """A chunk's column of Δ in float32 [CHUNK], 0 in rows ≥ L. dt_ptr: the batch row's first, at its head.

    start < L always: the branch keeps the compiler from loading the column again for every register layout.
    """
    column = tl.zeros([CHUNK], tl.float32)
    if start < L:
        offs = tl.arange(0, CHUNK)
        pointers = dt_ptr + tl.cast(start, tl.int64) * stride_l + offs * stride_l
        column = tl.load(pointers, mask=offs < L - start, other=0.0).to(tl.float32)
    return column


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
    GROUPS: tl.constexpr,
    CHANNEL_D: tl.constexpr,
    BOTH: tl.constexpr,
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
    offs_t, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = offs_p < P - first_p, offs_n < N
    mask_h = mask_p[:, None] & mask_n[None, :]
    offs_h = offs_p[:, None] * N + offs_n[None, :]
    chunks = tl.cdiv(L, CHUNK)
    x_ptr += row * stride_xb + head * stride_xh + first_p
    y_ptr += (row * L * H + head) * P + first_p
    dt_ptr += row * stride_db + head
    B_ptr += row * stride_Bb
    C_ptr += row * stride_Cb
    if GROUPS > 1:
        group = head // (H // GROUPS)
        B_ptr += group * N
        C_ptr += group * N
    state_ptr += ((row * H + head) * P + first_p) * N
    A = finite_rate(tl.load(A_ptr + head).to(tl.float32))
    D, skip = load_skip(D_ptr, head, first_p, offs_p, mask_p, P, CHANNEL_D)

    if BOTH:
        A_back = finite_rate(tl.load(A_ptr + H + head).to(tl.float32))
        edges_ptr += (row * H + head) * chunks * P * N + first_p * N
        g = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for left in range(chunks):
            chunk = chunks - 1 - left
            start = chunk * CHUNK
            tl.store(edges_ptr + chunk * P * N + offs_h, g.to(edges_ptr.dtype.element_ty), mask=mask_h)
            x = widen(load_rows(x_ptr, stride_xl, start, offs_p, mask_p, L, CHUNK))
            B = load_rows(B_ptr, stride_Bl, start, offs_n, mask_n, L, CHUNK)
            delta = _delta(dt_ptr + stride_dd, stride_dl, start, L, CHUNK)
            back, end = decay_vectors(delta, A_back, True, EXACT)
            scale, first, last, continues = scale_numbers(scale_ptr, start, L, CHUNK)
            weights = tl.where(scale == first, decay_until(end, back, EXACT), 0.0)
            chunk_decay = tl.where(first == last, decay_of_state(end, EXACT), 0.0)
            g = tl.where(continues, advance(g, chunk_decay, x, weights, B, None, DTYPE), 0.0)
        tl.debug_barrier()

    h = tl.load(state_ptr + offs_h, mask=mask_h, other=0.0)
    for chunk in range(chunks):
        start = chunk * CHUNK
        x = widen(load_rows(x_ptr, stride_xl, start, offs_p, mask_p, L, CHUNK))
        B = load_rows(B_ptr, stride_Bl, start, offs_n, mask_n, L, CHUNK)
        C = load_rows(C_ptr, stride_Cl, start, offs_n, mask_n, L, CHUNK)
        vectors, end = decay_vectors(_delta(dt_ptr, stride_dl, start, L, CHUNK), A, False, EXACT)
        entered, tokens = operand(h, DTYPE), operand(x, DTYPE)
        h = advance(h, decay_of_state(end, EXACT), x, decay_until(end, vectors, EXACT), B, None, DTYPE)
        # Own terms included, which no RMSNorm scales up here.
        decays = pair_decays(vectors, offs_t[:, None] >= offs_t[None, :], EXACT)
        if BOTH:
            delta = _delta(dt_ptr + stride_dd, stride_dl, start, L, CHUNK)
            back, _ = decay_vectors(delta, A_back, True, EXACT)
            scale, first, last, _ = scale_numbers(scale_ptr, start, L, CHUNK)
            later = (offs_t[:, None] < offs_t[None, :]) & (scale[:, None] == scale[None, :])
            decays += pair_decays(back, later, EXACT)
        scores = scores_of(C, B, decays, D, DTYPE)
        y = from_state(C, entered, decay_of_state(vectors, EXACT), DTYPE)
        if BOTH:
            right = tl.load(edges_ptr + chunk * P * N + offs_h, mask=mask_h, other=0.0)
            y += from_state(C, operand(right, DTYPE), tl.where(scale == last, decay_of_state(back, EXACT), 0.0), DTYPE)
        y = add_from_tokens(y, scores, tokens, DTYPE)
        if CHANNEL_D:
            y += skip[None, :] * x.to(tl.float32)
        store_rows(y_ptr, H * P, y, start, offs_p, mask_p, L, CHUNK)
    state_out_ptr += ((row * H + head) * P + first_p) * N
    tl.store(state_out_ptr + offs_h, h, mask=mask_h)


def ssd_scan(call: Scan) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, state, scales = call
    rows, L, H, P = x.shape
    both = A.dim() == 2
    launch = plan("ssd_scan", SCAN, L, P, state.shape[-1], both, x)
    x, dt, B, C = (last_dim_contiguous(t) for t in (x, dt, B, C))
    A, D, state = (t.contiguous() for t in (A, D, state))
    y, last = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
    chunks = triton.cdiv(L, launch["CHUNK"])
    edges = x.new_empty(rows, H, chunks, *state.shape[2:], dtype=wide(x.dtype)) if both else None
    scale = scale_of_tokens(scales, x.device) if both else None
    strides = (*x.stride()[:3], *dt.stride()[:3], *B.stride()[:2], *C.stride()[:2])
    grid = (rows * H * triton.cdiv(P, launch["BLOCK_P"]),)
    _ssd_scan_fwd_kernel[grid](
        *(x, dt, A, B, C, D, state, scale, edges, y, last, *strides, L, H),
        GROUPS=call.groups,
        CHANNEL_D=D.dim() == 2,
        **launch,
    )
    return y, last
