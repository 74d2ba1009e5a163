// The layout of the workspace.
#pragma once

#include "mamba2/cpu/chunk.h"
#include "common/threads.h"
#include "common/transpose.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

using mamba2::States;

// The heads are synchronized, for the RMSNorm or for sums over them, after at least this many tokens: rarely, since all
// threads wait for the last one, and while the outputs of the heads are still in the last-level cache.
constexpr int64_t kStageTokens = 256;

// Below this many numbers of state passed through, starting the threads costs more than they save.
constexpr int64_t kParallelWork = 1 << 16;

MVAR_INLINE bool worth_threads(const Sizes& n) { return n.B * n.L * n.H * n.P * n.N > kParallelWork; }

// Lines are padded to whole vectors and chunks to kChunk lines, so that no loop over them has a tail.
struct Geometry {
  int64_t width;      // of a line of x or y of one head: P, padded
  int64_t N_padded;   // of a line of B or C
  int64_t state;      // floats of one head's state: twice (N, P), see add_outer_products
  int64_t shared;     // floats of what the heads share of a chunk
  int64_t transposed; // floats of the transposes of B or of C of a chunk, for the backward
  int64_t slots;      // lines of a segment
  int64_t stage;      // segments that a head computes before all heads are synchronized
  bool alone;         // each thread is a Team
  int64_t teams;
  int64_t members;    // threads of a team
  int64_t samples;    // of a team: enough to keep its threads busy, and no more scratch than that

  Geometry(const Sizes& n, const Plan& plan, bool backward) {
    width = round_up(n.P, kWidth);
    N_padded = round_up(n.N, kWidth);
    state = 2 * n.N * width;
    transposed = backward ? n.directions * n.N * kChunk : 0;
    shared = 2 * kChunk * N_padded + n.directions * (kChunk * kChunk + n.H * kChunk) + 2 * transposed;
    slots = plan.longest_segment * kChunk;
    stage = kStageTokens > slots ? kStageTokens / slots : 1;
    const int64_t all = worth_threads(n) ? threads() : 1;
    const int64_t tasks = 4 * all > 64 ? 4 * all : 64;
    const int64_t wanted = (tasks + n.H - 1) / n.H;
    alone = all <= wanted && 8 * n.B >= 7 * round_up(n.B, all);
    teams = alone ? all : 1;
    members = alone ? 1 : all;
    samples = alone ? 1 : wanted < n.B ? wanted : n.B;
  }
};

// Of one chunk of one sample, what all heads read: B and C as lines per token, their products, and Δ as a
// line per head; for the backward, B and C transposed, too. The second direction sees all but the lines of B
// and C with the chunk's tokens reversed.
struct Shared {
  float *B, *C, *scores, *delta, *B_transposed, *C_transposed;

  Shared(float* data, const Sizes& n, const Geometry& g) {
    B = data;
    C = B + kChunk * g.N_padded;
    scores = C + kChunk * g.N_padded;
    delta = scores + n.directions * kChunk * kChunk;
    B_transposed = delta + n.directions * n.H * kChunk;
    C_transposed = B_transposed + g.transposed;
  }
};

// A row of one head is a few cache lines of a row of all heads, too short for the hardware to prefetch the
// next.
template <typename T>
MVAR_INLINE void prefetch(const T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row + i);
}

template <typename T>
MVAR_INLINE void prefetch_for_write(T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row + i, 1);
}

MVAR_INLINE View view_of(const Shared& shared, const Chunk& chunk, int64_t direction, int64_t h, const float* A,
                         const Sizes& n, const Geometry& g, const float* x, float* y) {
  const int64_t back = direction ? chunk.q - 1 : 0;
  const int64_t sign = direction ? -1 : 1;
  const int64_t head = direction * n.H + h;
  return {chunk.q,
          x + back * g.width,
          y + back * g.width,
          sign * g.width,
          shared.B + back * g.N_padded,
          shared.C + back * g.N_padded,
          sign * g.N_padded,
          shared.scores + direction * kChunk * kChunk,
          shared.delta + head * kChunk,
          finite_rate(A[direction * n.all_heads + h]),
          direction == 0};
}

