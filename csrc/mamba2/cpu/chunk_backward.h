// The derivative of chunk.h: one chunk of one head.
//
// With λ the adjoint of the state after the chunk and M the mix of chunk.h, every gradient is a sum of the very
// terms that the forward has, so no decay is divided by and no prefix sums are subtracted. The gradient
// of log a_t gathers what passes over the step from t−1 to t: pairs s < t ≤ i of the mix, what comes
// from the state before the chunk to i ≥ t, what goes from s < t to the state after it, and what goes
// from the one state to the other.
#pragma once

#include "mamba2/cpu/chunk.h"
#include "common/transpose.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// Tokens of x, y and their gradients are at the same steps. The transposes are (N, kChunk), zero beyond q.
struct BackwardView {
  View c;  // y is not used
  const float* dy;
  float* dx;  // added to
  const float *B_transposed, *C_transposed;
  float *dB_transposed, *dC_transposed, *dscores;  // of this head alone; written
  float* ddelta;                                   // kChunk; written
  double* dA;                                      // added to
};

struct ChunkScratch {
  float *mix, *decay, *weighted;
  float *x_transposed, *dy_transposed;  // (width, kChunk)
};

// One vector of kChunk tokens.
struct Line {
  float at[kChunk];
  MVAR_INLINE void add(int v, Vec value) { store(at + v * kWidth, load(at + v * kWidth, All{}) + value, All{}); }
};

// products[n][i] = weights_i Σ_p state[n][p] lines_transposed[p][i]; dots_i += Σ_n products[n][i] factors[n][i]
MVAR_INLINE void state_times_lines(const float* state, const float* lines_transposed, const float* weights,
                                   const float* factors, float* products, Line& dots, int64_t N, int64_t P,
                                   int64_t width) {
  for_each_block(N, kChunk, [&](int64_t n, auto rows, int64_t i, auto cols) MVAR_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value, K = decltype(cols)::value;
    Block<R, K> block{};
    multiply_add(block, state + n * width, width, 1, lines_transposed + i, kChunk, P);
    for (int k = 0; k < K; ++k) {
      const int64_t lane = i + k * kWidth;
      const Vec weight = load(weights + lane, All{});
      Vec dot{};
      for (int r = 0; r < R; ++r) {
        const Vec product = weight * block.sum[r][k];
        store(products + (n + r) * kChunk + lane, product, All{});
        dot = fma(product, load(factors + (n + r) * kChunk + lane, All{}), dot);
      }
      dots.add((int)(lane / kWidth), dot);
    }
  });
}

// From dy_i · x_s, which is the gradient of the mix: that of the scores; of the mix's Δ_s, into `direct`; and
// mix_grads = mix · its gradient. s.mix may be mix_grads: it is not read.
MVAR_INLINE void pair_gradients(const BackwardView& b, const ChunkScratch& s, float* mix_grads, Line& direct,
                                int64_t P) {
  const View& c = b.c;
  for_each_block(c.q, kChunk, [&](int64_t i, auto rows, int64_t col, auto cols) MVAR_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value, K = decltype(cols)::value;
    Block<R, K> block{};
    multiply_add(block, b.dy + i * c.x_step, c.x_step, 1, s.x_transposed + col, kChunk, P);
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < K; ++k) {
        const int64_t lane = col + k * kWidth, at = (i + r) * kChunk + lane;
        const Vec decayed = block.sum[r][k] * load(s.decay + at, All{});
        const Vec delta = load(c.delta + lane, All{});
        store(b.dscores + at, decayed * delta, All{});
        const Vec scored = decayed * load(c.scores + at, All{});
        direct.add((int)(lane / kWidth), scored);
        store(mix_grads + at, scored * delta, All{});
      }
    }
  });
}

// dx_s += weights_s · λ B_s + Σ_{i≥s} mix[i][s] dy_i; `adjoint` is null where it is zero.
MVAR_INLINE void add_dx(const BackwardView& b, const float* mix, const float* weights, const float* adjoint,
                        int64_t N, int64_t width) {
  const View& c = b.c;
  for_each_block(c.q, width, [&](int64_t t, auto rows, int64_t p, auto cols) MVAR_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value, K = decltype(cols)::value;
    Block<R, K> block{};
    if (adjoint) {
      multiply_add(block, c.B + t * c.bc_step, c.bc_step, 1, adjoint + p, width, N);
      for (int r = 0; r < R; ++r) {
        for (int k = 0; k < K; ++k) block.sum[r][k] *= broadcast(weights + t + r);
      }
    }
    multiply_add(block, mix + t * kChunk + t, 1, kChunk, b.dy + t * c.x_step + p, c.x_step, c.q - t);
    for (int r = 0; r < R; ++r) {
      float* dx = b.dx + (t + r) * c.x_step + p;
      for (int k = 0; k < K; ++k) {
        store(dx + k * kWidth, block.sum[r][k] + load(dx + k * kWidth, All{}), All{});
      }
    }
  });
}

