// Rotary position embedding of rows of q and k (mvar_kernels/ops/scale_attention/op.py), and its transpose for gradients.
//
// A rotated row has the first members of all pairs of channels, then the second ones, wherever q and k have them: of
// products of two such rows the order changes nothing, and loops run over what lies side by side.
#pragma once

#include "schedule.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// What a thread rotates in.
struct RotaryBuffers {
  float *plain, *turned;  // (D)
  float* rows;            // (kWidth, D) of T: rotated rows

  RotaryBuffers(Carver& carver, const Sizes& n)
      : plain(carver.take(n.cos ? n.D : 0)),
        turned(carver.take(n.cos ? n.D : 0)),
        rows(carver.take(n.cos ? kWidth * n.D : 0)) {}
};

// body(i, j, a, b) for every pair: its members' places in a row of q or k, and in a row of cosines and sines.
template <typename Body>
MVAR_INLINE void for_each_pair(const Sizes& n, Body body) {
  const int64_t half = n.D / 2, second = n.angles == n.D ? half : 0;
  if (!n.interleaved) {
    for (int64_t i = 0; i < half; ++i) body(i, i, i + half, i, i + second);
  } else if (second) {
    for (int64_t i = 0; i < half; ++i) body(i, 2 * i, 2 * i + 1, 2 * i, 2 * i + 1);
  } else {
    for (int64_t i = 0; i < half; ++i) body(i, 2 * i, 2 * i + 1, i, i);
  }
}

// to = x, over its length where there is a norm, rotated as row l of the sequence.
template <typename T>
void rotate_row(T* to, const T* x, const RotaryBuffers& w, const Sizes& n, int64_t l) {
  const Vec factor = splat(n.log_temperature ? inverse_norm<Single>(x, n.D) : 1.0f);
  for_each_vector(n.D, [&](int64_t d, auto lanes, int) MVAR_INLINE_LAMBDA {
    store(w.plain + d, load(x + d, lanes) * factor, lanes);
  });
  const float *cos = n.cos + l * n.angles, *sin = n.sin + l * n.angles;
  const float* __restrict from = w.plain;
  float *__restrict first = w.turned, *__restrict second = w.turned + n.D / 2;
  for_each_pair(n, [&](int64_t i, int64_t x1, int64_t x2, int64_t a1, int64_t a2) MVAR_INLINE_LAMBDA {
    first[i] = from[x1] * cos[a1] - from[x2] * sin[a1];
    second[i] = from[x2] * cos[a2] + from[x1] * sin[a2];
  });
  for_each_vector(n.D, [&](int64_t d, auto lanes, int) MVAR_INLINE_LAMBDA {
    store(to + d, load(w.turned + d, lanes), lanes);
  });
}

// Rows first.. of q or k, at most kWidth, as they are multiplied; the first of q is row `skipped` of the sequence.
template <typename T>
MVAR_INLINE Rows<T> multiplied_rows(const RotaryBuffers& w, const Heads& t, const Sizes& n, Head at, int64_t first,
                                    int64_t rows, int64_t skipped = 0) {
  const Rows<T> given{row<T>(t, at.b, first, at.h), t.row_stride};
  if (!n.cos) return given;
  const Rows<T> rotated{(T*)w.rows, n.D};
  for (int64_t i = 0; i < rows; ++i) rotate_row((T*)w.rows + i * n.D, given(i), w, n, skipped + first + i);
  return rotated;
}

// The gradient of row x, over its length where there is a norm, from that of the rotated one: in `plain`.
template <typename T>
const float* rotate_back(const float* grad, const T* x, const RotaryBuffers& w, const Sizes& n, int64_t l) {
  const float factor = n.log_temperature ? inverse_norm<Single>(x, n.D) : 1.0f;
  const float *cos = n.cos + l * n.angles, *sin = n.sin + l * n.angles;
  const float *__restrict first = grad, *__restrict second = grad + n.D / 2;
  float* __restrict to = w.plain;
  for_each_pair(n, [&](int64_t i, int64_t x1, int64_t x2, int64_t a1, int64_t a2) MVAR_INLINE_LAMBDA {
    to[x1] = (first[i] * cos[a1] + second[i] * sin[a2]) * factor;
    to[x2] = (second[i] * cos[a2] - first[i] * sin[a1]) * factor;
  });
  return w.plain;
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