// scores[t][s] = C_t · B_s, from lines already there; for the second direction both indices are reversed.
// `transposed`: N·kChunk floats of scratch.
void find_scores(const Shared& shared, const Chunk& chunk, const Sizes& n, const Geometry& g, float* transposed) {
  transpose_padded(shared.B, g.N_padded, kChunk, n.N, transposed, kChunk);
  for_each_block(chunk.q, kChunk, [&](int64_t t, auto rows, int64_t s, auto cols) MVAR_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value, K = decltype(cols)::value;
    Block<R, K> block{};
    multiply_add(block, shared.C + t * g.N_padded, g.N_padded, 1, transposed + s, kChunk, n.N);
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < K; ++k) {
        store(shared.scores + (t + r) * kChunk + s + k * kWidth, block.sum[r][k], All{});
      }
    }
  });
  if (n.directions == 1) return;
  float* reversed = shared.scores + kChunk * kChunk;
  const int64_t last = chunk.q - 1;
  for (int64_t t = 0; t <= last; ++t) {
    for (int64_t s = 0; s <= last; ++s) {
      reversed[t * kChunk + s] = shared.scores[(last - t) * kChunk + last - s];
    }
  }
}

void transpose_shared(const Shared& shared, const Chunk& chunk, const Sizes& n, const Geometry& g) {
  for (int64_t d = 0; d < n.directions; ++d) {
    const int64_t back = d ? (chunk.q - 1) * g.N_padded : 0, step = d ? -g.N_padded : g.N_padded;
    const int64_t to = d * n.N * kChunk;
    transpose_padded(shared.B + back, step, chunk.q, n.N, shared.B_transposed + to, kChunk);
    transpose_padded(shared.C + back, step, chunk.q, n.N, shared.C_transposed + to, kChunk);
  }
}

// Δ of token i of the chunk, of a vector of heads from h on.
MVAR_INLINE void store_delta(const Shared& shared, const Chunk& chunk, int64_t direction, int64_t h, int64_t i,
                             Vec delta, const Sizes& n) {
  const int64_t slot = direction ? chunk.q - 1 - i : i;
  for (int64_t j = 0; j < kWidth && h + j < n.H; ++j) {
    shared.delta[(direction * n.H + h + j) * kChunk + slot] = delta[j];
  }
}

// D of a head's channels. kOfChannels: each has its own.
struct HeadSkip {
  static constexpr bool kOfChannels = false;
  Vec D;
  template <typename Lanes>
  MVAR_INLINE Vec at(int64_t, Lanes) const { return D; }
};

struct ChannelSkip {
  static constexpr bool kOfChannels = true;
  const float* D;
  template <typename Lanes>
  MVAR_INLINE Vec at(int64_t p, Lanes lanes) const { return load(D + p, lanes); }
};

// body(skip) for head h
template <typename Body>
MVAR_INLINE void with_skip(const float* D, int64_t h, const Sizes& n, Body body) {
  if (n.channel_D) {
    body(ChannelSkip{D + h * n.P});
  } else {
    body(HeadSkip{splat(D[h])});
  }
}

// The gradient of a head's D from a few tokens. line: scratch for a line of channels.
template <typename Skip>
struct SkipSum {
  float* line;
  Sum total;

  SkipSum(float* line, int64_t width) : line(line) {
    if (Skip::kOfChannels) __builtin_memset(line, 0, width * sizeof(float));
  }

  MVAR_INLINE void add(int64_t p, int slot, Vec dy, Vec x) {
    if constexpr (Skip::kOfChannels) {
      store(line + p, fma(dy, x, load(line + p, All{})), All{});
    } else {
      total.slot[slot] = fma(dy, x, total.slot[slot]);
    }
  }

  MVAR_INLINE void add_to(double* sums, int64_t P) const {
    if constexpr (Skip::kOfChannels) {
      for (int64_t p = 0; p < P; ++p) sums[p] += line[p];
    } else {
      *sums += total.total();
    }
  }
};

MVAR_INLINE const float* state_of(const States& s, int64_t b, int64_t h) {
  return s.data + b * s.batch_stride + h * s.head_stride;
}

// States lie as (P, N) outside and as (N, P) here; nothing is rounded off them yet.
void load_state(const States& from, int64_t b, int64_t h, const Sizes& n, const Geometry& g, float* state) {
  __builtin_memset(state, 0, g.state * sizeof(float));
  transpose(state_of(from, b, h), from.row_stride, n.P, n.N, state, g.width);
}

void store_state(const States& to, int64_t b, int64_t h, const Sizes& n, const Geometry& g, const float* state) {
  transpose(state, g.width, n.N, n.P, (float*)state_of(to, b, h), to.row_stride);
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
