// The order of work of a backward pass: once forward, keeping every head's state at the start of each segment;
// then segment by segment from the last, all heads, each computing the states inside the segment again. What
// the heads add to one sum (the gradients of B and C, and of the parameters) lies apart for each and is summed
// in a fixed order.
#pragma once

#include "mamba2/cpu/chunk_backward.h"
#include "mamba2/cpu/forward.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// The gradients that one head has for B, C and the scores of a chunk, in both directions.
struct Partial {
  float *dB, *dC, *dscores;
  Partial(float* data, int64_t direction, const Sizes& n) {
    dB = data + direction * floats_of_direction(n);
    dC = dB + n.N * kChunk;
    dscores = dC + n.N * kChunk;
  }
  static int64_t floats_of_direction(const Sizes& n) { return 2 * n.N * kChunk + kChunk * kChunk; }
  static int64_t floats(const Sizes& n) { return n.directions * floats_of_direction(n); }
};

struct BackwardScratch {
  Scratch forward;  // its y holds dy
  float *dx, *slopes;                  // lines of a segment; slopes for the form
  float *states, *reverse_states;      // before each chunk of the segment, as each direction sees it
  float* reverse_adjoint;
  ChunkScratch chunk;
  float *partial, *dB, *dC, *lines;    // of a chunk, summed over the heads

  BackwardScratch(Carver& pieces, const Sizes& n, const Geometry& g) : forward(pieces, n, g) {
    const bool both = n.directions == 2;
    dx = pieces.take(g.slots * g.width);
    slopes = pieces.take(g.slots * g.width);
    states = pieces.take(g.slots / kChunk * g.state);
    reverse_states = pieces.take(both ? g.slots / kChunk * g.state : 0);
    reverse_adjoint = pieces.take(both ? g.state : 0);
    chunk.mix = forward.mix;
    chunk.weighted = forward.weighted;
    chunk.decay = pieces.take(kChunk * kChunk);
    chunk.x_transposed = pieces.take(g.width * kChunk);
    chunk.dy_transposed = pieces.take(g.width * kChunk);
    partial = pieces.take(Partial::floats(n));
    dB = pieces.take(kChunk * g.N_padded);
    dC = pieces.take(kChunk * g.N_padded);
    lines = pieces.take(kChunk * g.N_padded);
  }
};

// Sums over all tokens, one for each sample.
struct SampleSums {
  double *dA, *dD, *ddt_bias;      // (B, directions·H), (B, H) or (B, H, P), (B, directions·H)
  float *dnorm_weight;             // (B, E)
  float *dconv;                    // (B, E+2N, taps+1): the taps' and the bias's

  SampleSums(Carver& pieces, const Sizes& n) {
    const int64_t E = n.H * n.P;
    dA = (double*)pieces.take(2 * n.B * n.directions * n.H);
    dD = (double*)pieces.take(2 * n.B * n.H * n.D_width());
    ddt_bias = (double*)pieces.take(2 * n.B * n.directions * n.H);
    dnorm_weight = pieces.take(n.B * E);
    dconv = pieces.take(n.B * (E + 2 * n.N) * (n.taps + 1));
  }
};

// What a team needs, and the sums of all.
struct BackwardSpace {
  float *shared, *saved, *adjoints, *partials;
  float *squares, *products, *factors;  // for the form: per token and head, twice, and two per token
  const SampleSums& sums;
  float* scratch;
  int64_t scratch_floats;

  BackwardSpace(Carver& pieces, const Sizes& n, const Plan& plan, const Geometry& g, const SampleSums& sums)
      : sums(sums) {
    shared = pieces.take(g.samples * plan.chunk_count() * g.shared);
    saved = pieces.take(plan.segment_count * g.samples * n.H * g.state);
    adjoints = pieces.take(g.samples * n.H * g.state);
    partials = pieces.take(g.samples * plan.longest_segment * n.H * Partial::floats(n));
    squares = pieces.take(g.samples * n.L * n.H);
    products = pieces.take(g.samples * n.L * n.H);
    factors = pieces.take(g.samples * n.L * 2);
    Carver counter(nullptr);
    BackwardScratch(counter, n, g);
    scratch_floats = counter.needed();
    scratch = pieces.take(g.members * scratch_floats);
  }
};

