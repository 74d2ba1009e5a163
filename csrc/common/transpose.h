// The transpose of a matrix of floats.
#pragma once

#include "common/simd.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

#if defined(__AVX512F__)

// One of the four exchanges that transpose a 16×16 block: of rows i and i + distance, the lanes that
// belong to the other row.
template <int distance>
MVAR_INLINE void exchange(Vec (&rows)[16]) {
  const VecBits lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const VecBits is_upper = (VecBits)((lane & distance) != 0);
  const VecBits low = (is_upper & (lane - distance + 16)) | (~is_upper & lane);
  const VecBits high = (is_upper & (lane + 16)) | (~is_upper & (lane + distance));
  for (int i = 0; i < 16; ++i) {
    if (i & distance) continue;
    const Vec a = rows[i], b = rows[i + distance];
    rows[i] = _mm512_permutex2var_ps(a, (__m512i)low, b);
    rows[i + distance] = _mm512_permutex2var_ps(a, (__m512i)high, b);
  }
}

MVAR_INLINE void transpose_block(const float* from, int64_t from_step, float* to, int64_t to_step) {
  Vec rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = load(from + i * from_step, All{});
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
  for (int i = 0; i < 16; ++i) store(to + i * to_step, rows[i], All{});
}

constexpr int64_t kTransposeBlock = 16;

#else

constexpr int64_t kTransposeBlock = 4;

MVAR_INLINE void transpose_block(const float* from, int64_t from_step, float* to, int64_t to_step) {
  for (int64_t r = 0; r < 4; ++r) {
    for (int64_t c = 0; c < 4; ++c) to[c * to_step + r] = from[r * from_step + c];
  }
}

#endif

// to[c][r] = from[r][c]; the steps are from row to row, and may be negative.
inline void transpose(const float* from, int64_t from_step, int64_t rows, int64_t cols, float* to,
                      int64_t to_step) {
  const int64_t whole_rows = rows - rows % kTransposeBlock, whole_cols = cols - cols % kTransposeBlock;
  for (int64_t r = 0; r < whole_rows; r += kTransposeBlock) {
    for (int64_t c = 0; c < whole_cols; c += kTransposeBlock) {
      transpose_block(from + r * from_step + c, from_step, to + c * to_step + r, to_step);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c) {
      to[c * to_step + r] = from[r * from_step + c];
    }
  }
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
