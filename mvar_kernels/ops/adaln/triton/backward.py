"""Backward of adaln and gated_adaln: slabs of tokens, then the sum of slabs; see the package for the formulas."""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ffi import empty_contiguous, last_dim_contiguous
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.ops.adaln.options import gradients
from mvar_kernels.ops.adaln.triton.common import (
    WIDEST,
    Modulation,
    chosen_tile,
    load_tokens,
    load_vector,
    modulation,
    normalized_vjp,
    rows_together,
    tile_of,
    warps,
)
from mvar_kernels.tiling import Tile

# Of the backward's slabs: programs at work at a time, counted in warps (16 on each of 132 multiprocessors, as 128
# registers a thread allow); the least tokens in one; and what starting and ending one costs, in tokens.
WARPS_AT_WORK, SHORTEST, SLAB_COST = 16 * 132, 8, 6
STAGED_BYTES = 96 * 1024  # of shared memory: what a program may have on every architecture, less a little


@triton.jit
def _modulated_vjp(
    x,
    grad,
    factor,
    bias,
    b,
    rows,
    L,
    offs_c,
    mask,
    mask_c,
    eps,
    scale_ptr,
    stride_scale_b,
    stride_scale_l,
    dscale_ptr,
    dshift_ptr,
    C: tl.constexpr,
    RMS: tl.constexpr,
):
    """(n = norm(x), gradient at x, gradient at n·factor + bias); stores those of modulation per token, where it is."""
    out_grad = grad
    if scale_ptr is not None:
        grad = grad * (1.0 + load_tokens(scale_ptr, b, stride_scale_b, rows, stride_scale_l, offs_c, mask))
    normed, dx = normalized_vjp(x, grad, factor, mask_c, C, eps, RMS)
    if scale_ptr is not None:
        offs = (b * L + rows) * C + offs_c[None, :]  # [BLOCK_L, BLOCK_C]
        dscale = out_grad * (normed * factor + bias)
        tl.store(dscale_ptr + offs, dscale.to(dscale_ptr.dtype.element_ty), mask=mask)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + offs, out_grad.to(dshift_ptr.dtype.element_ty), mask=mask)
    return normed, dx, grad


