"""Functions that Triton kernels of several ops need more exactly than hardware has them."""

import triton
import triton.language as tl


@triton.jit
def exp(v):
    """exp of finite v < 88 to 1 ulp, for the few factors that reach whole rows of a float32 output.

    Hardware computes exp2(v·log₂e), and the product's rounding alone costs |v|·2⁻²⁴. Here v = n·ln 2 + r with
    ln 2 in two parts, the first of 9 bits, and a polynomial of degree 7 in |r| ≤ 0.35, good to 2⁻²⁷.
    """
    n = tl.floor(v * 1.4426950408889634 + 0.5)
    r = (v - n * 0.693359375) + n * 2.12194440054690583e-4
    series = 1.0 / 720.0 + r * (1.0 / 5040.0)
    series = 1.0 / 120.0 + r * series
    series = 1.0 / 24.0 + r * series
    series = 1.0 / 6.0 + r * series
    series = 0.5 + r * series
    return tl.exp2(n) * (1.0 + (r + r * r * series))
