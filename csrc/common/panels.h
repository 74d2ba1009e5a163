// Packing of operands for the matmul of tile.h. B lies in panels of kPanel columns, each panel's rows
// one after another; A lies in rows. Padding to full words and vectors is zero.
#pragma once

#include "common/tile.h"
#include "common/transpose.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

struct Panels {
  float* data;
  int64_t depth;  // words

  MVAR_INLINE float* at(int64_t word, int64_t column) const {
    return data + (column / kPanel * depth + word) * kPanel + column % kPanel;
  }
};

// How many floats a B of that depth and so many columns takes.
MVAR_INLINE int64_t panel_floats(int64_t depth, int64_t columns) { return depth * round_up(columns, kPanel); }

// A vector of words, from so many of the elements at p (at most a vector's).
template <typename Word, typename T>
MVAR_INLINE Vec load_words(const T* p, int64_t elements) {
  if constexpr (Word::kDepth == 1) {
    return elements >= kWidth ? load(p, All{}) : load(p, First{elements});
  } else {
    Vec bits{};
    if (elements >= kWidth * Word::kDepth) {
      __builtin_memcpy(&bits, p, sizeof bits);
    } else {
      __builtin_memcpy(&bits, p, elements * sizeof(T));
    }
    return bits;
  }
}

// A row of A.
template <typename Word, typename T>
MVAR_INLINE void pack_row(float* out, const T* row, int64_t elements) {
  constexpr int64_t step = kWidth * Word::kDepth;
  for (int64_t i = 0; i < elements; i += step, out += kWidth) {
    const Vec packed = load_words<Word>(row + i, elements - i);
    if (elements - i >= step) {
      store(out, packed, All{});
    } else {
      __builtin_memcpy(out, &packed, words<Word>(elements - i) * sizeof(float));
    }
  }
}

// Row `word` of B from one row of elements, or from two of which each word takes one element; `second`
// may be null, for zeros.
template <typename Word, typename T>
MVAR_INLINE void pack_word(const Panels& out, int64_t word, const T* first, const T* second, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    Vec packed = load_words<Single>(first + c, columns - c);
    if constexpr (Word::kDepth == 2) {
      // A bf16 is the upper half of its float.
      const Vec upper = second ? load_words<Single>(second + c, columns - c) : Vec{};
      packed = (Vec)((VecBits)packed >> 16 | (VecBits)upper);
    }
    store(out.at(word, c), packed, All{});
  }
}

// Columns first_column.. of B, kWidth of them, from as many rows or fewer. row(i) is a pointer.
template <typename Word, typename Row>
MVAR_INLINE void pack_columns(const Panels& out, int64_t first_column, int64_t rows, Row row, int64_t elements) {
  constexpr int64_t step = kWidth * Word::kDepth;
  for (int64_t e = 0; e < elements; e += step) {
    const int64_t word = e / Word::kDepth;
    float* to = out.at(word, first_column);
    Vec square[kWidth];
    if (rows >= kWidth && elements - e >= step) {
      unrolled<kWidth>([&](auto i) MVAR_INLINE_LAMBDA { square[i] = load_words<Word>(row(i) + e, step); });
      transpose(square);
      unrolled<kWidth>([&](auto i) MVAR_INLINE_LAMBDA { store(to + i * kPanel, square[i], All{}); });
    } else {
      for (int i = 0; i < kWidth; ++i) {
        square[i] = i < rows ? load_words<Word>(row(i) + e, elements - e) : Vec{};
      }
      transpose(square);
      for (int i = 0; i < kWidth && word + i < out.depth; ++i) store(to + i * kPanel, square[i], All{});
    }
  }
}

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
