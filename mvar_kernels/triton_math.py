"""Arithmetic that a GPU's fast instructions do not have as exactly as float32 inputs need it.

EXACT: whether it is needed. The rounding of 16-bit numbers hides what the fast instructions miss.
"""

import triton
import triton.language as tl

from mvar_kernels.dispatch import interpreted

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
ROUNDER = tl.constexpr(1.5 * 2**23)  # in a sum: rounds the other number to an integer, which is in its last bits


@triton.jit
def _scaled_exp(r, rounded):
    """2ⁿ exp(r) to 1.1 ulp for |r| ≤ 0.35 and n = rounded − ROUNDER from −127, which gives 0, to 128, which gives ∞."""
    series = 1.0 / 720.0 + r * (1.0 / 5040.0)
    series = 1.0 / 120.0 + r * series
    series = 1.0 / 24.0 + r * series
    series = 1.0 / 6.0 + r * series
    series = 0.5 + r * series
    power = (rounded.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return power.to(tl.float32, bitcast=True) * (1.0 + (r + r * r * series))


@triton.jit
def _clamped(v, low, high):
    """NaN stays."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp(v, EXACT: tl.constexpr = True):
    """exp(v); EXACT to 1.1 ulp, 0 below −87.7 and ∞ above 88.3.

    The fast one is exp2(v·log₂e): the product's rounding alone costs |v|·2⁻²⁴, exp2 2⁻²². Here v = n·ln 2 + r with
    ln 2 in two parts, the first of 9 bits, and a polynomial of degree 7 in r, good to 2⁻²⁷. tl.exp would be the fast
    one with three instructions more, for results below 2⁻¹²⁶.
    """
    if EXACT:
        v = _clamped(v, -88.0, 89.0)
        rounded = v * LOG2_E + ROUNDER
        n = rounded - ROUNDER
        result = _scaled_exp((v - n * 0.693359375) + n * 2.12194440054690583e-4, rounded)
    else:
        result = tl.exp2(v * LOG2_E)
    return result


@triton.jit
def exp2(v, EXACT: tl.constexpr):
    """2ᵛ; EXACT to 1.1 ulp, 0 below −126.5 and ∞ above 127.5."""
    if EXACT:
        v = _clamped(v, -127.0, 128.0)
        rounded = v + ROUNDER
        result = _scaled_exp((v - (rounded - ROUNDER)) * LN_2, rounded)
    else:
        result = tl.exp2(v)
    return result


@triton.jit
def divide(x, y, EXACT: tl.constexpr):
    """x / y; EXACT rounded once, else good to 2 ulp."""
    if EXACT:
        quotient = tl.div_rn(x, y)
    else:
        quotient = x / y
    return quotient


# A kernel's key in Triton's cache has a called function's constants only if that was visited before (Triton 3.6, 3.7).
# These are called from several ops: visited now, they leave each kernel one key, whichever op comes first.
for _function in () if interpreted() else (exp, exp2, divide):
    _function.cache_key  # noqa: B018
