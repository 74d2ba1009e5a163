// Integer vectors of the width of common/simd.h: of int32, and of uint64 at half as many lanes.
//
// Arrays that are read through these are padded to whole vectors, and compress writes a whole vector
// wherever it stands: see Row in filter.h.
#pragma once

#include "common/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define MVAR_PRAGMA(text) _Pragma(#text)
#define MVAR_UNROLL(times) MVAR_PRAGMA(GCC unroll times)

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

typedef int32_t VecInt __attribute__((vector_size(4 * kWidth)));
typedef uint64_t VecWide __attribute__((vector_size(4 * kWidth)));

constexpr uint64_t kLow32 = 0xffffffff;

MVAR_INLINE VecInt splat_int(int32_t value) { return VecInt{} + value; }
MVAR_INLINE VecWide splat_wide(uint64_t value) { return VecWide{} + value; }

MVAR_INLINE VecInt load_int(const int32_t* p) {
  VecInt v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

MVAR_INLINE void store_int(int32_t* p, VecInt v) { __builtin_memcpy(p, &v, sizeof v); }

// 0, 1, 2, …
MVAR_INLINE VecInt lane_numbers() {
  VecInt v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

MVAR_INLINE VecInt smaller(VecInt a, VecInt b) { return a < b ? a : b; }
MVAR_INLINE VecInt larger(VecInt a, VecInt b) { return a > b ? a : b; }

// Lanes beyond the first n become `other`.
MVAR_INLINE VecInt keep_or(int32_t, VecInt v, All) { return v; }
MVAR_INLINE VecInt keep_or(int32_t other, VecInt v, First lanes) {
  VecInt kept = splat_int(other);
  __builtin_memcpy(&kept, &v, lanes.n * sizeof(int32_t));
  return kept;
}

// All lanes combined, whatever their order.
template <typename Lane, typename V, typename Combine>
MVAR_INLINE Lane fold(V v, Combine combine) {
  typedef Lane Quad __attribute__((vector_size(16)));
  constexpr int lanes = 16 / sizeof(Lane);
  Quad quads[kWidth / 4];
  __builtin_memcpy(quads, &v, sizeof v);
  Quad folded = quads[0];
  for (int64_t i = 1; i < kWidth / 4; ++i) folded = combine(folded, quads[i]);
  Lane result = folded[0];
  for (int i = 1; i < lanes; ++i) result = combine(result, folded[i]);
  return result;
}

MVAR_INLINE int32_t smallest(VecInt v) {
  return fold<int32_t>(v, [](auto a, auto b) MVAR_INLINE_LAMBDA { return a < b ? a : b; });
}
MVAR_INLINE int32_t largest(VecInt v) {
  return fold<int32_t>(v, [](auto a, auto b) MVAR_INLINE_LAMBDA { return a > b ? a : b; });
}
MVAR_INLINE int32_t sum(VecInt v) {
  return fold<int32_t>(v, [](auto a, auto b) MVAR_INLINE_LAMBDA { return a + b; });
}
MVAR_INLINE uint64_t sum(VecWide v) {
  return fold<uint64_t>(v, [](auto a, auto b) MVAR_INLINE_LAMBDA { return a + b; });
}

// The same bits.
MVAR_INLINE VecInt as_int(Vec v) { return (VecInt)v; }
MVAR_INLINE Vec as_float(VecInt v) { return (Vec)v; }

MVAR_INLINE Vec to_float(VecInt v) { return __builtin_convertvector(v, Vec); }

// Towards zero.
MVAR_INLINE VecInt to_int(Vec v) { return __builtin_convertvector(v, VecInt); }

MVAR_INLINE VecInt round_down(Vec v) {
  const VecInt truncated = to_int(v);
  return truncated + (to_float(truncated) > v);  // true is −1
}

// Of unsigned numbers, rounded once: both halves are exact, only their sum rounds.
MVAR_INLINE Vec unsigned_to_float(VecBits v) {
#if defined(__AVX512F__)
  return _mm512_cvtepu32_ps((__m512i)v);
#else
  return to_float((VecInt)(v >> 16)) * 65536.0f + to_float((VecInt)(v & 0xffff));
#endif
}

// The product of the lower halves of each lane; what the upper halves hold does not matter.
MVAR_INLINE VecWide multiply_low(VecWide a, VecWide b) {
#if defined(__AVX512F__)
  return (VecWide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecWide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VecWide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & kLow32) * (b & kLow32);
#endif
}

MVAR_INLINE VecInt gather(const int32_t* base, VecInt index) {
#if defined(__AVX512F__)
  return (VecInt)_mm512_i32gather_epi32((__m512i)index, base, 4);
#elif defined(__AVX2__)
  return (VecInt)_mm256_i32gather_epi32(base, (__m256i)index, 4);
#else
  VecInt v;
  for (int i = 0; i < kWidth; ++i) v[i] = base[index[i]];
  return v;
#endif
}

// Which lanes of a comparison hold, one bit each.
MVAR_INLINE uint32_t bits_of(VecInt holds) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)holds);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)holds);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (uint32_t)(holds[i] & 1) << i;
  return bits;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of lanes their numbers in order, a byte each.
struct LaneOrders {
  uint64_t of[1 << kWidth];
  constexpr LaneOrders() : of{} {
    for (int set = 0; set < 1 << kWidth; ++set)
      for (int lane = 0, place = 0; lane < kWidth; ++lane)
        if (set >> lane & 1) of[set] |= (uint64_t)lane << 8 * place++;
  }
};
constexpr LaneOrders kLaneOrders;
#endif

// The lanes whose bit is set, in order, to p[0], p[1], …; up to kWidth elements of p are overwritten.
MVAR_INLINE void compress(int32_t* p, VecInt v, uint32_t bits) {
#if defined(__AVX512F__)
  store_int(p, (VecInt)_mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)v));
#elif defined(__AVX2__)
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)kLaneOrders.of[bits]));
  store_int(p, (VecInt)_mm256_permutevar8x32_epi32((__m256i)v, order));
#else
  for (int i = 0; i < kWidth; ++i, bits >>= 1) {
    *p = v[i];
    p += bits & 1;
  }
#endif
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
