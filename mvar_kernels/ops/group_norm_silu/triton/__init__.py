"""group_norm_silu in Triton: two launches, which read x twice and write it once.

PyTorch on CUDA normalizes contiguous tensors only. Of a channels-last one, as the decoder's are, it makes a contiguous
copy, reads that for the statistics, reads and writes it to normalize and again for SiLU, and the next convolution makes
it channels last: 9 passes over the tensor, 5 of a contiguous one. The 35 sites of the 256×256 decoder have 207 MB an
image in bfloat16.

**Statistics.** A program takes a slab of a sample's positions in GROUPS whole groups of channels. Each number of its
tile has a running mean and sum of squares about it (Welford), which are combined over positions, then over the channels
of each group, and written as partials (slices, groups). Slabs follow from the sizes alone and every addition has its
place: the same result from run to run.

**Normalization.** A program combines the partials of its channels' groups and normalizes a slab of positions.

**Anchor.** Both count x from the group's first number: means far from zero lose no bits, and of a constant group
exactly zero is left.

**Layout.** Contiguous, a group's numbers are one run of memory, and the statistics take it as one channel. Channels
last, a program of the statistics takes up to 256 consecutive channels, and one of the normalization a power of two that
divides C: of 160 channels it would mask 96 of 256, and half of its work is exponentials and divisions. A tile is
[BLOCK_L, BLOCK_C] channels last and else [BLOCK_C, BLOCK_L].
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.dispatch import Implementation
from mvar_kernels.ffi import empty_contiguous
from mvar_kernels.ops.group_norm_silu.inputs import GroupNormSiLU
from mvar_kernels.tiling import Tile
from mvar_kernels.triton_math import LOG2_E, divide, exp, reciprocal, widen

WIDEST = 4096  # channels of a group in the registers of a program, channels last
CHANNELS = 256  # of several groups in a program of the statistics
# Programs of four warps at work at a time on 132 multiprocessors; the most slabs of a sample; and what starting and
# ending a program costs, in tiles.
AT_WORK, MOST_SLABS, START_COST = 8 * 132, 256, 8


@triton.jit
def _combined(mean, m2, n, axis: tl.constexpr):
    """Mean and sum of squares about it of all sets of numbers along an axis together, and their number."""
    total = tl.sum(n, axis=axis, keep_dims=True)
    centre = tl.sum(n * mean, axis=axis, keep_dims=True) / tl.maximum(total, 1.0)
    m2 = tl.sum(m2 + n * (mean - centre) * (mean - centre), axis=axis, keep_dims=True)
    return centre, m2, total


@triton.jit
def _offsets(offs_l, offs_c, L, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    return offs_l.to(tl.int64) * C + offs_c if CHANNELS_LAST else offs_c.to(tl.int64) * L + offs_l


@triton.jit
def _anchor(x_ptr, first_c, mask_c, L, CHANNELS_LAST: tl.constexpr):
    """The first number of each channel's group, whose first channel is first_c."""
    return tl.load(x_ptr + (first_c if CHANNELS_LAST else first_c.to(tl.int64) * L), mask=mask_c).to(tl.float32)


