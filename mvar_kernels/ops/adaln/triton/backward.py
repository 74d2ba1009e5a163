"""Backward kernels of adaln and gated_adaln: slabs of tokens, then the sum of slabs; see the package for the maths."""

import triton
import triton.language as tl

from mvar_kernels.ops.adaln.triton.common import load_vector, normalised_vjp


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
):
    pid = tl.program_id(0).to(tl.int64)
    slabs = tl.cdiv(L, slab)
    b = pid // slabs
    first = (tl.program_id(0) % slabs) * slab
    last = tl.minimum(first + slab, L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    one_plus_scale = 1.0 + load_vector(scale_ptr, b, stride_scale, offs_c, mask_c)

    dscale = tl.zeros([BLOCK_C], dtype=tl.float32)
    dshift = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_L, num_stages=STAGES):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask = (offs_l < last)[:, None] & mask_c[None, :]  # [BLOCK_L, BLOCK_C]
        rows = offs_l.to(tl.int64)[:, None]  # [BLOCK_L, 1]
        grad = tl.load(grad_ptr + b * stride_grad_b + rows * stride_grad_l + offs_c[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + b * stride_xb + rows * stride_xl + offs_c[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        normed, dx = normalised_vjp(x.to(tl.float32), grad, one_plus_scale, mask_c, C, eps)
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
):
    pid = tl.program_id(0).to(tl.int64)
    slabs = tl.cdiv(L, slab)
    b = pid // slabs
    first = (tl.program_id(0) % slabs) * slab
    last = tl.minimum(first + slab, L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    one_plus_scale = 1.0 + load_vector(scale_ptr, b, stride_scale, offs_c, mask_c)
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
        normed, dx = normalised_vjp(x_new.to(tl.float32), grad, one_plus_scale, mask_c, C, eps)
        dscale += tl.sum(grad * normed, axis=0)
        dshift += tl.sum(grad, axis=0)
        dx += grad_x_new.to(tl.float32)
        dgate += tl.sum(branch.to(tl.float32) * dx, axis=0)
        offs_out = (b * L + rows) * C + offs_c[None, :]  # [BLOCK_L, BLOCK_C]
        tl.store(dx_ptr + offs_out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dbranch_ptr + offs_out, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=mask)

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
