"""adaLN in Triton: one pass over memory, whole rows in registers.

**Forward.** A program takes BLOCK_L tokens of one sample, each a whole row of C channels, masked to the
next power of two. The row is read once: mean, then variance of what is left, then the modulation, all on
registers. The modulation vectors are read once a program, so several rows share them.

**Backward.** With n = (x − mean)·r, r = 1/σ, w = grad·(1+scale):

    dx     = r·(w − mean(w) − n·r·mean(w·(x − mean)))        row by row
    dscale = Σ grad·n,  dshift = Σ grad                      over a sample's tokens
    gated:  d = grad_x' + dx is the gradient at x', hence that of x;  dbranch = gate·d,  dgate = Σ branch·d

mean and r are computed again: the rows are in registers anyway, and storing them would be two more
tensors. Stage 1: a program walks a slab of a sample's tokens, BLOCK_L at a time, writes dx (and dbranch)
and keeps its share of the sums over tokens in float32 registers; it writes them once, as
partials (B, slabs, sums, C). Stage 2 adds the slabs. Slabs follow from (B, L, C) alone and every addition has
its place: gradients are the same from run to run.

**Layout.** A thread owns one 16-byte vector of channels in each of its rows (warps = C / 256 in 16 bits):
accesses are coalesced, sums over tokens need no exchange between threads, and a sum over channels is one
exchange between warps.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.dispatch import Implementation
from mvar_kernels.ffi import empty_contiguous, last_dim_contiguous
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.ops.adaln.triton.backward import _adaln_bwd_kernel, _adaln_sums_kernel, _gated_adaln_bwd_kernel
from mvar_kernels.ops.adaln.triton.forward import _adaln_fwd_kernel, _gated_adaln_fwd_kernel
from mvar_kernels.tiling import Tile

WIDEST = 4096  # channels that 16 warps hold in registers, forward and backward, on every architecture
# Of the backward's slabs: programs at work at a time, counted in warps (16 on each of 132 multiprocessors, as 128
# registers a thread allow); the least tokens in one; and what starting and ending one costs, in tokens.
WARPS_AT_WORK, SHORTEST, SLAB_COST = 16 * 132, 8, 6
STAGED_BYTES = 96 * 1024  # of shared memory: what a program may have on every architecture, less a little


def _unsupported(call: AdaLN | GatedAdaLN) -> str | None:
    reason, C = tiling.unsupported_dtype(call.x), call.x.shape[-1]
    return f"C={C} is not from 1 to {WIDEST}" if reason is None and not 1 <= C <= WIDEST else reason


def _warps(block_c: int) -> int:
    return min(max(block_c // 256, 4), 16)


def _rows_together(block_c: int) -> int:
    """Rows that share a program's warps, where one row is too narrow for them."""
    return min(max(256 * _warps(block_c) // block_c, 1), 8)


def _tile(block_c: int, rows: int, **stages: int) -> Tile:
    """`rows`: vectors of 16 bytes (of 16-bit numbers) that a thread holds of each tensor."""
    sizes = {"BLOCK_L": rows * _rows_together(block_c), "BLOCK_C": block_c} | stages
    return Tile(sizes, _warps(block_c), stages.get("STAGES", 1))


@cache
def forward_candidates(block_c: int) -> tuple[Tile, ...]:
    return tuple(_tile(block_c, rows) for rows in (4, 2, 1) if rows * block_c <= 4 * 4096)


@cache
def backward_candidates(block_c: int, itemsize: int, gated: bool) -> tuple[Tile, ...]:
    """Fewer rows in registers than forward, as more is alive; the next ones are on their way to shared memory.

    The gated kernel reads four tensors, not two: with two rows of them, fewer warps than `slab_length` counts on, and
    in the widest of them Triton 3.6 spills. The other spills 8 bytes with one row in three stages (C=1920, sm_90) or in
    four (C=1024, sm_100).
    """
    row_bytes = (4 if gated else 2) * _rows_together(block_c) * block_c * itemsize
    rows_stages = ((1, 4), (1, 3), (2, 2), (1, 2), (1, 1)) if gated else ((2, 3), (2, 2), (1, 2), (1, 1))
    fitting = [
        (rows, stages)
        for rows, stages in rows_stages
        if rows * (stages - 1) * row_bytes <= STAGED_BYTES and (not gated or rows * block_c <= WIDEST)
    ]
    return tuple(_tile(block_c, rows, STAGES=stages) for rows, stages in fitting[:3])


SUMS_CANDIDATES = (Tile({"BLOCK_S": 32, "BLOCK_C": 128}), Tile({"BLOCK_S": 16, "BLOCK_C": 256}))


def _chosen(kernel: str, x: Tensor, candidates: tuple[Tile, ...]) -> Tile:
    dtype = str(x.dtype).removeprefix("torch.")
    return tiling.chosen(kernel, f"C{candidates[0].sizes['BLOCK_C']} {dtype}", candidates, x.device)


@cache
def slab_length(B: int, L: int, C: int) -> int:
    """Tokens that one program of the backward walks.

    All programs take about as long, so what counts is how many rounds of them the GPU makes, times the length
    of one; the fewest slabs of the best are taken, as each writes float32 sums.
    """
    at_work = WARPS_AT_WORK // _warps(triton.next_power_of_2(C))

    def cost(slabs: int) -> int:
        return triton.cdiv(B * slabs, at_work) * (triton.cdiv(L, slabs) + SLAB_COST)

    slabs = min(range(1, triton.cdiv(L, SHORTEST) + 1), key=cost, default=1)
    return max(triton.cdiv(L, slabs), 1)


def _adaln(call: AdaLN) -> tuple[Tensor]:
    x, scale, shift, eps = call.readable()
    out = empty_contiguous(x)
    B, L, C = x.shape
    tile = _chosen("adaln_fwd", x, forward_candidates(triton.next_power_of_2(C)))
    _adaln_fwd_kernel[(B * triton.cdiv(L, tile.sizes["BLOCK_L"]),)](
        x,
        scale,
        shift,
        out,
        *x.stride()[:2],
        scale.stride(0),
        shift.stride(0),
        L,
        eps,
        C,
        **tile.arguments(),
    )
    return (out,)


def _gated_adaln(call: GatedAdaLN) -> tuple[Tensor, Tensor]:
    x, branch, gate, scale, shift, eps = call.readable()
    x_new, out = empty_contiguous(x), empty_contiguous(x)
    B, L, C = x.shape
    tile = _chosen("gated_adaln_fwd", x, forward_candidates(triton.next_power_of_2(C)))
    _gated_adaln_fwd_kernel[(B * triton.cdiv(L, tile.sizes["BLOCK_L"]),)](
        x,
        branch,
        gate,
        scale,
        shift,
        x_new,
        out,
        *x.stride()[:2],
        *branch.stride()[:2],
        gate.stride(0),
        scale.stride(0),
        shift.stride(0),
        L,
        eps,
        C,
        **tile.arguments(),
    )
    return x_new, out


def _adaln_backward(grads: Sequence[Tensor], call: AdaLN) -> tuple[Tensor, ...]:
    x, scale, _, eps = call.readable()
    grad_out = last_dim_contiguous(grads[0])
    dx, dscale, dshift = empty_contiguous(x), empty_contiguous(scale), empty_contiguous(scale)
    B, L, C = x.shape
    slab = slab_length(B, L, C)
    partials = x.new_empty((B, triton.cdiv(L, slab), 2, C), dtype=torch.float32)
    tile = _chosen("adaln_bwd", x, backward_candidates(triton.next_power_of_2(C), x.itemsize, gated=False))
    _adaln_bwd_kernel[(B * partials.shape[1],)](
        grad_out,
        x,
        scale,
        dx,
        partials,
        *grad_out.stride()[:2],
        *x.stride()[:2],
        scale.stride(0),
        L,
        slab,
        eps,
        C,
        **tile.arguments(),
    )
    _add_slabs(partials, dscale, dshift, dshift)
    return dx, dscale, dshift


def _gated_adaln_backward(grads: Sequence[Tensor], call: GatedAdaLN) -> tuple[Tensor, ...]:
    grad_x_new, grad_out = map(last_dim_contiguous, grads)
    x_new, branch, gate, scale, _, eps = call.readable()
    dx, dbranch = empty_contiguous(x_new), empty_contiguous(x_new)
    dgate, dscale, dshift = empty_contiguous(scale), empty_contiguous(scale), empty_contiguous(scale)
    B, L, C = x_new.shape
    slab = slab_length(B, L, C)
    partials = x_new.new_empty((B, triton.cdiv(L, slab), 3, C), dtype=torch.float32)
    tile = _chosen("gated_adaln_bwd", x_new, backward_candidates(triton.next_power_of_2(C), x_new.itemsize, gated=True))
    _gated_adaln_bwd_kernel[(B * partials.shape[1],)](
        grad_x_new,
        grad_out,
        x_new,
        branch,
        gate,
        scale,
        dx,
        dbranch,
        partials,
        *grad_x_new.stride()[:2],
        *grad_out.stride()[:2],
        *x_new.stride()[:2],
        *branch.stride()[:2],
        gate.stride(0),
        scale.stride(0),
        L,
        slab,
        eps,
        C,
        **tile.arguments(),
    )
    _add_slabs(partials, dscale, dshift, dgate)
    return dx, dbranch, dgate, dscale, dshift


def _add_slabs(partials: Tensor, dscale: Tensor, dshift: Tensor, dgate: Tensor) -> None:
    """Stage 2. With two sums dgate is not written."""
    B, slabs, sums, C = partials.shape
    tile = tiling.chosen("adaln_sums", f"sums{sums}", SUMS_CANDIDATES, partials.device)
    _adaln_sums_kernel[(B * sums * triton.cdiv(C, tile.sizes["BLOCK_C"]),)](
        partials, dscale, dshift, dgate, slabs, C, sums, **tile.arguments()
    )


adaln_triton = Implementation(_unsupported, _adaln, _adaln_backward)
gated_adaln_triton = Implementation(_unsupported, _gated_adaln, _gated_adaln_backward)