@triton.jit(do_not_specialize=["L", "slab"])
def _adaln_bwd_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    dx_ptr,
    partials_ptr,
    stride_grad_b,
    stride_grad_l,
    stride_xb,
    stride_xl,
    stride_scale,
    L,
    slab,
    eps,
    C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    bias_ptr=None,
    token_scale_ptr=None,
    stride_token_scale_b=None,
    stride_token_scale_l=None,
    token_dscale_ptr=None,
    token_dshift_ptr=None,
    PLUS: tl.constexpr = 1.0,
    RMS: tl.constexpr = False,
):
    pid = tl.program_id(0).to(tl.int64)
    slabs = tl.cdiv(L, slab)
    b = pid // slabs
    first = (tl.program_id(0) % slabs) * slab
    last = tl.minimum(first + slab, L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    factor = PLUS + load_vector(scale_ptr, b, stride_scale, offs_c, mask_c)
    bias = load_vector(bias_ptr, b, 0, offs_c, mask_c)

    dscale = tl.zeros([BLOCK_C], dtype=tl.float32)
    dshift = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_L, num_stages=STAGES):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask = (offs_l < last)[:, None] & mask_c[None, :]  # [BLOCK_L, BLOCK_C]
        rows = offs_l.to(tl.int64)[:, None]  # [BLOCK_L, 1]
        grad = tl.load(grad_ptr + b * stride_grad_b + rows * stride_grad_l + offs_c[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + b * stride_xb + rows * stride_xl + offs_c[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        normed, dx, grad = _modulated_vjp(
            *(x.to(tl.float32), grad, factor, bias, b, rows, L, offs_c, mask, mask_c, eps, token_scale_ptr),
            *(stride_token_scale_b, stride_token_scale_l, token_dscale_ptr, token_dshift_ptr, C, RMS),
        )
        dscale += tl.sum(grad * normed, axis=0)
        dshift += tl.sum(grad, axis=0)
        tl.store(dx_ptr + (b * L + rows) * C + offs_c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)

    partials = partials_ptr + pid * 2 * C + offs_c  # [BLOCK_C]
    tl.store(partials, dscale, mask=mask_c)
    tl.store(partials + C, dshift, mask=mask_c)


@triton.jit(do_not_specialize=["L", "slab"])
def _gated_adaln_bwd_kernel(
    grad_x_new_ptr,
    grad_ptr,
    x_new_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    dx_ptr,
    dbranch_ptr,
    partials_ptr,
    stride_grad_x_new_b,
    stride_grad_x_new_l,
    stride_grad_b,
    stride_grad_l,
    stride_xb,
    stride_xl,
    stride_branch_b,
    stride_branch_l,
    stride_gate,
    stride_scale,
    L,
    slab,
    eps,
    C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    bias_ptr=None,
    token_scale_ptr=None,
    stride_token_scale_b=None,
    stride_token_scale_l=None,
    token_dscale_ptr=None,
    token_dshift_ptr=None,
    token_gate_ptr=None,
    stride_token_gate_b=None,
    stride_token_gate_l=None,
    token_dgate_ptr=None,
    PLUS: tl.constexpr = 1.0,
    RMS: tl.constexpr = False,
):
    pid = tl.program_id(0).to(tl.int64)
    slabs = tl.cdiv(L, slab)
    b = pid // slabs
    first = (tl.program_id(0) % slabs) * slab
    last = tl.minimum(first + slab, L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    factor = PLUS + load_vector(scale_ptr, b, stride_scale, offs_c, mask_c)
    bias = load_vector(bias_ptr, b, 0, offs_c, mask_c)
    gate = load_vector(gate_ptr, b, stride_gate, offs_c, mask_c)

    dscale = tl.zeros([BLOCK_C], dtype=tl.float32)
    dshift = tl.zeros([BLOCK_C], dtype=tl.float32)
    dgate = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_L, num_stages=STAGES):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask = (offs_l < last)[:, None] & mask_c[None, :]  # [BLOCK_L, BLOCK_C]
        rows = offs_l.to(tl.int64)[:, None]  # [BLOCK_L, 1]
        offs_grad_x_new = b * stride_grad_x_new_b + rows * stride_grad_x_new_l + offs_c[None, :]
        offs_branch = b * stride_branch_b + rows * stride_branch_l + offs_c[None, :]
        grad = tl.load(grad_ptr + b * stride_grad_b + rows * stride_grad_l + offs_c[None, :], mask=mask, other=0.0)
        x_new = tl.load(x_new_ptr + b * stride_xb + rows * stride_xl + offs_c[None, :], mask=mask, other=0.0)
        grad_x_new = tl.load(grad_x_new_ptr + offs_grad_x_new, mask=mask, other=0.0)
        branch = tl.load(branch_ptr + offs_branch, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        normed, dx, grad = _modulated_vjp(
            *(x_new.to(tl.float32), grad, factor, bias, b, rows, L, offs_c, mask, mask_c, eps, token_scale_ptr),
            *(stride_token_scale_b, stride_token_scale_l, token_dscale_ptr, token_dshift_ptr, C, RMS),
        )
        dscale += tl.sum(grad * normed, axis=0)
        dshift += tl.sum(grad, axis=0)
        dx += grad_x_new.to(tl.float32)
        of_gate = branch.to(tl.float32) * dx
        if token_gate_ptr is None:
            dgate += tl.sum(of_gate, axis=0)
        offs_out = (b * L + rows) * C + offs_c[None, :]  # [BLOCK_L, BLOCK_C]
        if token_gate_ptr is None:
            dbranch = gate * dx
        else:
            tl.store(token_dgate_ptr + offs_out, of_gate.to(token_dgate_ptr.dtype.element_ty), mask=mask)
            dbranch = dx * load_tokens(token_gate_ptr, b, stride_token_gate_b, rows, stride_token_gate_l, offs_c, mask)
        tl.store(dx_ptr + offs_out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dbranch_ptr + offs_out, dbranch.to(dbranch_ptr.dtype.element_ty), mask=mask)

    partials = partials_ptr + pid * 3 * C + offs_c  # [BLOCK_C]
    tl.store(partials, dscale, mask=mask_c)
    tl.store(partials + C, dshift, mask=mask_c)
    tl.store(partials + 2 * C, dgate, mask=mask_c)


@triton.jit(do_not_specialize=["slabs"])
def _adaln_sums_kernel(
    partials_ptr,
    dscale_ptr,
    dshift_ptr,
    dgate_ptr,
    slabs,
    C: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One of a sample's SUMS vectors, BLOCK_C channels of it: partials added over slabs, in order."""
    blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // (SUMS * blocks)).to(tl.int64)
    which = tl.program_id(0) // blocks % SUMS
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, slabs, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        offs = ((b * slabs + offs_s) * SUMS + which)[:, None] * C + offs_c[None, :]  # [BLOCK_S, BLOCK_C]
        partials = tl.load(partials_ptr + offs, mask=(offs_s < slabs)[:, None] & mask_c[None, :], other=0.0)
        total += tl.sum(partials, axis=0)
    total = total.to(dscale_ptr.dtype.element_ty)
    if which == 0:
        tl.store(dscale_ptr + b * C + offs_c, total, mask=mask_c)
    elif which == 1:
        tl.store(dshift_ptr + b * C + offs_c, total, mask=mask_c)
    else:
        tl.store(dgate_ptr + b * C + offs_c, total, mask=mask_c)


@cache
def backward_candidates(block_c: int, itemsize: int, gated: bool, per_token: bool = False) -> tuple[Tile, ...]:
    """Fewer rows in registers than forward, as more is alive; the next ones are on their way to shared memory.

    The gated kernel reads four tensors, not two: with two rows of them, fewer warps than `slab_length` counts on, and
    in the widest of them Triton 3.6 spills. The other spills 8 bytes with one row in three stages (C=1920, sm_90) or in
    four (C=1024, sm_100). Modulation per token is read and written, too.
    """
    tensors = (4 if gated else 2) + (0 if not per_token else 2 if gated else 1)
    row_bytes = tensors * rows_together(block_c) * block_c * itemsize
    if per_token:
        rows_stages: tuple[tuple[int, int], ...] = ((1, 2), (1, 1))
    elif gated:
        rows_stages = ((1, 4), (1, 3), (2, 2), (1, 2), (1, 1))
    else:
        rows_stages = ((2, 3), (2, 2), (1, 2), (1, 1))
    fitting = [
        (rows, stages)
        for rows, stages in rows_stages
        if rows * (stages - 1) * row_bytes <= STAGED_BYTES and (not gated or rows * block_c <= WIDEST)
    ]
    return tuple(tile_of(block_c, rows, STAGES=stages) for rows, stages in fitting[:3])


SUMS_CANDIDATES = (Tile({"BLOCK_S": 32, "BLOCK_C": 128}), Tile({"BLOCK_S": 16, "BLOCK_C": 256}))


@cache
def slab_length(B: int, L: int, C: int) -> int:
    """Tokens that one program of the backward walks.

    All programs take about as long, so what counts is how many rounds of them the GPU makes, times the length
    of one; the fewest slabs of the best are taken, as each writes float32 sums.
    """
    at_work = WARPS_AT_WORK // warps(triton.next_power_of_2(C))

    def cost(slabs: int) -> int:
        return triton.cdiv(B * slabs, at_work) * (triton.cdiv(L, slabs) + SLAB_COST)

    slabs = min(range(1, triton.cdiv(L, SHORTEST) + 1), key=cost, default=1)
    return max(triton.cdiv(L, slabs), 1)


def adaln_backward(grads: Sequence[Tensor], call: AdaLN) -> tuple[Tensor, ...]:
    x, grad_out = last_dim_contiguous(call.x), last_dim_contiguous(grads[0])
    given = modulation(call, backward=True)
    dx = empty_contiguous(x)
    B, L, C = x.shape
    slab = slab_length(B, L, C)
    partials = x.new_empty((B, triton.cdiv(L, slab), 2, C), dtype=torch.float32)
    candidates = backward_candidates(triton.next_power_of_2(C), x.itemsize, False, given.per_token)
    tile = chosen_tile("adaln_bwd", x, candidates, given.per_token)
    _adaln_bwd_kernel[(B * partials.shape[1],)](
        grad_out,
        x,
        given.scale,
        dx,
        partials,
        *grad_out.stride()[:2],
        *x.stride()[:2],
        given.strides()[1],
        L,
        slab,
        call.eps,
        C,
        **tile.arguments(),
        **given.named,
    )
    return dx, *_of_modulation(partials, call, given)


def gated_adaln_backward(grads: Sequence[Tensor], call: GatedAdaLN) -> tuple[Tensor, ...]:
    grad_x_new, grad_out = map(last_dim_contiguous, grads)
    x_new, branch = last_dim_contiguous(call.x), last_dim_contiguous(call.branch)
    given = modulation(call, backward=True)
    dx, dbranch = empty_contiguous(x_new), empty_contiguous(branch)
    B, L, C = x_new.shape
    slab = slab_length(B, L, C)
    partials = x_new.new_empty((B, triton.cdiv(L, slab), 3, C), dtype=torch.float32)
    candidates = backward_candidates(triton.next_power_of_2(C), x_new.itemsize, True, given.per_token)
    tile = chosen_tile("gated_adaln_bwd", x_new, candidates, given.per_token)
    _gated_adaln_bwd_kernel[(B * partials.shape[1],)](
        grad_x_new,
        grad_out,
        x_new,
        branch,
        given.gate,
        given.scale,
        dx,
        dbranch,
        partials,
        *grad_x_new.stride()[:2],
        *grad_out.stride()[:2],
        *x_new.stride()[:2],
        *branch.stride()[:2],
        *given.strides()[:2],
        L,
        slab,
        call.eps,
        C,
        **tile.arguments(),
        **given.named,
    )
    return dx, dbranch, *_of_modulation(partials, call, given)


def _of_modulation(partials: Tensor, call: AdaLN | GatedAdaLN, given: Modulation) -> list[Tensor]:
    """Stage 2, and gradients of gate, scale, shift, weight and bias."""
    B, _, sums, C = partials.shape
    vectors = [partials.new_empty((B, C), dtype=torch.float32 if given.named else call.x.dtype) for _ in range(3)]
    dgate, dscale, dshift = vectors
    _add_slabs(partials, dscale, dshift, dgate)
    if not given.named:
        return vectors[3 - sums :]
    return gradients(call, vectors, [given.named.get(f"token_d{name}_ptr") for name in ("gate", "scale", "shift")])


def _add_slabs(partials: Tensor, dscale: Tensor, dshift: Tensor, dgate: Tensor) -> None:
    """Stage 2. With two sums dgate is not written."""
    B, slabs, sums, C = partials.shape
    tile = tiling.chosen("adaln_sums", f"sums{sums}", SUMS_CANDIDATES, partials.device)
    _adaln_sums_kernel[(B * sums * triton.cdiv(C, tile.sizes["BLOCK_C"]),)](
        partials, dscale, dshift, dgate, slabs, C, sums, **tile.arguments()
    )
