// The mixer's causal depth-wise convolution over a few tokens of a few channels, in scratch.
#pragma once

#include "common/activations.h"
#include "mamba2/cpu/geometry.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

template <typename T>
MVAR_INLINE T* row(const Tokens& t, int64_t b, int64_t l) {
  return (T*)t.data + b * t.batch_stride + l * t.row_stride;
}

// Which channels of [x, B, C]: `count` of them from `first`; lines in scratch are `width` floats.
struct Channels {
  int64_t first, count, width;
};

// rows: the taps−1 tokens before `token`, from the state where they lie before the sequence, and `tokens`
// tokens from it on.
template <typename T>
void gather_rows(const Tokens& xbc, const Tokens& state, int64_t b, int64_t token, int64_t tokens, int64_t taps,
                 const Channels& c, float* rows) {
  for (int64_t i = 0; i < taps - 1 + tokens; ++i) {
    const int64_t l = token - (taps - 1) + i;
    const T* from = (l < 0 ? row<T>(state, b, l + taps - 1) : row<T>(xbc, b, l)) + c.first;
    float* to = rows + i * c.width;
    for_each_vector(c.count, [&](int64_t j, auto lanes, int) MVAR_INLINE_LAMBDA {
      store(to + j, load(from + j, lanes), All{});
    });
  }
}

// weights: a line per tap and one of the bias.
void gather_weights(const float* weight, const float* bias, int64_t taps, const Channels& c, float* weights) {
  for (int64_t j = 0; j < c.width; ++j) {
    const bool there = j < c.count;
    for (int64_t k = 0; k < taps; ++k) {
      weights[k * c.width + j] = there ? weight[(c.first + j) * taps + k] : 0.0f;
    }
    weights[taps * c.width + j] = there ? bias[c.first + j] : 0.0f;
  }
}

MVAR_INLINE Vec convolved(const float* rows, const float* weights, int64_t taps, int64_t width) {
  Vec sum = load(weights + taps * width, All{});
  for (int64_t k = 0; k < taps; ++k) {
    sum = fma(load(weights + k * width, All{}), load(rows + k * width, All{}), sum);
  }
  return sum;
}

// out = SiLU(convolution), `tokens` lines
void convolve(const float* rows, const float* weights, int64_t tokens, int64_t taps, int64_t width, float* out) {
  for (int64_t j = 0; j < width; j += kWidth) {
    for (int64_t t = 0; t < tokens; ++t) {
      store(out + t * width + j, silu(convolved(rows + t * width + j, weights + j, taps, width)), All{});
    }
  }
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
