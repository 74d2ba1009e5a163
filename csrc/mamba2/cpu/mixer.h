// mamba2_mixer: the scan with convolution and SiLU before it, gate and RMSNorm after it. A head computes its
// own x in scratch and hands on gated rows with their squares summed; when all heads of a stage are done,
// its rows are normalised.
#pragma once

#include <type_traits>

#include "mamba2/cpu/convolution.h"
#include "mamba2/cpu/forward.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

using mamba2::MixerForward;
using mamba2::Norm;

// body(std::true_type{}) where SiLU(z) is multiplied with what RMSNorm gives, else false_type.
template <typename Body>
MVAR_INLINE void with_order(const Sizes& n, Body body) {
  if (n.norm == Norm::kBeforeGate) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// Δ between its limits; NaN stays.
MVAR_INLINE Vec limited(Vec delta, const Sizes& n) {
  const Vec low = splat(n.dt_min), high = splat(n.dt_max);
  return delta < low ? low : delta > high ? high : delta;
}

// kKeeps: the convolution is stored before its SiLU, for the backward.
template <typename T, bool kKeeps = false>
struct MixerForm {
  static constexpr bool kFinishesTokens = true;
  // float32 is gated in the output itself; bfloat16 would be rounded once too often.
  static constexpr bool kInPlace = sizeof(T) == sizeof(float);
  const MixerForward& a;
  const Sizes& n;
  const float* rates;
  const Tokens kept{};  // (B, L, E+2N)

  const float* A() const { return rates; }
  int64_t E() const { return n.H * n.P; }

  // out = SiLU of the convolution: lines of tokens from `first` on
  void fill_lines(int64_t b, int64_t first, int64_t tokens, const Channels& c, const Scratch& s, const float* rows,
                  float* out) const {
    convolve(rows, s.weights, tokens, n.taps, c.width, [&](int64_t t, int64_t j, Vec value) MVAR_INLINE_LAMBDA {
      store(out + t * c.width + j, silu(value), All{});
      if constexpr (kKeeps) {
        float* to = row<float>(kept, b, first + t) + c.first + j;
        with_lanes(c.count - j, [&](auto lanes) MVAR_INLINE_LAMBDA { store(to, value, lanes); });
      }
    });
  }

  void fill_shared(int64_t b, const Chunk& chunk, const Shared& shared, const Scratch& s, const Geometry& g) const {
    float* lines[] = {shared.B, shared.C};
    for (int64_t i = 0; i < 2; ++i) {
      const Channels channels{i ? n.C_channel : n.B_channel, n.N, g.N_padded};
      gather_rows<T>(a.xbc, a.conv_state, b, chunk.first, chunk.q, n.taps, channels, s.rows);
      gather_weights(a.conv_weight, a.conv_bias, n.taps, channels, s.weights);
      fill_lines(b, chunk.first, chunk.q, channels, s, s.rows, lines[i]);
    }
    for (int64_t i = 0; i < chunk.q; ++i) {
      for (int64_t d = 0; d < n.directions; ++d) fill_delta(b, chunk, i, d, shared);
    }
  }

  void fill_delta(int64_t b, const Chunk& chunk, int64_t i, int64_t d, const Shared& shared) const {
    const float* dt = (const float*)a.dt.data + b * a.dt.batch_stride + (chunk.first + i) * a.dt.row_stride +
                      d * a.dt.direction_stride;
    for_each_vector(n.H, [&](int64_t h, auto lanes, int) MVAR_INLINE_LAMBDA {
      Vec delta = softplus(load(dt + h, lanes) + load(a.dt_bias + d * n.all_heads + h, lanes));
      if (n.limits_dt) delta = limited(delta, n);
      store_delta(shared, chunk, d, h, i, delta, n);
    });
  }

  void start_head(int64_t h, const Scratch& s, const Geometry& g) const {
    gather_weights(a.conv_weight, a.conv_bias, n.taps, {h * n.P, n.P, g.width}, s.weights);
  }

  void fill_x(int64_t b, int64_t h, const Segment& segment, const Scratch& s, const Geometry& g) const {
    const Channels channels{h * n.P, n.P, g.width};
    gather_rows<T>(a.xbc, a.conv_state, b, segment.first, segment.tokens, n.taps, channels, s.rows);
    for (int64_t c = 0; c < segment.count; ++c) {
      const Chunk& chunk = segment.chunks[c];
      const float* rows = s.rows + (chunk.first - segment.first) * g.width;
      fill_lines(b, chunk.first, chunk.q, channels, s, rows, s.x + c * kChunk * g.width);
    }
  }

  MVAR_INLINE float* gated_row(int64_t b, int64_t l, float* scratch_row) const {
    return kInPlace ? row<float>(a.y, b, l) : scratch_row;
  }

  // What will be read and written last of this segment and, `tokens` later, read first of the next.
  void prefetch_next(int64_t b, int64_t h, const Chunk& chunk, int64_t tokens) const {
    for (int64_t l = chunk.first; l < chunk.first + chunk.q; ++l) {
      prefetch(row<T>(a.z, b, l) + h * n.P, n.P);
      if (kInPlace) prefetch_for_write(row<T>(a.y, b, l) + h * n.P, n.P);
      if (l + tokens < n.L) prefetch(row<T>(a.xbc, b, l + tokens) + h * n.P, n.P);
    }
  }

  void finish_head(int64_t b, int64_t h, const Segment& segment, const Scratch& s, const Geometry& g, float* gated,
                   float* squares) const {
    with_skip(a.D, h, n, [&](auto D) MVAR_INLINE_LAMBDA {
      with_order(n, [&](auto gate_last) MVAR_INLINE_LAMBDA {
        for (int64_t c = 0; c < segment.count; ++c) {
          for (int64_t i = 0; i < segment.chunks[c].q; ++i) {
            const int64_t l = segment.chunks[c].first + i;
            const float* x = s.x + (c * kChunk + i) * g.width;
            const float* y = s.y + (c * kChunk + i) * g.width;
            const T* z = row<T>(a.z, b, l) + h * n.P;
            float* to = gated_row(b, l, gated + (l - segment.first) * E()) + h * n.P;
            Sum total;
            for_each_vector(n.P, [&](int64_t p, auto lanes, int slot) MVAR_INLINE_LAMBDA {
              Vec value = fma(D.at(p, lanes), load(x + p, lanes), load(y + p, lanes));
              if constexpr (!gate_last) value *= silu(load(z + p, lanes));
              store(to + p, value, lanes);
              total.slot[slot] = fma(value, value, total.slot[slot]);
            });
            squares[(l - segment.first) * n.H + h] = total.total();
          }
        }
      });
    });
  }

  void finish_token(int64_t b, int64_t l, float* gated, const float* squares) const {
    double total = 0;
    for (int64_t h = 0; h < n.H; ++h) total += squares[h];
    const double r = n.norm == Norm::kNone ? 1 : 1 / __builtin_sqrt(total / (double)E() + n.eps);
    const Vec factor = splat((float)r);
    const float* from = gated_row(b, l, gated);
    const T* z = row<T>(a.z, b, l);
    T* to = row<T>(a.y, b, l);
    with_order(n, [&](auto gate_last) MVAR_INLINE_LAMBDA {
      for_each_vector(E(), [&](int64_t e, auto lanes, int) MVAR_INLINE_LAMBDA {
        Vec value = load(from + e, lanes) * factor * load(a.norm_weight + e, lanes);
        if constexpr (gate_last) value *= silu(load(z + e, lanes));
        store(to + e, value, lanes);
      });
    });
  }
};

// The last taps−1 rows of [state, xbc].
template <typename T>
void keep_last_rows(const MixerForward& a, const Sizes& n) {
  for (int64_t b = 0; b < n.B; ++b) {
    for (int64_t i = 0; i < n.taps - 1; ++i) {
      const int64_t l = n.L - (n.taps - 1) + i;
      const T* from = l < 0 ? row<T>(a.conv_state, b, l + n.taps - 1) : row<T>(a.xbc, b, l);
      T* to = row<T>(a.last_conv, b, i);
      for (const ChannelRun& run : channel_runs(n)) {
        __builtin_memcpy(to + run.channel, from + run.channel, run.count * sizeof(T));
      }
    }
  }
}

// A = −exp(A_log) of every direction and head, at the same places.
const float* find_rates(const MixerForward& a, const Sizes& n, Carver& pieces) {
  float* A = pieces.take(n.directions * n.all_heads);
  for (int64_t i = 0; i < n.directions * n.H; ++i) {
    const int64_t head = i / n.H * n.all_heads + i % n.H;
    A[head] = -__builtin_expf(a.A_log[head]);
  }
  return A;
}

template <typename T>
void mixer(const MixerForward& a, const Sizes& n, const Plan& plan, float* workspace) {
  Carver pieces(workspace);
  const float* A = find_rates(a, n, pieces);
  run_forward(MixerForm<T>{a, n, A}, n, plan, pieces.memory + pieces.floats);
  keep_last_rows<T>(a, n);
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
