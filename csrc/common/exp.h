// Exponentials of a vector of floats, within 2 units in the last place (1.5 without fma instructions, else
// 1.3). Where exp2's argument is below -126, or exp's below -87, the result is 0: none is denormal. NaN
// stays NaN.
#pragma once

#include "common/simd.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

// Added to a float of moderate size it leaves no bits for a fraction, and the integer that the
// sum was rounded to is in its lowest bits.
constexpr float kRoundToWhole = 12582912.0f;  // 1.5·2²³

// 2^(whole + f) for |f| ≤ ½, where `rounded` is whole + kRoundToWhole; 0 in lanes of `x` below `least`. kNegative: no x
// is above 0.
template <bool kNegative>
MVAR_INLINE Vec exp2_of_parts(Vec x, float least, Vec rounded, Vec f) {
  // 2^f = 1 + f·(…), fitted to ½ a unit in the last place with room to spare (2e-9)
  Vec p = splat(1.5353362e-4f);
  p = fma(p, f, splat(1.3398875e-3f));
  p = fma(p, f, splat(9.618437e-3f));
  p = fma(p, f, splat(5.5503324e-2f));
  p = fma(p, f, splat(2.4022648e-1f));
  p = fma(p, f, splat(6.9314718e-1f));
  p = fma(p, f, splat(1.0f));
#if defined(__AVX512F__)
  const __mmask16 not_below = _mm512_cmp_ps_mask(x, splat(least), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(not_below, p, rounded - kRoundToWhole);
#else
  const Vec scaled = (Vec)((VecBits)p + ((VecBits)rounded << 23));
  Vec number = x < least ? splat(0.0f) : scaled;
  if constexpr (!kNegative) {
    const Vec top = rounded - kRoundToWhole;
    // 2^128 is no float, but p·2^128 may be one.
    const Vec large = top > 128.0f ? splat(__builtin_inff()) : p * 0x1p127f * 2.0f;
    number = top > 127.0f ? large : number;
  }
  return x == x ? number : x;
#endif
}

MVAR_INLINE Vec exp2(Vec x) {
  const Vec rounded = x + kRoundToWhole;
  return exp2_of_parts<false>(x, -126.0f, rounded, x - (rounded - kRoundToWhole));
}

template <bool kNegative = false>
MVAR_INLINE Vec exp(Vec x) {
  const float log2_e = 1.4426950408889634f;
  // log 2 in two parts, the first with so few bits that its product with an integer is exact
  const float log_2_high = 0.693359375f, log_2_low = -2.12194440e-4f;
  const Vec rounded = fma(x, splat(log2_e), splat(kRoundToWhole));
  const Vec whole = rounded - kRoundToWhole;
  const Vec rest = fma(-whole, splat(log_2_low), fma(-whole, splat(log_2_high), x));
  return exp2_of_parts<kNegative>(x, -87.0f, rounded, rest * log2_e);
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
