"""What forward and backward of adaln share: rows of C channels held in registers, and their tiles."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.ffi import empty_contiguous
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.ops.adaln.options import options
from mvar_kernels.tiling import Tile

WIDEST = 4096  # channels that 16 warps hold in registers, forward and backward, on every architecture


@triton.jit
def load_vector(ptr, b, stride_b, offs_c, mask_c):
    """A modulation vector of sample `b` in float32, as a row [1, BLOCK_C]; 0 where there is none."""
    if ptr is None:
        vector = 0.0
    else:
        vector = tl.load(ptr + b * stride_b + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    return vector


@triton.jit
def load_tokens(ptr, b, stride_b, rows, stride_l, offs_c, mask):
    """Modulation of rows [BLOCK_L, 1] of sample `b` in float32; 0 where there is none."""
    if ptr is None:
        values = 0.0
    else:
        offs = b * stride_b + rows * stride_l + offs_c[None, :]  # [BLOCK_L, BLOCK_C]
        values = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def centre(x, mask_c, C: tl.constexpr, eps, RMS: tl.constexpr):
    """(x − mean, 1/σ) of each row; beyond the last channel x − mean is some number. RMS: with a mean of 0.

    The mean is subtracted before squares are taken: E[x²] − mean² cancels where the mean is far from zero. It is
    rounded: what it missed, `rest`, is the mean of x − mean, no part of the variance, and all that a constant row has;
    1/√eps would make 1 of it in a row of 12345.678. Divisions, and not products with 1/C, which would be one operation
    with the difference: so x − mean are multiples of x's last bit, and of a constant row nothing is left.
    """
    if RMS:
        centred = x
        squares = tl.sum(x * x, axis=1)[:, None]  # [BLOCK_L, 1]
    else:
        channels = tl.full((1, 1), C, tl.float32)
        mean = tl.div_rn(tl.sum(x, axis=1)[:, None], channels)  # [BLOCK_L, 1]
        centred = tl.where(mask_c[None, :], x - mean, 0.0)  # [BLOCK_L, BLOCK_C]
        total = tl.sum(centred, axis=1)[:, None]
        rest = tl.div_rn(total, channels)
        squares = tl.sum(centred * centred, axis=1)[:, None] - total * rest
        centred = centred - rest
    return centred, tl.rsqrt(tl.maximum(squares, 0.0) * (1.0 / C) + eps)


@triton.jit
def normalized_vjp(x, grad, factor, mask_c, C: tl.constexpr, eps, RMS: tl.constexpr):
    """(n = norm(x), gradient at x) of BLOCK_L rows, for the gradient at n·factor.

    mean(w·n) is r·mean(w·centred), so the sums over channels come in two rounds, not three.
    """
    w = grad * factor  # [BLOCK_L, BLOCK_C]
    if RMS:
        mean_w = 0.0
    else:
        mean_w = tl.sum(w, axis=1)[:, None] * (1.0 / C)  # [BLOCK_L, 1]
    centred, rstd = centre(x, mask_c, C, eps, RMS)
    mean_wn = tl.sum(w * centred, axis=1)[:, None] * (1.0 / C) * rstd
    normed = centred * rstd
    return normed, rstd * (w - mean_w - normed * mean_wn)


def warps(block_c: int) -> int:
    return min(max(block_c // 256, 4), 16)


def rows_together(block_c: int) -> int:
    """Rows that share a program's warps, where one row is too narrow for them."""
    return min(max(256 * warps(block_c) // block_c, 1), 8)


def tile_of(block_c: int, rows: int, **stages: int) -> Tile:
    """`rows`: vectors of 16 bytes (of 16-bit numbers) that a thread holds of each tensor."""
    sizes = {"BLOCK_L": rows * rows_together(block_c), "BLOCK_C": block_c} | stages
    return Tile(sizes, warps(block_c), stages.get("STAGES", 1))


def chosen_tile(kernel: str, x: Tensor, candidates: tuple[Tile, ...], per_token: bool) -> Tile:
    dtype = str(x.dtype).removeprefix("torch.")
    shape_class = f"C{candidates[0].sizes['BLOCK_C']} {dtype}{' per token' * per_token}"
    return tiling.chosen(kernel, shape_class, candidates, x.device)


class Modulation(NamedTuple):
    """Arguments of a launch: vectors (B, C), or None; and those that only a call with options has."""

    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    named: dict[str, Any]

    @property
    def per_token(self) -> bool:
        return "token_scale_ptr" in self.named or "token_gate_ptr" in self.named

    def strides(self) -> tuple[int | None, ...]:
        return tuple([None if t is None else t.stride(0) for t in self[:3]])


def modulation(call: AdaLN | GatedAdaLN, *, backward: bool = False) -> Modulation:
    """What the kernels read of it, and what those of a backward write of its gradients."""
    plain = call.plain()
    if plain is not None:
        return Modulation(plain[2] if len(plain) == 5 else None, *plain[-2:], {})
    given = options(call)
    named: dict[str, Any] = {"PLUS": given.plus, "RMS": given.rms}
    for name in ("token_gate", "token_scale", "token_shift"):
        t = getattr(given, name)
        if t is not None and backward:
            named[name.replace("_", "_d") + "_ptr"] = empty_contiguous(t)
        if t is not None and not (backward and name == "token_shift"):
            named |= {f"{name}_ptr": t, f"stride_{name}_b": t.stride(0), f"stride_{name}_l": t.stride(1)}
    if backward and given.token_scale is not None:
        named["bias_ptr"] = given.offset
    return Modulation(given.gate, given.factor, given.offset, named)
