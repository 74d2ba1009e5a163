// One vector of floats, as wide as the instruction set that the file is compiled for, and nothing
// more: a kernel written with it is compiled once per set (see CMakeLists.txt).
//
// Built on the vector extensions of GCC and Clang: `Vec` has + - * / by itself. Everything lives in
// a namespace of the instruction set's own name and nothing of the standard library is used: an
// inline function or template shared by name between the sets would be merged by the linker, and a
// machine without AVX-512 could be handed its AVX-512 copy.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define MVAR_INLINE inline __attribute__((always_inline))
#define MVAR_INLINE_LAMBDA __attribute__((always_inline))

namespace mvar {

struct bf16 {
  uint16_t bits;
};

namespace MVAR_INSTRUCTION_SET {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecBits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kWidth)));

// Which lanes a load or store touches: all of them, or the first n (the tail of a row).
struct All {};
struct First {
  int64_t n;
};

MVAR_INLINE Vec splat(float value) { return Vec{} + value; }

// a·b + c, rounded once where there is an instruction for it. The compiler must form none by
// itself (-ffp-contract=off): an expression that occurs twice must be the same number twice, or
// differences that should vanish (one channel's deviation from the mean of one channel) do not.
MVAR_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Lanes beyond the first n become zero.
MVAR_INLINE Vec keep(Vec v, All) { return v; }
MVAR_INLINE Vec keep(Vec v, First lanes) {
  Vec kept{};
  __builtin_memcpy(&kept, &v, lanes.n * sizeof(float));
  return kept;
}

// body(lanes) for the first n lanes, or for all where there are as many.
template <typename Body>
MVAR_INLINE void with_lanes(int64_t n, Body body) {
  if (n < kWidth) {
    body(First{n});
  } else {
    body(All{});
  }
}

// How T lies in memory: `Packed` is a vector of T, unpack and pack convert (pack rounds to
// nearest even). Lanes that a load does not touch are zero.
template <typename T>
struct Format;

template <>
struct Format<float> {
  typedef Vec Packed;
  static MVAR_INLINE Vec unpack(Packed v) { return v; }
  static MVAR_INLINE Packed pack(Vec v) { return v; }
};

// Intrinsics where there are some: of __builtin_convertvector GCC 12 makes twice the instructions.
template <>
struct Format<bf16> {
  typedef VecHalf Packed;

  static MVAR_INLINE Vec unpack(Packed v) {
#if defined(__AVX512F__)
    // One instruction, where widening and shifting are two: halves go to their float's upper part.
    const VecBits lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i half = _mm512_castsi256_si512((__m256i)v);
    return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)(lane << 16), half);
#elif defined(__AVX2__)
    return (Vec)((VecBits)_mm256_cvtepu16_epi32((__m128i)v) << 16);
#else
    return (Vec)(__builtin_convertvector(v, VecBits) << 16);
#endif
  }

  static MVAR_INLINE Packed pack(Vec v) {
#if defined(__AVX512BF16__)
    return (Packed)_mm512_cvtneps_pbh(v);
#else
    VecBits bits = (VecBits)v;
    VecBits rounded = bits + 0x7fff + ((bits >> 16) & 1);
    // Rounding could carry a NaN over into infinity or zero: keep it, with the quiet bit set.
    VecBits is_nan = (VecBits)(v != v);
    rounded = ((rounded & ~is_nan) | ((bits | 0x400000) & is_nan)) >> 16;
#if defined(__AVX2__)
    // Packs within each half of the register: put the two results side by side.
    __m256i halves = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
    return (Packed)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
#else
    return __builtin_convertvector(rounded, Packed);
#endif
#endif
  }
};

template <typename T>
MVAR_INLINE typename Format<T>::Packed load_packed(const T* p, All) {
  typename Format<T>::Packed v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
MVAR_INLINE typename Format<T>::Packed load_packed(const T* p, First lanes) {
  typename Format<T>::Packed v{};
  __builtin_memcpy(&v, p, lanes.n * sizeof(T));
  return v;
}

template <typename T>
MVAR_INLINE void store_packed(T* p, typename Format<T>::Packed v, All) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <typename T>
MVAR_INLINE void store_packed(T* p, typename Format<T>::Packed v, First lanes) {
  __builtin_memcpy(p, &v, lanes.n * sizeof(T));
}

template <typename T, typename Lanes>
MVAR_INLINE Vec load(const T* p, Lanes lanes) {
  return Format<T>::unpack(load_packed(p, lanes));
}

template <typename T, typename Lanes>
MVAR_INLINE void store(T* p, Vec v, Lanes lanes) {
  store_packed(p, Format<T>::pack(v), lanes);
}

MVAR_INLINE float sum(Vec v) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad quads[kWidth / 4];
  __builtin_memcpy(quads, &v, sizeof v);
  Quad total = quads[0];
  for (int64_t i = 1; i < kWidth / 4; ++i) total += quads[i];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// A long sum keeps this many partial sums, so that one addition need not wait for the last.
constexpr int kSlots = 4;

struct Sum {
  Vec slot[kSlots] = {};
  MVAR_INLINE float total() const { return sum((slot[0] + slot[1]) + (slot[2] + slot[3])); }
};

// body(i, lanes, slot) for every vector of 0..n, the tail included; `slot` says which partial sum
// the vector belongs to.
template <typename Body>
MVAR_INLINE void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kSlots * kWidth <= n; i += kSlots * kWidth) {
    body(i, All{}, 0);
    body(i + kWidth, All{}, 1);
    body(i + 2 * kWidth, All{}, 2);
    body(i + 3 * kWidth, All{}, 3);
  }
  for (; i + kWidth <= n; i += kWidth) body(i, All{}, 0);
  if (i < n) body(i, First{n - i}, 0);
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
