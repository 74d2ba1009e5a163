// The AVX-512 instructions that csrc uses, computed with AVX2: forced into every source of the instruction set "avx512"
// (cmake -DMVAR_AVX512_ON_AVX2=ON), so that its kernels can be tested on a processor without AVX-512.
//
// The compiler's own header comes first, while it still sees a machine without AVX-512; the names are then taken over.
#pragma once

#include <immintrin.h>
#include <string.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512BF16__ 1

namespace avx512_on_avx2 {

typedef float Floats __attribute__((vector_size(64)));
typedef unsigned Words __attribute__((vector_size(64)));
typedef int Ints __attribute__((vector_size(64)));
typedef unsigned short Halves __attribute__((vector_size(64)));
typedef unsigned long long Longs __attribute__((vector_size(64)));
typedef unsigned short HalfOfHalves __attribute__((vector_size(32)));

#define EMULATED static inline __attribute__((always_inline))

EMULATED Floats fmadd_ps(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 16; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return a;
}

// NaN in either operand answers the second one, as the instruction does.
EMULATED Floats max_ps(Floats a, Floats b) { return a > b ? a : b; }

EMULATED Floats sqrt_ps(Floats a) {
  for (int i = 0; i < 16; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}

// a·2^b with b already whole, rounded once.
EMULATED Floats maskz_scalef_ps(unsigned mask, Floats a, Floats b) {
  Floats scaled{};
  for (int i = 0; i < 16; ++i) {
    if (!(mask >> i & 1)) continue;
    const float b_i = b[i] > 1000 ? 1000.0f : b[i] < -1000 ? -1000.0f : b[i];
    scaled[i] = b[i] != b[i] ? b[i] : __builtin_ldexpf(a[i], int(b_i));
  }
  return scaled;
}

EMULATED unsigned lanes_of(Ints holds) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned(holds[i] < 0) << i;
  return mask;
}

// Of the predicates the one that csrc compares by.
EMULATED unsigned cmp_ps_mask_nlt(Floats a, Floats b) { return lanes_of(~(a < b)); }

EMULATED Words maskz_compress_epi32(unsigned mask, Words v) {
  Words kept{};
  for (int i = 0, n = 0; i < 16; ++i)
    if (mask >> i & 1) kept[n++] = v[i];
  return kept;
}

EMULATED Floats permutex2var_ps(Floats a, Words index, Floats b) {
  Floats picked;
  for (int i = 0; i < 16; ++i) picked[i] = index[i] & 16 ? b[index[i] & 15] : a[index[i] & 15];
  return picked;
}

EMULATED Halves maskz_permutexvar_epi16(unsigned mask, Halves index, Halves v) {
  Halves picked{};
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) picked[i] = v[index[i] & 31];
  return picked;
}

EMULATED Longs mul_epu32(Words a, Words b) {
  return ((Longs)a & 0xffffffffull) * ((Longs)b & 0xffffffffull);
}

EMULATED Words i32gather_epi32(Ints index, const void* base, int scale) {
  Words gathered;
  for (int i = 0; i < 16; ++i) {
    unsigned word;
    memcpy(&word, (const char*)base + (long long)index[i] * scale, sizeof word);
    gathered[i] = word;
  }
  return gathered;
}

EMULATED float from_half(unsigned half) {
  const unsigned bits = half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Two products a lane, the one of the upper halves first; inputs and results that are subnormal count as zero.
EMULATED float flushed(float v) { return __builtin_fabsf(v) < __FLT_MIN__ ? v * 0.0f : v; }
EMULATED Floats dpbf16_ps(Floats c, Halves a, Halves b) {
  for (int i = 0; i < 16; ++i) {
    float sum = flushed(c[i]);
    for (int half = 1; half >= 0; --half) {
      const float x = flushed(from_half(a[2 * i + half])), y = flushed(from_half(b[2 * i + half]));
      sum = flushed(__builtin_fmaf(x, y, sum));
    }
    c[i] = sum;
  }
  return c;
}

EMULATED HalfOfHalves cvtneps_pbh(Floats v) {
  HalfOfHalves rounded;
  for (int i = 0; i < 16; ++i) {
    const float value = flushed(v[i]);
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    rounded[i] = value != value ? (bits | 0x400000) >> 16 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  return rounded;
}

#undef EMULATED

}  // namespace avx512_on_avx2

#define _mm512_fmadd_ps(a, b, c) avx512_on_avx2::fmadd_ps(a, b, c)
#define _mm512_max_ps(a, b) avx512_on_avx2::max_ps(a, b)
#define _mm512_sqrt_ps(a) avx512_on_avx2::sqrt_ps(a)
#define _mm512_set1_ps(value) (avx512_on_avx2::Floats{} + (value))
#define _mm512_maskz_scalef_ps(mask, a, b) avx512_on_avx2::maskz_scalef_ps(mask, a, b)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) \
  ([&] { static_assert((predicate) == _CMP_NLT_UQ); return avx512_on_avx2::cmp_ps_mask_nlt(a, b); }())
#define _mm512_movepi32_mask(v) avx512_on_avx2::lanes_of((avx512_on_avx2::Ints)(v))
#define _mm512_maskz_compress_epi32(mask, v) \
  avx512_on_avx2::maskz_compress_epi32(mask, (avx512_on_avx2::Words)(v))
#define _mm512_permutex2var_ps(a, index, b) \
  avx512_on_avx2::permutex2var_ps(a, (avx512_on_avx2::Words)(index), b)
#define _mm512_maskz_permutexvar_epi16(mask, index, v) \
  avx512_on_avx2::maskz_permutexvar_epi16(mask, (avx512_on_avx2::Halves)(index), (avx512_on_avx2::Halves)(v))
#define _mm512_castsi256_si512(v) ([&] { \
    avx512_on_avx2::Halves wide{}; \
    const avx512_on_avx2::HalfOfHalves half = (avx512_on_avx2::HalfOfHalves)(v); \
    memcpy(&wide, &half, sizeof half); \
    return (__m512i)wide; \
  }())
#define _mm512_mul_epu32(a, b) \
  avx512_on_avx2::mul_epu32((avx512_on_avx2::Words)(a), (avx512_on_avx2::Words)(b))
#undef _mm512_i32gather_epi32
#define _mm512_i32gather_epi32(index, base, scale) \
  avx512_on_avx2::i32gather_epi32((avx512_on_avx2::Ints)(index), base, scale)
#define _mm512_cvtepu32_ps(v) __builtin_convertvector((avx512_on_avx2::Words)(v), avx512_on_avx2::Floats)
#define _mm512_dpbf16_ps(c, a, b) \
  avx512_on_avx2::dpbf16_ps(c, (avx512_on_avx2::Halves)(a), (avx512_on_avx2::Halves)(b))
#define _mm512_cvtneps_pbh(v) avx512_on_avx2::cvtneps_pbh(v)