MVAR_INLINE float dot(const float* a, const float* b, int64_t count) {
  Sum total;
  for_each_vector(count, [&](int64_t i, auto lanes, int slot) MVAR_INLINE_LAMBDA {
    total.slot[slot] = fma(load(a + i, lanes), load(b + i, lanes), total.slot[slot]);
  });
  return total.total();
}

// Gradients of log a_t: `entering` per token from the state before, `leaving` per token to the state after,
// `through` from the one to the other.
MVAR_INLINE void decay_gradients(const float* mix_grads, const Line& entering, const Line& leaving, float through,
                                 int64_t q, Line& out) {
  Vec passing[kChunkVecs];
  for (int v = 0; v < kChunkVecs; ++v) passing[v] = load(leaving.at + v * kWidth, All{});
  float entered = through;
  for (int64_t t = q - 1; t >= 0; --t) {
    Vec before_t{};
    for (int v = 0; v < kChunkVecs; ++v) {
      passing[v] += load(mix_grads + t * kChunk + v * kWidth, All{});
      const VecBits is_before = (VecBits)(lane_indices(v) < (float)t);
      before_t += (Vec)((VecBits)passing[v] & is_before);
    }
    entered += entering.at[t];
    out.at[t] = entered + sum(before_t);
  }
}

// `before`: the state before the chunk; `adjoint`: of the state after it. Either is null where it is zero.
// next_adjoint: of the state before, may be `adjoint`; null if not needed.
void chunk_backward(const BackwardView& b, const float* before, const float* adjoint, float* next_adjoint,
                    const ChunkScratch& s, int64_t N, int64_t N_padded, int64_t P, int64_t width) {
  const View& c = b.c;
  Decays decays;
  find_decays(c.delta, c.A, decays);
  for_each_decay(decays, c.q, c.own, [&](int64_t t, int v, Vec decay) MVAR_INLINE_LAMBDA {
    const int64_t at = t * kChunk + v * kWidth;
    store(s.decay + at, decay, All{});
    store(s.mix + at, load(c.scores + at, All{}) * decay * load(c.delta + v * kWidth, All{}), All{});
  });
  float weights[kChunk];
  for (int i = 0; i < kChunk; ++i) weights[i] = decays.until_end[i] * c.delta[i];

  transpose_padded(c.x, c.x_step, c.q, width, s.x_transposed, kChunk);
  transpose_padded(b.dy, c.x_step, c.q, width, s.dy_transposed, kChunk);
  add_dx(b, s.mix, weights, adjoint, N, width);

  Line direct{}, entering{}, leaving{}, log_a{};
  pair_gradients(b, s, s.mix, direct, P);
  if (before) {
    state_times_lines(before, s.dy_transposed, decays.since_start, b.C_transposed, b.dC_transposed, entering, N, P,
                      width);
  } else {
    __builtin_memset(b.dC_transposed, 0, N * kChunk * sizeof(float));
  }
  if (adjoint) {
    // Without Δ: what `direct` needs as it is, and `leaving` and dB with Δ on top.
    state_times_lines(adjoint, s.x_transposed, decays.until_end, b.B_transposed, b.dB_transposed, leaving, N, P,
                      width);
    for (int v = 0; v < kChunkVecs; ++v) {
      const Vec delta = load(c.delta + v * kWidth, All{});
      direct.add(v, load(leaving.at + v * kWidth, All{}));
      store(leaving.at + v * kWidth, load(leaving.at + v * kWidth, All{}) * delta, All{});
      for (int64_t n = 0; n < N; ++n) {
        float* dB = b.dB_transposed + n * kChunk + v * kWidth;
        store(dB, load(dB, All{}) * delta, All{});
      }
    }
  } else {
    __builtin_memset(b.dB_transposed, 0, N * kChunk * sizeof(float));
  }
  const float through = before && adjoint ? decays.chunk_decay() * dot(before, adjoint, N * width) : 0.0f;
  decay_gradients(s.mix, entering, leaving, through, c.q, log_a);

  for (int i = 0; i < kChunk; ++i) {
    b.ddelta[i] = direct.at[i] + c.A * log_a.at[i];
    *b.dA += (double)c.delta[i] * log_a.at[i];
  }
  if (!next_adjoint) return;
  weigh(decays.since_start, c.C, c.bc_step, c.q, s.weighted, N_padded);
  add_outer_products(decays, adjoint, s.weighted, b.dy, c.x_step, c.q, next_adjoint, N, N_padded, width);
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
