// The same bits as mvar_kernels/ops/sample_tokens/noise.py, which explains them: every operation here is
// one of its operations, in its order, rounded on its own. -ffp-contract=off keeps it so, and on a GPU Vec itself.
#pragma once

#if defined(MVAR_CUDA_MODULE)
#include "one_lane.h"
#else
#include "lanes.h"
#endif

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

constexpr float kLn2High = 0.693145751953125f;
constexpr float kLn2Low = (float)(0.69314718055994530942 - 0.693145751953125);
constexpr float kLog2E = (float)1.44269504088896340736;

// Natural logarithm of normal positive values.
MVAR_INLINE Vec log(Vec x) {
  const VecInt bits = as_int(x);
  const VecInt e = (bits - 0x3f3504f3) >> 23;
  const Vec m = as_float(bits - (e << 23));
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
  const VecInt n = round_down(clamped * kLog2E + 0.5f);
  const Vec whole = to_float(n);
  const Vec r = (clamped - whole * kLn2High) - whole * kLn2Low;
  Vec p = splat(1.0f);
  MVAR_UNROLL(7)
  for (int k = 7; k > 0; --k) p = p * (r / (float)k) + 1.0f;
  const Vec power = as_float((n + 127) << 23);
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
    MVAR_UNROLL(10)
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
