"""What forward and backward of adaln share: rows of C channels held in registers, and their tiles."""

import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels import tiling
from mvar_kernels.tiling import Tile

WIDEST = 4096  # channels that 16 warps hold in registers, forward and backward, on every architecture


@triton.jit
def load_vector(ptr, b, stride_b, offs_c, mask_c):
    """A modulation vector of sample `b` in float32, as a row."""
    vector = tl.load(ptr + b * stride_b + offs_c, mask=mask_c, other=0.0)
    return vector.to(tl.float32)[None, :]  # [1, BLOCK_C]


@triton.jit
def centre(x, mask_c, C: tl.constexpr, eps):
    """(x − mean, 1/σ) of each row; beyond the last channel x − mean is some number.

    The mean is subtracted before squares are taken: E[x²] − mean² cancels where the mean is far from zero. It is
    rounded: what it missed, `rest`, is the mean of x − mean, no part of the variance, and all that a constant row has;
    1/√eps would make 1 of it in a row of 12345.678. Divisions, and not products with 1/C, which would be one operation
    with the difference: so x − mean are multiples of x's last bit, and of a constant row nothing is left.
    """
    channels = tl.full((1, 1), C, tl.float32)
    mean = tl.div_rn(tl.sum(x, axis=1)[:, None], channels)  # [BLOCK_L, 1]
    centred = tl.where(mask_c[None, :], x - mean, 0.0)  # [BLOCK_L, BLOCK_C]
    total = tl.sum(centred, axis=1)[:, None]
    rest = tl.div_rn(total, channels)
    squares = tl.sum(centred * centred, axis=1)[:, None] - total * rest
    return centred - rest, tl.rsqrt(tl.maximum(squares, 0.0) * (1.0 / C) + eps)


@triton.jit
def normalized_vjp(x, grad, one_plus_scale, mask_c, C: tl.constexpr, eps):
    """(n = LN(x), gradient at x) of BLOCK_L rows, for the gradient at n·(1+scale)+shift.

    mean(w·n) is r·mean(w·centred), so the sums over channels come in two rounds, not three.
    """
    w = grad * one_plus_scale  # [BLOCK_L, BLOCK_C]
    mean_w = tl.sum(w, axis=1)[:, None] * (1.0 / C)  # [BLOCK_L, 1]
    centred, rstd = centre(x, mask_c, C, eps)
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


def chosen_tile(kernel: str, x: Tensor, candidates: tuple[Tile, ...]) -> Tile:
    dtype = str(x.dtype).removeprefix("torch.")
    return tiling.chosen(kernel, f"C{candidates[0].sizes['BLOCK_C']} {dtype}", candidates, x.device)
