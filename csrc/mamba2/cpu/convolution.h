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

// Channels next to each other, numbered from `first` on among those of the group alone, [x, B, C].
struct ChannelRun {
  int64_t first, channel, count;
};

// All channels of a group: its x, B and C, which lie apart where there are others.
struct ChannelRuns {
  ChannelRun runs[3];
  int64_t count;
  const ChannelRun* begin() const { return runs; }
  const ChannelRun* end() const { return runs + count; }
};

MVAR_INLINE ChannelRuns channel_runs(const Sizes& n) {
  const int64_t E = n.H * n.P;
  if (n.groups == 1) return {{{0, 0, E + 2 * n.N}}, 1};
  return {{{0, 0, E}, {E, n.B_channel, n.N}, {E + n.N, n.C_channel, n.N}}, 3};
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

// A vector for each tap, in lines of `width` floats; in registers where the number of taps is known when compiling.
template <int known>
struct Taps {
  const float* lines;
  int64_t width;
  Vec at[known];
  Taps(const float* lines, int64_t width, int64_t) : lines(lines), width(width) {}
  MVAR_INLINE void read() {
    for (int64_t k = 0; k < known; ++k) at[k] = load(lines + k * width, All{});
  }
  MVAR_INLINE int64_t count() const { return known; }
  MVAR_INLINE Vec get(int64_t k) const { return at[k]; }
  MVAR_INLINE void set(int64_t k, Vec value) { at[k] = value; }
};

template <>
struct Taps<0> {  // it is not known
  float* lines;
  int64_t width, taps;
  Taps(float* lines, int64_t width, int64_t taps) : lines(lines), width(width), taps(taps) {}
  MVAR_INLINE void read() {}
  MVAR_INLINE int64_t count() const { return taps; }
  MVAR_INLINE Vec get(int64_t k) const { return load(lines + k * width, All{}); }
  MVAR_INLINE void set(int64_t k, Vec value) { store(lines + k * width, value, All{}); }
};

// body(Count<taps>), for the four of every published model, or body(Count<0>).
template <typename Body>
MVAR_INLINE void with_taps(int64_t taps, Body body) {
  if (taps == 4) {
    body(Count<4>{});
  } else {
    body(Count<0>{});
  }
}

// take(t, j, value) for `tokens` tokens and every vector of channels: the convolution of rows t … t + taps − 1.
template <typename Take>
MVAR_INLINE void convolve(const float* rows, float* weights, int64_t tokens, int64_t taps, int64_t width, Take take) {
  with_taps(taps, [&](auto known) MVAR_INLINE_LAMBDA {
    for (int64_t j = 0; j < width; j += kWidth) {
      Taps<decltype(known)::value> weight(weights + j, width, taps);
      weight.read();
      const Vec bias = load(weights + taps * width + j, All{});
      for (int64_t t = 0; t < tokens; ++t) {
        Vec sum = bias;
        for (int64_t k = 0; k < weight.count(); ++k) {
          sum = fma(weight.get(k), load(rows + (t + k) * width + j, All{}), sum);
        }
        take(t, j, sum);
      }
    }
  });
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
