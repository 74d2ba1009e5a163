// Matmuls in registers, a block of sums at a time, on unpacked operands: all are small and in
// cache, and packing them into the panels of common/tile.h would cost as much as their few rows earn.
#pragma once

#include "common/tile.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

// The block that keeps the multipliers busy and divides a chunk.
constexpr int kBlockRows = 4;
#if defined(__AVX512F__)
constexpr int kBlockCols = 4;
#else
constexpr int kBlockCols = 2;
#endif

template <int n>
struct Count {
  static constexpr int value = n;
};

template <int rows, int cols>
struct Block {
  Vec sum[rows][cols];
};

// sum[r][c] += Σ_k a[r·a_row + k·a_k] · b[k·b_k + c]
template <int rows, int cols>
MVAR_INLINE void multiply_add(Block<rows, cols>& block, const float* a, int64_t a_row, int64_t a_k, const float* b,
                              int64_t b_k, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    Vec line[cols];
    for (int c = 0; c < cols; ++c) line[c] = load(b + k * b_k + c * kWidth, All{});
    for (int r = 0; r < rows; ++r) {
      const Vec factor = broadcast(a + r * a_row + k * a_k);
      for (int c = 0; c < cols; ++c) block.sum[r][c] = fma(factor, line[c], block.sum[r][c]);
    }
  }
}

// body(first, Count<rows>, column, Count<cols>) for every block of a matrix of `rows` × `width` floats,
// width a multiple of the vector. What is left of the rows goes one at a time.
template <typename Body>
MVAR_INLINE void for_each_block(int64_t rows, int64_t width, Body body) {
  const int64_t panels = width - width % (kBlockCols * kWidth);
  for (int64_t c = 0; c < panels; c += kBlockCols * kWidth) {
    int64_t r = 0;
    for (; r + kBlockRows <= rows; r += kBlockRows) body(r, Count<kBlockRows>{}, c, Count<kBlockCols>{});
    for (; r < rows; ++r) body(r, Count<1>{}, c, Count<kBlockCols>{});
  }
  for (int64_t c = panels; c < width; c += kWidth) {
    int64_t r = 0;
    for (; r + 2 * kBlockRows <= rows; r += 2 * kBlockRows) body(r, Count<2 * kBlockRows>{}, c, Count<1>{});
    for (; r + kBlockRows <= rows; r += kBlockRows) body(r, Count<kBlockRows>{}, c, Count<1>{});
    for (; r < rows; ++r) body(r, Count<1>{}, c, Count<1>{});
  }
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