int64_t floats_of_backward_team(const Sizes& n, const Plan& plan, const Geometry& g, const SampleSums& sums) {
  Carver counter(nullptr);
  BackwardSpace(counter, n, plan, g, sums);
  return counter.needed();
}

int64_t backward_workspace(const Sizes& n, const Plan& plan) {
  const Geometry g(n, plan, true);
  Carver counter(nullptr);
  counter.take(n.directions * n.all_heads);  // A of a mixer
  const SampleSums sums(counter, n);
  counter.take(g.teams * floats_of_backward_team(n, plan, g, sums));
  return counter.needed();
}

// One head of one segment in one direction: what is the same for all its chunks.
struct HeadSegment {
  const Segment& segment;
  float* shared;    // of its first chunk
  float* partials;  // of its first chunk
  int64_t h;
  const float* A;
  double* dA;
  const BackwardScratch& s;
  const Sizes& n;
  const Geometry& g;

  MVAR_INLINE Shared shared_of(int64_t i) const { return Shared(shared + i * g.shared, n, g); }

  MVAR_INLINE View view(int64_t i, int64_t direction) const {
    float* x = s.forward.x + i * kChunk * g.width;
    return view_of(shared_of(i), segment.chunks[i], direction, h, A, n, g, x, x);
  }

  void advance(int64_t i, int64_t direction, const float* from, float* to) const {
    const View c = view(i, direction);
    Decays decays;
    find_decays(c.delta, c.A, decays);
    advance_state(c, decays, from, to, s.chunk.weighted, n.N, g.N_padded, g.width);
  }

  void derive(int64_t i, int64_t direction, const float* before, const float* adjoint, float* next_adjoint,
              float* ddelta) const {
    const Shared of_chunk = shared_of(i);
    const Partial partial(partials + i * n.H * Partial::floats(n), direction, n);
    const int64_t at = (i * kChunk + (direction ? segment.chunks[i].q - 1 : 0)) * g.width;
    const int64_t transposed = direction * n.N * kChunk;
    const BackwardView view_here{view(i, direction),
                                 s.forward.y + at,
                                 s.dx + at,
                                 of_chunk.B_transposed + transposed,
                                 of_chunk.C_transposed + transposed,
                                 partial.dB,
                                 partial.dC,
                                 partial.dscores,
                                 ddelta,
                                 dA + direction * n.H};
    chunk_backward(view_here, before, adjoint, next_adjoint, s.chunk, n.N, g.N_padded, n.P, g.width);
  }
};

// From x and dy in scratch: dx, the partial sums and, through `take_delta(direction, chunk, ddelta)`, dΔ.
template <typename TakeDelta>
void derive_segment(const HeadSegment& head, const float* start, float* adjoint, TakeDelta take_delta) {
  const Chunk* chunks = head.segment.chunks;
  const int64_t count = head.segment.count, state = head.g.state;
  float* states = head.s.states;
  float ddelta[kChunk];
  for (int64_t i = 0; i + 1 < count; ++i) {
    head.advance(i, 0, i ? states + i * state : start, states + (i + 1) * state);
  }
  for (int64_t i = count - 1; i >= 0; --i) {
    head.derive(i, 0, i ? states + i * state : start, adjoint, adjoint, ddelta);
    take_delta(0, chunks[i], ddelta);
  }
  if (head.n.directions == 1) return;
  float* reverse = head.s.reverse_states;
  for (int64_t i = count - 1; i > 0; --i) {
    if (chunks[i].starts_scale) continue;
    head.advance(i, 1, chunks[i].ends_scale ? nullptr : reverse + i * state, reverse + (i - 1) * state);
  }
  float* reverse_adjoint = head.s.reverse_adjoint;
  for (int64_t i = 0; i < count; ++i) {
    head.derive(i, 1, chunks[i].ends_scale ? nullptr : reverse + i * state,
                chunks[i].starts_scale ? nullptr : reverse_adjoint, chunks[i].ends_scale ? nullptr : reverse_adjoint,
                ddelta);
    take_delta(1, chunks[i], ddelta);
  }
}

