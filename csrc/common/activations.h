// Sigmoid, SiLU and softplus of a vector of floats.
#pragma once

#include "common/exp.h"
#include "common/simd.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

// e^(−|x|), which never overflows.
MVAR_INLINE Vec exp_of_minus_abs(Vec x) { return exp<true>((Vec)((VecBits)x | 0x80000000u)); }

MVAR_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp_of_minus_abs(x);
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

MVAR_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

// With s = sigmoid(x): the derivative of silu.
MVAR_INLINE Vec silu_slope(Vec x, Vec s) { return fma(x * s, 1.0f - s, s); }

// log(1 + e^x) = max(x, 0) + log(1 + e), e = e^(−|x|) ≤ 1. With u = e / (2 + e), log(1 + e) = 2 artanh(u) =
// 2u + 2u³·(⅓ + …), and 2u = e − e·u: the largest term is e itself, so the relative accuracy is kept
// however small e is, and u's own rounding weighs little.
MVAR_INLINE Vec softplus(Vec x) {
  const Vec e = exp_of_minus_abs(x);
  const Vec u = e / (2.0f + e);
  const Vec u2 = u * u;
  Vec series = fma(splat(2.0f / 15), u2, splat(2.0f / 13));
  series = fma(series, u2, splat(2.0f / 11));
  series = fma(series, u2, splat(2.0f / 9));
  series = fma(series, u2, splat(2.0f / 7));
  series = fma(series, u2, splat(2.0f / 5));
  series = fma(series, u2, splat(2.0f / 3));
  const Vec log1p = e - fma(e, u, -(u * u2) * series);
  return (x < 0.0f ? Vec{} : x) + log1p;
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
