"""Forward of adaln and gated_adaln: a program is BLOCK_L whole rows of one sample; see the package."""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels.ffi import empty_contiguous, last_dim_contiguous
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.ops.adaln.triton.common import centre, chosen_tile, load_tokens, load_vector, modulation, tile_of
from mvar_kernels.tiling import Tile


@triton.jit
def _modulate_tokens(
    out,
    b,
    rows,
    offs_c,
    mask,
    scale_ptr,
    shift_ptr,
    stride_scale_b,
    stride_scale_l,
    stride_shift_b,
    stride_shift_l,
):
    """out·(1+scale) + shift with those of rows [BLOCK_L, 1] of sample `b`, where there are any."""
    if scale_ptr is not None:
        scale = load_tokens(scale_ptr, b, stride_scale_b, rows, stride_scale_l, offs_c, mask)
        out = out * (1.0 + scale) + load_tokens(shift_ptr, b, stride_shift_b, rows, stride_shift_l, offs_c, mask)
    return out


@triton.jit(do_not_specialize=["L"])
def _adaln_fwd_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    stride_xb,
    stride_xl,
    stride_scale,
    stride_shift,
    L,
    eps,
    C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    token_scale_ptr=None,
    token_shift_ptr=None,
    stride_token_scale_b=None,
    stride_token_scale_l=None,
    stride_token_shift_b=None,
    stride_token_shift_l=None,
    PLUS: tl.constexpr = 1.0,
    RMS: tl.constexpr = False,
):
    tiles = tl.cdiv(L, BLOCK_L)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    offs_l = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_l < L)[:, None] & mask_c[None, :]  # [BLOCK_L, BLOCK_C]

    x = tl.load(x_ptr + b * stride_xb + offs_l[:, None] * stride_xl + offs_c[None, :], mask=mask, other=0.0)
    scale = load_vector(scale_ptr, b, stride_scale, offs_c, mask_c)
    shift = load_vector(shift_ptr, b, stride_shift, offs_c, mask_c)

    centred, rstd = centre(x.to(tl.float32), mask_c, C, eps, RMS)
    out = _modulate_tokens(
        *(centred * rstd * (PLUS + scale) + shift, b, offs_l[:, None], offs_c, mask, token_scale_ptr, token_shift_ptr),
        *(stride_token_scale_b, stride_token_scale_l, stride_token_shift_b, stride_token_shift_l),
    )
    offs_out = (b * L + offs_l)[:, None] * C + offs_c[None, :]  # [BLOCK_L, BLOCK_C]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L"])
def _gated_adaln_fwd_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    x_new_ptr,
    out_ptr,
    stride_xb,
    stride_xl,
    stride_branch_b,
    stride_branch_l,
    stride_gate,
    stride_scale,
    stride_shift,
    L,
    eps,
    C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    token_scale_ptr=None,
    token_shift_ptr=None,
    stride_token_scale_b=None,
    stride_token_scale_l=None,
    stride_token_shift_b=None,
    stride_token_shift_l=None,
    token_gate_ptr=None,
    stride_token_gate_b=None,
    stride_token_gate_l=None,
    PLUS: tl.constexpr = 1.0,
    RMS: tl.constexpr = False,
):
    tiles = tl.cdiv(L, BLOCK_L)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    offs_l = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_l < L)[:, None] & mask_c[None, :]  # [BLOCK_L, BLOCK_C]

    offs_branch = b * stride_branch_b + offs_l[:, None] * stride_branch_l + offs_c[None, :]
    x = tl.load(x_ptr + b * stride_xb + offs_l[:, None] * stride_xl + offs_c[None, :], mask=mask, other=0.0)
    branch = tl.load(branch_ptr + offs_branch, mask=mask, other=0.0)
    if token_gate_ptr is None:
        gate = load_vector(gate_ptr, b, stride_gate, offs_c, mask_c)
    else:
        gate = load_tokens(token_gate_ptr, b, stride_token_gate_b, offs_l[:, None], stride_token_gate_l, offs_c, mask)
    scale = load_vector(scale_ptr, b, stride_scale, offs_c, mask_c)
    shift = load_vector(shift_ptr, b, stride_shift, offs_c, mask_c)

    # Rounded before it is normalized: out is adaln of the very x' that is stored.
    x_new = (x.to(tl.float32) + gate * branch.to(tl.float32)).to(x_new_ptr.dtype.element_ty)
    offs_out = (b * L + offs_l)[:, None] * C + offs_c[None, :]  # [BLOCK_L, BLOCK_C]
    tl.store(x_new_ptr + offs_out, x_new, mask=mask)

    centred, rstd = centre(x_new.to(tl.float32), mask_c, C, eps, RMS)
    out = _modulate_tokens(
        *(centred * rstd * (PLUS + scale) + shift, b, offs_l[:, None], offs_c, mask, token_scale_ptr, token_shift_ptr),
        *(stride_token_scale_b, stride_token_scale_l, stride_token_shift_b, stride_token_shift_l),
    )
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)


@cache
def forward_candidates(block_c: int) -> tuple[Tile, ...]:
    return tuple(tile_of(block_c, rows) for rows in (4, 2, 1) if rows * block_c <= 4 * 4096)


def adaln(call: AdaLN) -> tuple[Tensor]:
    x = last_dim_contiguous(call.x)
    _, scale, shift, named = given = modulation(call)
    out = empty_contiguous(x)
    B, L, C = x.shape
    tile = chosen_tile("adaln_fwd", x, forward_candidates(triton.next_power_of_2(C)), given.per_token)
    _adaln_fwd_kernel[(B * triton.cdiv(L, tile.sizes["BLOCK_L"]),)](
        x,
        scale,
        shift,
        out,
        *x.stride()[:2],
        *given.strides()[1:],
        L,
        call.eps,
        C,
        **tile.arguments(),
        **named,
    )
    return (out,)


def gated_adaln(call: GatedAdaLN) -> tuple[Tensor, Tensor]:
    x, branch = last_dim_contiguous(call.x), last_dim_contiguous(call.branch)
    gate, scale, shift, named = given = modulation(call)
    x_new, out = empty_contiguous(x), empty_contiguous(branch)
    B, L, C = x.shape
    tile = chosen_tile("gated_adaln_fwd", x, forward_candidates(triton.next_power_of_2(C)), given.per_token)
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
        *given.strides(),
        L,
        call.eps,
        C,
        **tile.arguments(),
        **named,
    )
    return x_new, out