// out_i += the column i of `transposed` + Σ_j dscores[i][j] lines_j; with `across` dscores[j][i] in its place.
MVAR_INLINE void add_lines(const float* transposed, const float* dscores, bool across, const float* lines, int64_t q,
                           int64_t step, float* scratch, float* out, const Sizes& n, const Geometry& g) {
  transpose_padded(transposed, kChunk, n.N, q, scratch, g.N_padded);
  for_each_block(q, g.N_padded, [&](int64_t i, auto rows, int64_t col, auto cols) MVAR_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value, K = decltype(cols)::value;
    Block<R, K> block{};
    if (across) {
      multiply_add(block, dscores + i, 1, kChunk, lines + col, step, q);
    } else {
      multiply_add(block, dscores + i * kChunk, kChunk, 1, lines + col, step, q);
    }
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < K; ++k) {
        const int64_t column = col + k * kWidth;
        float* to = out + (i + r) * step + column;
        const Vec direct = load(scratch + (i + r) * g.N_padded + column, All{});
        store(to, block.sum[r][k] + direct + load(to, All{}), All{});
      }
    }
  });
}

// Lines dB and dC of a chunk: the sum over the heads, and what comes through the scores.
void sum_heads(const Shared& shared, const Chunk& chunk, const float* partials, const BackwardScratch& s,
               const Sizes& n, const Geometry& g) {
  const int64_t floats = Partial::floats(n);
  for_each_vector(floats, [&](int64_t j, auto lanes, int) MVAR_INLINE_LAMBDA {
    Vec total{};
    for (int64_t h = 0; h < n.H; ++h) total += load(partials + h * floats + j, lanes);
    store(s.partial + j, total, lanes);
  });
  __builtin_memset(s.dB, 0, kChunk * g.N_padded * sizeof(float));
  __builtin_memset(s.dC, 0, kChunk * g.N_padded * sizeof(float));
  for (int64_t d = 0; d < n.directions; ++d) {
    const Partial sum(s.partial, d, n);
    const int64_t back = d ? (chunk.q - 1) * g.N_padded : 0, step = d ? -g.N_padded : g.N_padded;
    add_lines(sum.dB, sum.dscores, true, shared.C + back, chunk.q, step, s.lines, s.dB + back, n, g);
    add_lines(sum.dC, sum.dscores, false, shared.B + back, chunk.q, step, s.lines, s.dC + back, n, g);
  }
}

MVAR_INLINE float sum_samples(const double* sums, int64_t i, int64_t count, int64_t B) {
  double total = 0;
  for (int64_t b = 0; b < B; ++b) total += sums[b * count + i];
  return (float)total;
}

