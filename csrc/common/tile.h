// A small matmul in registers, A·B: kTileRows rows of A, up to kPanel columns of B.
//
// Operands are made of 32-bit words, kept in arrays of float and only ever moved: a Single is one
// float, a Pair two neighbouring bf16 of the dimension that is summed over.
#pragma once

#include "common/simd.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

// As many accumulators as leave registers for a row of B and an element of A.
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int64_t kPanel = kTileVectors * kWidth;

MVAR_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Single {
  static constexpr int64_t kDepth = 1;  // elements per word
  static MVAR_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int64_t kDepth = 2;
  static MVAR_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// The words that matmuls of T are computed with.
template <typename T>
struct WordOf;
template <>
struct WordOf<float> {
  typedef Single Word;
};
template <>
struct WordOf<bf16> {
#if defined(__AVX512BF16__)
  typedef Pair Word;
#else
  typedef Single Word;
#endif
};

template <typename Word>
MVAR_INLINE int64_t words(int64_t elements) {
  return (elements + Word::kDepth - 1) / Word::kDepth;
}

// One word in every lane, its bits untouched: splat() would add, and change those of a Pair.
MVAR_INLINE Vec broadcast(const float* p) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return _mm256_broadcast_ss(p);
#else
  return Vec{*p, *p, *p, *p};
#endif
}

template <int i>
struct Index {
  constexpr operator int() const { return i; }
};

// body(Index<0>), body(Index<1>), … : written out before the compiler decides what is kept in
// registers, which a loop that it unrolls by itself is not.
template <int n, typename Body>
MVAR_INLINE void unrolled(Body body) {
  if constexpr (n > 0) {
    unrolled<n - 1>(body);
    body(Index<n - 1>{});
  }
}

template <int vectors>
struct Tile {
  Vec at[kTileRows][vectors];
};

// body(r, v) for every vector of a tile
template <int vectors, typename Body>
MVAR_INLINE void for_each_of_tile(Body body) {
  unrolled<kTileRows>([&](auto r) MVAR_INLINE_LAMBDA {
    unrolled<vectors>([&](auto v) MVAR_INLINE_LAMBDA { body(r, v); });
  });
}

// A·B, where A(r, i) is a[r·a_row + i·a_step] and b is a panel: row i of B at b + i·kPanel.
template <typename Word, int vectors>
MVAR_INLINE Tile<vectors> multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t depth) {
  Tile<vectors> c;
  for_each_of_tile<vectors>([&](auto r, auto v) MVAR_INLINE_LAMBDA { c.at[r][v] = Vec{}; });
  for (int64_t i = 0; i < depth; ++i, a += a_step, b += kPanel) {
    Vec columns[vectors];
    unrolled<vectors>([&](auto v) MVAR_INLINE_LAMBDA { columns[v] = load(b + v * kWidth, All{}); });
    unrolled<kTileRows>([&](auto r) MVAR_INLINE_LAMBDA {
      const Vec element = broadcast(a + r * a_row);
      unrolled<vectors>([&](auto v) MVAR_INLINE_LAMBDA {
        c.at[r][v] = Word::multiply_add(element, columns[v], c.at[r][v]);
      });
    });
  }
  return c;
}

template <int n>
struct Vectors {
  static constexpr int count = n;
};

// body(first column, Vectors<n>) for the panels of 0..columns; the last has only the vectors it needs.
template <typename Body>
MVAR_INLINE void for_each_panel(int64_t columns, Body body) {
  int64_t first = 0;
  for (; first + kPanel <= columns; first += kPanel) body(first, Vectors<kTileVectors>{});
  switch ((columns - first + kWidth - 1) / kWidth) {
    case 0: break;
    case 1: body(first, Vectors<1>{}); break;
#if defined(__AVX512F__)
    case 2: body(first, Vectors<2>{}); break;
    case 3: body(first, Vectors<3>{}); break;
#endif
    default: body(first, Vectors<kTileVectors>{});
  }
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