@triton.jit(do_not_specialize=["slab", "slices"])
def _group_norm_silu_stats_kernel(
    x_ptr,
    channels_ptr,
    mean_ptr,
    m2_ptr,
    stride_xb,
    L,
    slab,
    slices,
    C: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """GROUPS groups of CPG channels, on slice s of sample b: `slab` tiles of BLOCK_L positions."""
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1  # of positions
    blocks: tl.constexpr = (C // CPG + GROUPS - 1) // GROUPS
    block, pid = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    s, b = (pid % slices).to(tl.int64), (pid // slices).to(tl.int64)
    first = s * slab * BLOCK_L
    last = tl.minimum(first + slab * BLOCK_L, L)
    in_block = tl.expand_dims(tl.arange(0, BLOCK_C), AXIS)
    offs_c = block * GROUPS * CPG + in_block
    mask_c = (in_block < GROUPS * CPG) & (offs_c < C)
    x_ptr += b * stride_xb
    anchor = _anchor(x_ptr, offs_c // CPG * CPG, mask_c, L, CHANNELS_LAST)

    in_tile = tl.expand_dims(tl.arange(0, BLOCK_L), 1 - AXIS)
    mean = tl.zeros([BLOCK_L, BLOCK_C] if CHANNELS_LAST else [BLOCK_C, BLOCK_L], dtype=tl.float32)
    m2 = mean
    count = 0.0
    for start in range(first, last, BLOCK_L):
        mask = (start + in_tile < last) & mask_c
        offs = _offsets(start + in_tile, offs_c, L, C, CHANNELS_LAST)
        x = widen(tl.load(x_ptr + offs, mask=mask, other=0.0)) - anchor
        count += 1.0
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / count)
        m2 += delta * (x - mean)

    n = tl.where(in_tile < (last - first - 1) % BLOCK_L + 1, count, count - 1.0)
    mean, m2, n = _combined(mean, m2, n, AXIS)
    if CHANNELS_LAST:
        # Channels of a group are brought to one thread through memory, as groups start at any channel.
        channels_ptr += (b * slices + s) * 2 * C
        tl.store(channels_ptr + offs_c, mean, mask=mask_c)
        tl.store(channels_ptr + C + offs_c, m2, mask=mask_c)
        tl.debug_barrier()
        in_group = tl.arange(0, BLOCK_C // GROUPS)[None, :]
        offs_m = (block * GROUPS + tl.arange(0, GROUPS)[:, None]) * CPG + in_group
        member = (in_group < CPG) & (offs_m < C)  # [GROUPS, BLOCK_C / GROUPS]
        mean = tl.load(channels_ptr + offs_m, mask=member, other=0.0)
        m2 = tl.load(channels_ptr + C + offs_m, mask=member, other=0.0)
        mean, m2, n = _combined(mean, m2, tl.where(member, (last - first).to(tl.float32), 0.0), 1)
    offs_g = block * GROUPS + tl.arange(0, GROUPS)[:, None]
    offs = (b * slices + s) * (C // CPG) + offs_g
    tl.store(mean_ptr + offs, mean, mask=offs_g < C // CPG)
    tl.store(m2_ptr + offs, m2, mask=offs_g < C // CPG)


@triton.jit(do_not_specialize=["slab", "slabs", "slices", "in_slice", "in_last"])
def _group_norm_silu_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    m2_ptr,
    out_ptr,
    stride_xb,
    L,
    slab,
    slabs,
    slices,
    in_slice,
    in_last,
    eps,
    C: tl.constexpr,
    CPG: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`slab` tiles of BLOCK_L positions. in_slice, in_last: numbers of a group in a slice, and in the last one."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1  # of positions, and of slices
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block, pid = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b = (pid // slabs).to(tl.int64)
    first = (pid % slabs).to(tl.int64) * slab * BLOCK_L
    last = tl.minimum(first + slab * BLOCK_L, L)
    offs_c = block * BLOCK_C + tl.expand_dims(tl.arange(0, BLOCK_C), AXIS)
    mask_c = offs_c < C
    group = offs_c // CPG
    mean_ptr += b * slices * (C // CPG)
    m2_ptr += b * slices * (C // CPG)
    x_ptr += b * stride_xb
    out_ptr += b * L * C

    mean = tl.zeros([1, BLOCK_C] if CHANNELS_LAST else [BLOCK_C, 1], dtype=tl.float32)
    m2, n = mean, 0.0
    for start in range(0, slices, BLOCK_S):
        offs_s = start + tl.expand_dims(tl.arange(0, BLOCK_S), 1 - AXIS)
        mask = (offs_s < slices) & mask_c
        means = tl.load(mean_ptr + offs_s * (C // CPG) + group, mask=mask, other=0.0)
        m2s = tl.load(m2_ptr + offs_s * (C // CPG) + group, mask=mask, other=0.0)
        counts = tl.where(offs_s < slices - 1, in_slice, tl.where(offs_s < slices, in_last, 0.0))
        means, m2s, counts = _combined(means, m2s, counts, AXIS)
        added = tl.sum(counts)
        delta, share = means - mean, added / (n + added)
        mean, m2, n = mean + delta * share, m2 + m2s + delta * delta * n * share, n + added
    anchor = _anchor(x_ptr, group * CPG, mask_c, L, CHANNELS_LAST)
    factor = tl.rsqrt(m2 / n + eps) * tl.load(weight_ptr + offs_c, mask=mask_c).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c).to(tl.float32)

    for start in range(first, last, BLOCK_L):
        offs_l = start + tl.expand_dims(tl.arange(0, BLOCK_L), 1 - AXIS)
        mask = offs_l < last
        if C % BLOCK_C:
            mask = mask & mask_c
        offs = _offsets(offs_l, offs_c, L, C, CHANNELS_LAST)
        v = (widen(tl.load(x_ptr + offs, mask=mask, other=0.0)) - anchor - mean) * factor + bias
        if EXACT:
            out = divide(v, 1.0 + exp(-v, EXACT), EXACT)
        else:
            out = v * reciprocal(1.0 + tl.exp2(v * -LOG2_E))
        tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@cache
def stats_candidates(block_c: int) -> tuple[Tile, ...]:
    """A thread holds 16 or 32 numbers, 16 or 32 bytes of each on their way, and two sums of each."""
    return tuple(
        Tile({"BLOCK_L": max(numbers * 32 * warps // block_c, 1), "BLOCK_C": block_c}, warps)
        for numbers, warps in ((16, 4), (32, 4), (16, 8))
    )


@cache
def forward_candidates(length: int, C: int, channels_last: bool) -> tuple[Tile, ...]:
    """length: L, to a power of two."""
    divisor = C & -C
    block_c = min(divisor if divisor >= 16 else triton.next_power_of_2(C), 64)
    tiles = []
    for numbers in (32 * 128, 16 * 128, 64 * 128):
        block_l = min(length, numbers // block_c if channels_last else numbers)
        per_tile = block_c if channels_last else min(numbers // block_l, triton.next_power_of_2(C))
        tiles.append(Tile({"BLOCK_L": block_l, "BLOCK_C": per_tile}, 4))
    return tuple(tiles)


@cache
def slab_length(programs: int, tiles: int) -> int:
    """Tiles that one program walks, where there are so many programs of all: as many slabs as take the least rounds of
    programs, times their length; of the best the fewest."""

    def cost(slabs: int) -> int:
        return triton.cdiv(programs * slabs, AT_WORK) * (triton.cdiv(tiles, slabs) + START_COST)

    slabs = min(range(1, min(tiles, MOST_SLABS) + 1), key=cost)
    return triton.cdiv(tiles, slabs)


def group_norm_silu(call: GroupNormSiLU) -> tuple[Tensor]:
    x, weight, bias, groups, eps, channels_last = call
    x = x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
    out = empty_contiguous(x)
    if not x.numel():
        return (out,)
    B, (L, C) = x.shape[0], x.shape[1:] if channels_last else x.shape[:0:-1]
    dtype = str(x.dtype).removeprefix("torch.")
    # Channels and positions of a group as the statistics take it, and groups of a program.
    channels, length = (C // groups, L) if channels_last else (1, C // groups * L)
    together = 1 << (max(min(groups, CHANNELS // channels), 1).bit_length() - 1) if channels_last else 1
    block_c = together * triton.next_power_of_2(channels)
    tile = tiling.chosen("group_norm_silu_stats", f"C{block_c} {dtype}", stats_candidates(block_c), x.device)
    blocks, tiles = triton.cdiv(groups, together), triton.cdiv(length, tile.sizes["BLOCK_L"])
    slab = slab_length(B * blocks, tiles)
    slices, in_slice = triton.cdiv(tiles, slab), slab * tile.sizes["BLOCK_L"]
    partials = torch.empty((2, B, slices, groups), dtype=torch.float32, device=x.device)
    of_channels = partials.new_empty((B, slices, 2, C) if channels_last else (1,))
    _group_norm_silu_stats_kernel[(B * slices * blocks,)](
        x,
        of_channels,
        *partials,
        x.stride(0),
        length,
        slab,
        slices,
        groups * channels,
        channels,
        together,
        channels_last,
        **tile.arguments(),
    )
    candidates = forward_candidates(triton.next_power_of_2(L), C, channels_last)
    tile = tiling.chosen("group_norm_silu_fwd", f"C{candidates[0].sizes['BLOCK_C']} {dtype}", candidates, x.device)
    block_c = tile.sizes["BLOCK_C"]
    blocks, tiles = triton.cdiv(C, block_c), triton.cdiv(L, tile.sizes["BLOCK_L"])
    slab = slab_length(B * blocks, tiles)
    slabs = triton.cdiv(tiles, slab)
    _group_norm_silu_fwd_kernel[(B * slabs * blocks,)](
        x,
        weight.contiguous(),
        bias.contiguous(),
        *partials,
        out,
        x.stride(0),
        L,
        slab,
        slabs,
        slices,
        float(channels * in_slice),
        float(channels * (length - (slices - 1) * in_slice)),
        eps,
        C,
        C // groups,
        channels_last,
        max(min(1024 // block_c, 32), 16) if channels_last else 16,
        **tile.arguments(),
    )
    return (out,)


def _unsupported(call: GroupNormSiLU) -> str | None:
    channels = call.x.shape[2] // call.groups if call.channels_last else 1
    return tiling.unsupported_dtype(call.x) or (
        f"{channels} channels in a group are more than {WIDEST}" if channels > WIDEST else None
    )


group_norm_silu_triton = Implementation(_unsupported, group_norm_silu, None)