// make_form(space): see ScanBackwardForm and MixerBackwardForm.
template <typename MakeForm>
void run_backward(const Sizes& n, const Plan& plan, Carver& pieces, MakeForm make_form) {
  const Geometry g(n, plan, true);
  const int64_t chunks = plan.chunk_count(), before = pieces.floats;
  const SampleSums sums(pieces, n);
  __builtin_memset(sums.dA, 0, (pieces.floats - before) * sizeof(float));
  const int64_t floats = floats_of_backward_team(n, plan, g, sums);
  float* workspace = pieces.take(g.teams * floats);
  int64_t begun = 0;
#pragma omp parallel if (worth_threads(n))
  {
    const Team team(g, n, &begun);
    Carver of_team(workspace + team.index() * floats);
    const BackwardSpace space(of_team, n, plan, g, sums);
    const auto form = make_form(space);
    constexpr bool needs_outputs = decltype(form)::kNeedsOutputs;
    Carver own(space.scratch + team.member() * space.scratch_floats);
    const BackwardScratch scratch(own, n, g);
    team.for_each_group([&](int64_t b0, int64_t samples) {
      team.share(samples * chunks, [&](int64_t i) {
        const Chunk& chunk = plan.chunks[i % chunks];
        const Shared shared(space.shared + i * g.shared, n, g);
        __builtin_memset(shared.B, 0, g.shared * sizeof(float));
        form.fill_shared(b0 + i / chunks, chunk, shared, scratch, g);
        find_scores(shared, chunk, n, g, scratch.forward.rows);
        transpose_shared(shared, chunk, n, g);
      });
      team.share(samples * n.H, [&](int64_t i) {
        const int64_t b = b0 + i / n.H, h = i % n.H;
        float* shared = space.shared + i / n.H * chunks * g.shared;
        load_state(form.initial(), b, h, n, g, space.saved + i * g.state);
        for (int64_t k = 0; k + !needs_outputs < plan.segment_count; ++k) {
          const Segment segment(plan, k);
          const bool last = k + 1 == plan.segment_count;
          const float* from = space.saved + (k * samples * n.H + i) * g.state;
          float* state = last ? scratch.states : space.saved + ((k + 1) * samples * n.H + i) * g.state;
          form.fill_x(b, h, segment, scratch, g);
          float* of_segment = shared + segment.first_chunk * g.shared;
          if constexpr (needs_outputs) {
            scan_segment(segment, of_segment, h, form.A(), from, state, !last, scratch.forward, n, g,
                         [](const Chunk&) {});
            form.keep_outputs(b, h, segment, scratch, g, i / n.H);
          } else {
            const HeadSegment head{segment, of_segment, nullptr, h, form.A(), nullptr, scratch, n, g};
            for (int64_t c = 0; c < segment.count; ++c) head.advance(c, 0, c ? state : from, state);
          }
        }
      });
      if constexpr (needs_outputs) {
        team.share_evenly(samples * n.L, [&](int64_t i) { form.find_factors(i); });
        team.wait();
      }
      for (int64_t k = plan.segment_count - 1; k >= 0; --k) {
        const Segment segment(plan, k);
        const int64_t partial = Partial::floats(n);
        team.share(samples * n.H, [&](int64_t i) {
          const int64_t b = b0 + i / n.H, h = i % n.H;
          float* shared = space.shared + (i / n.H * chunks + segment.first_chunk) * g.shared;
          float* partials = space.partials + (i / n.H * plan.longest_segment * n.H + h) * partial;
          float* adjoint = space.adjoints + i * g.state;
          double* dA = sums.dA + b * n.directions * n.H + h;
          if (k + 1 == plan.segment_count) load_state(form.grad_last(), b, h, n, g, adjoint);
          form.fill_x_again(b, h, segment, scratch, g);
          form.fill_dy(b, h, segment, scratch, g, i / n.H);
          const HeadSegment head{segment, shared, partials, h, form.A(), dA, scratch, n, g};
          derive_segment(head, space.saved + (k * samples * n.H + i) * g.state, adjoint,
                         [&](int64_t direction, const Chunk& chunk, const float* ddelta) {
                           form.take_delta(b, h, direction, chunk, ddelta);
                         });
          form.finish_head(b, h, segment, scratch, g);
          if (k == 0) store_state(form.dinitial(), b, h, n, g, adjoint);
        });
        team.share(samples * segment.count, [&](int64_t i) {
          const int64_t b = i / segment.count, c = i % segment.count;
          const Shared shared(space.shared + (b * chunks + segment.first_chunk + c) * g.shared, n, g);
          const float* partials = space.partials + (b * plan.longest_segment + c) * n.H * partial;
          sum_heads(shared, segment.chunks[c], partials, scratch, n, g);
          form.finish_shared(b0 + b, segment.chunks[c], scratch, g);
        });
      }
      form.finish_samples(b0, samples, team, scratch);
    });
#pragma omp barrier
    form.finish();
  }
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
