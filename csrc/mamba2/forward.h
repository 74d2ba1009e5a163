// The order of work of a forward pass: what the heads share, once; then segment by segment all heads, each
// with its state; and what needs all heads of a token.
#pragma once

#include "geometry.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// Below this many numbers of state passed through, starting the threads costs more than they save.
constexpr int64_t kParallelWork = 1 << 16;

// Channels of the convolution that its backward takes at a time.
constexpr int64_t kConvBlock = 64;

MVAR_INLINE bool worth_threads(const Sizes& n) { return n.B * n.L * n.H * n.P * n.N > kParallelWork; }

// What a thread needs for one chunk or for one segment of one head.
struct Scratch {
  float *x, *y;    // lines of a segment
  float *reverse;  // state of the backward direction
  float *mix, *weighted;
  float *rows;     // for the form: lines of a segment and `taps` more
  float *weights;  // for the form: taps + 1 lines

  Scratch(Pieces& pieces, const Sizes& n, const Geometry& g) {
    const int64_t line = g.width > g.N_padded ? g.width : g.N_padded;
    x = pieces.take(g.slots * g.width);
    y = pieces.take(g.slots * g.width);
    reverse = pieces.take(n.directions == 2 ? g.state : 0);
    mix = pieces.take(kChunk * kChunk);
    weighted = pieces.take(kChunk * g.N_padded);
    rows = pieces.take((g.slots + n.taps) * line);
    weights = pieces.take((n.taps + 1) * (line > kConvBlock ? line : kConvBlock));
  }
};

struct ForwardSpace {
  float *shared, *states;
  float *gated, *squares;  // for the form, twice: of one segment while the next one is computed
  float *scratch;
  int64_t scratch_floats;

  ForwardSpace(Pieces& pieces, const Sizes& n, const Plan& plan, const Geometry& g) {
    shared = pieces.take(g.samples * plan.chunk_count() * g.shared);
    states = pieces.take(g.samples * n.H * g.state);
    gated = pieces.take(2 * g.samples * g.slots * n.H * n.P);
    squares = pieces.take(2 * g.samples * g.slots * n.H);
    Pieces counter{nullptr};
    Scratch(counter, n, g);
    scratch_floats = counter.taken;
    scratch = pieces.take(max_threads() * scratch_floats);
  }
};

int64_t forward_workspace(const Sizes& n, const Plan& plan) {
  Pieces counter{nullptr};
  ForwardSpace(counter, n, plan, Geometry(n, plan, false));
  return counter.taken;
}

// Where a segment is.
struct Segment {
  const Chunk* chunks;
  int64_t count, index;
  int64_t first_chunk;
  int64_t first;   // token
  int64_t tokens;

  Segment(const Plan& plan, int64_t index) : index(index) {
    first_chunk = plan.segments[index];
    chunks = plan.chunks + first_chunk;
    count = plan.segments[index + 1] - first_chunk;
    first = chunks[0].first;
    tokens = chunks[count - 1].first + chunks[count - 1].q - first;
  }
};

// y of one segment of one head, both directions, from its x; `state` goes on to the segment's end.
// `shared` is that of the segment's first chunk.
void scan_segment(const Segment& segment, float* shared, int64_t h, const float* A, float* state, const Scratch& s,
                  const Sizes& n, const Geometry& g) {
  Decays decays;
  for (int64_t i = 0; i < segment.count; ++i) {
    const int64_t at = i * kChunk * g.width;
    const View c = view_of(Shared(shared + i * g.shared, n, g), segment.chunks[i], 0, h, A, n, g, s.x + at, s.y + at);
    find_decays(c.delta, c.A, decays);
    find_mix(c, decays, s.mix);
    chunk_outputs<false>(c, decays, s.mix, state, n.N, g.width);
    advance_state(c, decays, state, state, s.weighted, n.N, g.N_padded, g.width);
  }
  if (n.directions == 1) return;
  for (int64_t i = segment.count - 1; i >= 0; --i) {
    const int64_t at = i * kChunk * g.width;
    const Chunk& chunk = segment.chunks[i];
    const View c = view_of(Shared(shared + i * g.shared, n, g), chunk, 1, h, A, n, g, s.x + at, s.y + at);
    find_decays(c.delta, c.A, decays);
    find_mix(c, decays, s.mix);
    const float* state_here = chunk.ends_scale ? nullptr : s.reverse;
    chunk_outputs<true>(c, decays, s.mix, state_here, n.N, g.width);
    if (chunk.starts_scale) continue;
    advance_state(c, decays, state_here, s.reverse, s.weighted, n.N, g.N_padded, g.width);
  }
}

// `Form` is what surrounds the scan: see ScanForm and MixerForm. One barrier after the shared part and
// one per segment: what a segment's last loop reads is not written again before the next but one.
template <typename Form>
void run_forward(const Form& form, const Sizes& n, const Plan& plan, float* workspace) {
  const Geometry g(n, plan, false);
  Pieces pieces{workspace};
  const ForwardSpace space(pieces, n, plan, g);
  const int64_t chunks = plan.chunk_count();
#pragma omp parallel if (worth_threads(n))
  {
    Pieces own{space.scratch + thread_index() * space.scratch_floats};
    const Scratch scratch(own, n, g);
    for (int64_t b0 = 0; b0 < n.B; b0 += g.samples) {
      const int64_t samples = n.B - b0 < g.samples ? n.B - b0 : g.samples;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < samples * chunks; ++i) {
        const Chunk& chunk = plan.chunks[i % chunks];
        const Shared shared(space.shared + i * g.shared, n, g);
        __builtin_memset(shared.B, 0, g.shared * sizeof(float));
        form.fill_shared(b0 + i / chunks, chunk, shared, scratch, g);
        find_scores(shared, chunk, n, g, scratch.rows);
      }
      for (int64_t k = 0; k < plan.segment_count; ++k) {
        const Segment segment(plan, k);
        const int64_t turn = k % 2 * g.samples * g.slots * n.H;
        float* gated = space.gated + turn * n.P;
        float* squares = space.squares + turn;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < samples * n.H; ++i) {
          const int64_t b = b0 + i / n.H, h = i % n.H;
          const int64_t line = i / n.H * g.slots * n.H;
          float* state = space.states + i * g.state;
          float* shared = space.shared + (i / n.H * chunks + segment.first_chunk) * g.shared;
          if (k == 0) load_state(form.a.initial, b, h, n, g, state);
          form.fill_x(b, h, segment, scratch, g);
          scan_segment(segment, shared, h, form.a.A, state, scratch, n, g);
          form.finish_head(b, h, segment, scratch, g, gated + line * n.P, squares + line);
          if (k + 1 == plan.segment_count) store_state(form.a.last, b, h, n, g, state);
        }
        if constexpr (Form::kFinishesTokens) {
#pragma omp for schedule(static) nowait
          for (int64_t i = 0; i < samples * segment.tokens; ++i) {
            const int64_t b = i / segment.tokens, t = i % segment.tokens;
            const int64_t line = b * g.slots + t;
            form.finish_token(b0 + b, segment.first + t, gated + line * n.H * n.P, squares + line * n.H);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
