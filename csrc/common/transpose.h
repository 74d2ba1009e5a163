// The transpose of a matrix of floats.
#pragma once

#include "common/tile.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

template <int... lane>
struct Lanes {};
#if defined(__AVX512F__)
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#elif defined(__AVX2__)
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#else
typedef Lanes<0, 1, 2, 3> AllLanes;
#endif

// One step of a transposition: exchanges the two off-diagonal blocks of side n in every square of
// side 2n that rows a and b = a + n run through.
template <int n, int... lane>
MVAR_INLINE void exchange(Vec& a, Vec& b, Lanes<lane...>) {
  const Vec upper = __builtin_shufflevector(a, b, (lane & n ? kWidth + lane - n : lane)...);
  b = __builtin_shufflevector(a, b, (lane & n ? kWidth + lane : lane + n)...);
  a = upper;
}

template <int n = 1>
MVAR_INLINE void transpose(Vec (&rows)[kWidth]) {
  unrolled<kWidth>([&](auto i) MVAR_INLINE_LAMBDA {
    if constexpr (!(i & n)) exchange<n>(rows[i], rows[i + n], AllLanes{});
  });
  if constexpr (2 * n < kWidth) transpose<2 * n>(rows);
}

// One block of kWidth × kWidth, of which from has only so many rows, then zeros, and to so many.
MVAR_INLINE void transpose_block(const float* from, int64_t from_step, int64_t from_rows, float* to, int64_t to_step,
                                 int64_t to_rows) {
  Vec rows[kWidth];
  unrolled<kWidth>([&](auto i) MVAR_INLINE_LAMBDA {
    rows[i] = i < from_rows ? load(from + i * from_step, All{}) : Vec{};
  });
  transpose(rows);
  unrolled<kWidth>([&](auto i) MVAR_INLINE_LAMBDA {
    if (i < to_rows) store(to + i * to_step, rows[i], All{});
  });
}

// to[c][r] = from[r][c]; the steps are from row to row. Rows are padded to whole vectors: from's are read to the end of
// one, and to's are filled up with zeros to to_step. from_step may be negative.
inline void transpose_padded(const float* from, int64_t from_step, int64_t rows, int64_t cols, float* to,
                             int64_t to_step) {
  for (int64_t r = 0; r < to_step; r += kWidth) {
    for (int64_t c = 0; c < cols; c += kWidth) {
      transpose_block(from + r * from_step + c, from_step, rows - r, to + c * to_step + r, to_step, cols - c);
    }
  }
}

// The same without padding.
inline void transpose(const float* from, int64_t from_step, int64_t rows, int64_t cols, float* to,
                      int64_t to_step) {
  const int64_t whole_rows = rows - rows % kWidth, whole_cols = cols - cols % kWidth;
  for (int64_t r = 0; r < whole_rows; r += kWidth) {
    for (int64_t c = 0; c < whole_cols; c += kWidth) {
      transpose_block(from + r * from_step + c, from_step, kWidth, to + c * to_step + r, to_step, kWidth);
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
