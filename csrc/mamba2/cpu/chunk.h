// The scan over one chunk of one head, as matmuls.
//
// Token by token the state (P×N, 16 KB) is passed through once per token: three vector operations for
// each of its vectors. Over a chunk of q tokens the same sums are two matmuls with the state,
// C hᵀ and the update Σ_s w_s x_s ⊗ B_s, and one of q×q, (C Bᵀ ∘ decay) x: (2 + 1/q + q/2N) operations
// for each vector and token, and the state is loaded twice per chunk. That is least for q = √(2N), 11 for
// N = 64; 16 is within 1 % of it and fills the vectors that run along tokens.
//
// Vectors run along P: x and y lie as they come, C and B are read as scalars, and nothing is summed across
// lanes. The state therefore lies transposed, (N, P). Decays are exponentials of sums over the very tokens that
// they span: never quotients, which would underflow, nor differences of prefix sums, which would cancel.
//
// The backward direction is the same scan over reversed tokens: negative steps, own terms left out.
//
// A state that decays slowly is a sum over thousands of tokens, and would be rounded once for each chunk: by 4,096
// equal tokens the error was 1.7e-5 without compensation. The rounding error is therefore kept in a second (N, P) and
// added with the next chunk (Kahan summation). Where a chunk leaves less than e^−⅛ of the state, errors decay as fast,
// and the second half is zero.
#pragma once

#include "common/exp.h"
#include "mamba2/mamba2.h"
#include "mamba2/cpu/matmul.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

using mamba2::Chunk;
using mamba2::kChunk;
using mamba2::Plan;
using mamba2::Sizes;

constexpr int kChunkVecs = kChunk / kWidth;
constexpr double kSlowDecay = -0.125;  // the least sum of logs of a chunk for which a state's roundings are kept

// A = −exp(A_log) may be −∞, and 0·∞ would be NaN at the tokens that fill up a chunk, whose Δ is 0.
MVAR_INLINE float finite_rate(float A) { return A < -__FLT_MAX__ ? -__FLT_MAX__ : A; }

MVAR_INLINE Vec lane_indices(int vec) {
  Vec lanes{};
  for (int i = 0; i < (int)kWidth; ++i) lanes[i] = (float)(vec * kWidth + i);
  return lanes;
}

// A chunk of one head as one direction sees it: token i of the direction is at i steps. Lines have
// padded widths: rows of x and y P's, of B and C N's. scores[i][s] = C_i · B_s. delta has kChunk
// numbers, zero beyond q.
struct View {
  int64_t q;
  const float* x;
  float* y;
  int64_t x_step;
  const float *B, *C;
  int64_t bc_step;
  const float *scores, *delta;
  float A;
  bool own;  // whether y_t has the term of token t itself
};

// Products of decays a_t = exp(Δ_t A), over kChunk tokens, of which those beyond q have Δ = 0.
struct Decays {
  float logs[kChunk];         // of a_t
  float since_start[kChunk];  // a_0 … a_t
  float until_end[kChunk];    // a_{t+1} … a_{q−1}
  float lost;                 // chunk_decay() − 1, to float32's precision of itself where slow
  bool slow;
  MVAR_INLINE float chunk_decay() const { return since_start[kChunk - 1]; }
};

MVAR_INLINE void exp_of_chunk(const float* from, float* to) {
  for (int v = 0; v < kChunkVecs; ++v) store(to + v * kWidth, exp(load(from + v * kWidth, All{})), All{});
}

// Exponentials of sums, not products of exponentials: a decay near 1 is rounded once and not once per token.
MVAR_INLINE void find_decays(const float* delta, float A, Decays& out) {
  float since[kChunk], until[kChunk];
  for (int i = 0; i < kChunk; ++i) out.logs[i] = delta[i] * A;
  double sum = 0;
  for (int i = 0; i < kChunk; ++i) since[i] = (float)(sum += out.logs[i]);
  out.slow = sum > kSlowDecay;
  // exp(sum) − 1: the terms left out are below 2⁻⁵⁰ of it.
  out.lost = (float)(sum * (1 + sum / 2 * (1 + sum / 3 * (1 + sum / 4 * (1 + sum / 5 * (1 + sum / 6 * (1 + sum / 7)))))));
  sum = 0;
  for (int i = kChunk - 1; i >= 0; --i) {
    until[i] = (float)sum;
    sum += out.logs[i];
  }
  exp_of_chunk(since, out.since_start);
  exp_of_chunk(until, out.until_end);
}

