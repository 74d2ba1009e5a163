// The same bits as mvar_kernels/ops/sample_tokens/noise.py, which explains them: every operation here is
// one of its operations, in its order, rounded on its own. -ffp-contract=off keeps it so.
#pragma once

#include "lanes.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

constexpr float kLn2High = 0.693145751953125f;
constexpr float kLn2Low = (float)(0.69314718055994530942 - 0.693145751953125);
constexpr float kLog2E = (float)1.44269504088896340736;

// Natural logarithm of normal positive values.
MVAR_INLINE Vec log(Vec x) {
  const VecInt bits = (VecInt)x;
  const VecInt e = (bits - 0x3f3504f3) >> 23;
  const Vec m = (Vec)(bits - (e << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f);
  const Vec z = s * s;
  const Vec series =
      z * (z * (z * (z * (float)(2.0 / 9) + (float)(2.0 / 7)) + (float)(2.0 / 5)) + (float)(2.0 / 3));
  const Vec whole = to_float(e);
  return whole * kLn2High + ((s * series + whole * kLn2Low) + 2.0f * s);
}

// exp of values ≤ 0; 0 below −87 and for NaN.
MVAR_INLINE Vec exp_negative(Vec x) {
  const VecInt in_range = x >= -87.0f;
  const Vec clamped = in_range ? x : splat(-87.0f);
  const Vec shifted = clamped * kLog2E + 0.5f;
  const VecInt truncated = to_int(shifted);
  const VecInt n = truncated + (to_float(truncated) > shifted);  // rounded down: true is −1
  const Vec whole = to_float(n);
  const Vec r = (clamped - whole * kLn2High) - whole * kLn2Low;
  Vec p = splat(1.0f);
#pragma GCC unroll 7
  for (int k = 7; k > 0; --k) p = p * (r / (float)k) + 1.0f;
  const Vec power = (Vec)((n + 127) << 23);
  return in_range ? p * power : Vec{};
}

// Philox-4x32-10 at one position of one image.
struct Philox {
  uint64_t seed;
  uint32_t position, scale_index, image;

  // Four words for each counter: as counters, in the lower halves of the lanes, the upper undefined.
  MVAR_INLINE void operator()(VecWide counter, VecWide words[4]) const {
    const VecWide first = splat_wide(0xd2511f53), second = splat_wide(0xcd9e8d57);
    VecWide c0 = counter, c1 = splat_wide(position), c2 = splat_wide(scale_index), c3 = splat_wide(image);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const VecWide p0 = multiply_low(c0, first), p1 = multiply_low(c2, second);
      c0 = (p1 >> 32) ^ c1 ^ splat_wide(k0);
      c2 = (p0 >> 32) ^ c3 ^ splat_wide(k1);
      c1 = p1;
      c3 = p0;
      k0 += 0x9e3779b9;
      k1 += 0xbb67ae85;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
  }

  // Four words for each of as many groups of four codes as a vector has lanes.
  MVAR_INLINE void operator()(VecInt group, VecBits words[4]) const {
    VecWide even[4], odd[4];
    (*this)((VecWide)group, even);
    (*this)((VecWide)group >> 32, odd);
    for (int i = 0; i < 4; ++i) words[i] = (VecBits)((even[i] & kLow32) | odd[i] << 32);
  }

  // The word of each code.
  MVAR_INLINE VecBits of_codes(VecInt code) const {
    VecBits words[4];
    (*this)(code >> 2, words);
    const VecInt odd = (code & 1) != 0, upper = (code & 2) != 0;
    return upper ? (odd ? words[3] : words[2]) : (odd ? words[1] : words[0]);
  }
};

// Standard Gumbel noise from uniform words.
MVAR_INLINE Vec gumbel(VecBits word) {
  const Vec u = unsigned_to_float(word) * 0x1p-32f + 0x1p-33f;
  const Vec kept = 1.0f - u;
  const Vec lost = u - (1.0f - kept);
  const Vec clamped = kept > 0x1p-24f ? kept : splat(0x1p-24f);
  const Vec exponential = kept > 0.0f ? -log(clamped) + lost : splat((float)(0.69314718055994530942 * 25));
  return -log(exponential);
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
