// Matrix products in registers: a tile of sums, `rows` numbers high and `cols` vectors wide.
#pragma once

#include "common/simd.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

// The tile that keeps the multipliers busy and leaves registers for its operands.
constexpr int kTileRows = 4;
#if defined(__AVX512F__)
constexpr int kTileCols = 4;
#else
constexpr int kTileCols = 2;
#endif

// A number from memory in every lane: one load, where splat, which adds it to zero, is three operations.
MVAR_INLINE Vec broadcast(const float* from) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(*from);
#elif defined(__AVX2__)
  return _mm256_broadcast_ss(from);
#else
  return Vec{*from, *from, *from, *from};
#endif
}

template <int n>
struct Count {
  static constexpr int value = n;
};

template <int rows, int cols>
struct Tile {
  Vec sum[rows][cols];
};

// sum[r][c] += Σ_k a[r·a_row + k·a_k] · b[k·b_k + c]
template <int rows, int cols>
MVAR_INLINE void multiply_add(Tile<rows, cols>& tile, const float* a, int64_t a_row, int64_t a_k, const float* b,
                              int64_t b_k, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    Vec line[cols];
    for (int c = 0; c < cols; ++c) line[c] = load(b + k * b_k + c * kWidth, All{});
    for (int r = 0; r < rows; ++r) {
      const Vec factor = broadcast(a + r * a_row + k * a_k);
      for (int c = 0; c < cols; ++c) tile.sum[r][c] = fma(factor, line[c], tile.sum[r][c]);
    }
  }
}

// body(first, Count<rows>, column, Count<cols>) for every tile of a matrix of `rows` × `width` floats,
// width a multiple of the vector. What is left of the rows goes one at a time.
template <typename Body>
MVAR_INLINE void for_each_tile(int64_t rows, int64_t width, Body body) {
  const int64_t panels = width - width % (kTileCols * kWidth);
  for (int64_t c = 0; c < panels; c += kTileCols * kWidth) {
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) body(r, Count<kTileRows>{}, c, Count<kTileCols>{});
    for (; r < rows; ++r) body(r, Count<1>{}, c, Count<kTileCols>{});
  }
  for (int64_t c = panels; c < width; c += kWidth) {
    int64_t r = 0;
    for (; r + 2 * kTileRows <= rows; r += 2 * kTileRows) body(r, Count<2 * kTileRows>{}, c, Count<1>{});
    for (; r + kTileRows <= rows; r += kTileRows) body(r, Count<kTileRows>{}, c, Count<1>{});
    for (; r < rows; ++r) body(r, Count<1>{}, c, Count<1>{});
  }
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