// body(t, v, decay) for each token t and vector v of tokens s: decay = a_{s+1} … a_t for s < t and 0 for
// s > t; for s = t 1, or 0 where own terms are left out.
template <typename Body>
MVAR_INLINE void for_each_decay(const Decays& decays, int64_t q, bool own, Body body) {
  for (int v = 0; v < kChunkVecs; ++v) {
    const Vec lanes = lane_indices(v);
    Vec sums = splat(-__builtin_inff());
    for (int64_t t = 0; t < q; ++t) {
      sums += broadcast(decays.logs + t);
      const Vec before = exp(sums);
      const Vec t_everywhere = splat((float)t);
      body(t, v, own ? (lanes == t_everywhere ? splat(1.0f) : before) : before);
      sums = lanes == t_everywhere ? Vec{} : sums;
    }
  }
}

// mix[t][s] = scores[t][s] · decay · Δ_s for t < q
MVAR_INLINE void find_mix(const View& c, const Decays& decays, float* mix) {
  for_each_decay(decays, c.q, c.own, [&](int64_t t, int v, Vec decay) MVAR_INLINE_LAMBDA {
    const int64_t at = t * kChunk + v * kWidth;
    store(mix + at, load(c.scores + at, All{}) * decay * load(c.delta + v * kWidth, All{}), All{});
  });
}

// y_t (+)= since_start_t · h C_t + Σ_s mix[t][s] x_s. `state` is null where it is zero.
template <bool add>
MVAR_INLINE void chunk_outputs(const View& c, const Decays& decays, const float* mix, const float* state, int64_t N,
                               int64_t width) {
  for_each_block(c.q, width, [&](int64_t t, auto rows, int64_t p, auto cols) MVAR_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value, K = decltype(cols)::value;
    Block<R, K> block{};
    if (state) {
      multiply_add(block, c.C + t * c.bc_step, c.bc_step, 1, state + p, width, N);
      for (int r = 0; r < R; ++r) {
        for (int k = 0; k < K; ++k) block.sum[r][k] *= broadcast(decays.since_start + t + r);
      }
    }
    multiply_add(block, mix + t * kChunk, kChunk, 1, c.x + p, c.x_step, t + R);
    for (int r = 0; r < R; ++r) {
      float* y = c.y + (t + r) * c.x_step + p;
      for (int k = 0; k < K; ++k) {
        Vec value = block.sum[r][k];
        if (add) value += load(y + k * kWidth, All{});
        store(y + k * kWidth, value, All{});
      }
    }
  });
}

// weighted[i] = weights_i · lines_i, for q lines of N
MVAR_INLINE void weigh(const float* weights, const float* lines, int64_t step, int64_t q, float* weighted,
                       int64_t N_padded) {
  for (int64_t i = 0; i < q; ++i) {
    const Vec weight = broadcast(weights + i);
    for (int64_t j = 0; j < N_padded; j += kWidth) {
      store(weighted + i * N_padded + j, weight * load(lines + i * step + j, All{}), All{});
    }
  }
}

// to = chunk_decay · from + Σ_i weighted_i ⊗ lines_i, over q lines of P; `from` is null where it is zero. Both are two
// matrices (N, P), of which the second is what rounding took off the first.
MVAR_INLINE void add_outer_products(const Decays& decays, const float* from, const float* weighted,
                                    const float* lines, int64_t step, int64_t q, float* to, int64_t N,
                                    int64_t N_padded, int64_t width) {
  const int64_t off = N * width;
  const Vec chunk_decay = splat(decays.chunk_decay()), lost = splat(decays.lost);
  for_each_block(N, width, [&](int64_t n, auto rows, int64_t p, auto cols) MVAR_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value, K = decltype(cols)::value;
    Block<R, K> block{};
    multiply_add(block, weighted + n, 1, N_padded, lines + p, step, q);
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < K; ++k) {
        const int64_t at = (n + r) * width + p + k * kWidth;
        Vec value = block.sum[r][k], rounded_off{};
        if (from) {
          const Vec before = load(from + at, All{});
          if (decays.slow) {
            const Vec change = fma(lost, before, fma(chunk_decay, load(from + off + at, All{}), value));
            value = before + change;
            rounded_off = change - (value - before);
          } else {
            value = fma(chunk_decay, before, value);
          }
        }
        store(to + at, value, All{});
        store(to + off + at, rounded_off, All{});
      }
    }
  });
}

// The state after the chunk from the state before it, null where that is zero.
MVAR_INLINE void advance_state(const View& c, const Decays& decays, const float* from, float* to, float* weighted,
                               int64_t N, int64_t N_padded, int64_t width) {
  float weights[kChunk];
  for (int i = 0; i < kChunk; ++i) weights[i] = decays.until_end[i] * c.delta[i];
  weigh(weights, c.B, c.bc_step, c.q, weighted, N_padded);
  add_outer_products(decays, from, weighted, c.x, c.x_step, c.q, to, N, N_padded, width);
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
