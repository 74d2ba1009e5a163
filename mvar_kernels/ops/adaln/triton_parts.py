"""What the forward and the backward kernels of adaln share: rows of C channels held in registers."""

import triton
import triton.language as tl


@triton.jit
def load_vector(ptr, b, stride_b, offs_c, mask_c):
    """A modulation vector of sample `b` in float32, as a row."""
    vector = tl.load(ptr + b * stride_b + offs_c, mask=mask_c, other=0.0)
    return vector.to(tl.float32)[None, :]  # [1, BLOCK_C]


@triton.jit
def centre(x, mask_c, C: tl.constexpr, eps):
    """(x − mean, 1/σ) of each row.

    The mean is subtracted before squares are taken: E[x²] − mean² cancels where the mean is far from zero.
    """
    mean = tl.sum(x, axis=1)[:, None] * (1.0 / C)  # [BLOCK_L, 1]
    centred = tl.where(mask_c[None, :], x - mean, 0.0)  # [BLOCK_L, BLOCK_C]
    variance = tl.sum(centred * centred, axis=1)[:, None] * (1.0 / C)
    return centred, tl.rsqrt(variance + eps)


@triton.jit
def normalised_vjp(x, grad, one_plus_scale, mask_c, C: tl.constexpr, eps):
    """(n = LN(x), gradient at x) of BLOCK_L rows, for the gradient at n·(1+scale)+shift.

    mean(w·n) is r·mean(w·centred), so the sums over channels come in two rounds, not three.
    """
    w = grad * one_plus_scale  # [BLOCK_L, BLOCK_C]
    mean_w = tl.sum(w, axis=1)[:, None] * (1.0 / C)  # [BLOCK_L, 1]
    centred, rstd = centre(x, mask_c, C, eps)
    mean_wn = tl.sum(w * centred, axis=1)[:, None] * (1.0 / C) * rstd
    normed = centred * rstd
    return normed, rstd * (w - mean_w - normed * mean_wn)
