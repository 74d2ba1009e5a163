"""Arithmetic that a GPU's fast instructions do not have as exactly as float32 inputs need it.

EXACT: whether it is needed. The rounding of 16-bit numbers hides what the fast instructions miss.
"""

import triton
import triton.language as tl

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


INTERPRETED = tl.constexpr(not isinstance(_scaled_exp, triton.JITFunction))


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


@triton.jit
def widen(v):
    """A tile in float32. bfloat16 takes one instruction a number; the compiler's own conversion takes two for every
    other one (Triton 3.7)."""
    if v.dtype == tl.bfloat16 and not INTERPRETED:
        wide = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=r,=r,r", [v], tl.float32, is_pure=True, pack=2
        )
    else:
        wide = v.to(tl.float32)
    return wide


@triton.jit
def reciprocal(v):
    """1 / v to an ulp, 0 above 2¹²⁶: without the instructions by which a quotient stays right there."""
    if INTERPRETED:
        inverse = 1.0 / v
    else:
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1)
    return inverse


@triton.jit
def tanh(v):
    """tanh(v) to 2⁻¹¹ of itself, in one instruction."""
    if INTERPRETED:
        value = 1.0 - 2.0 / (1.0 + tl.exp2(v * (2.0 * LOG2_E)))
    else:
        value = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1)
    return value


@triton.jit
def bfloat16_parts(v):
    """(high, low) of float32 v for matmuls in bfloat16: v rounded to 8 bits, and the rest rounded to 8.

    The interpreter, which does not multiply bfloat16, gets the same numbers in float32. Rounded as integers, since the
    compiler converts one number at a time where it needs the result in float32, too (a slow instruction). NaN is lost
    from high, but not from low.
    """
    high = ((v.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return as_bfloat16(high), as_bfloat16(v - high)


@triton.jit
def as_bfloat16(v):
    """float32 v rounded to bfloat16 as an operand of a matmul: in the interpreter the same number in float32."""
    if INTERPRETED:
        bits = v.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        rounded = tl.where(tl.abs(v) < 3.4e38, even.to(tl.float32, bitcast=True), v)
    else:
        rounded = v.to(tl.bfloat16)
    return rounded


@triton.jit
def prefetch(ptrs):
    """Start to read the cache lines of ptrs into L2."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], tl.int32, is_pure=False, pack=1
        )


# A kernel's key in Triton's cache has a called function's constants only if that was visited before (Triton 3.6, 3.7).
# These are called from several ops: visited now, they leave each kernel one key, whichever op comes first.
_SHARED = (exp, exp2, divide, widen, reciprocal, tanh, prefetch, as_bfloat16, bfloat16_parts)
for _function in () if INTERPRETED.value else _SHARED:
    _function.cache_key  # noqa: B018
