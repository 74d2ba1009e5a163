// The order of work of a forward pass: what the heads share, once; then segment by segment all heads, each
// with its state; and what needs all heads of a token.
#pragma once

#include "mamba2/cpu/team.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// Channels of the convolution that its backward takes at a time.
constexpr int64_t kConvBlock = 64;

// What a thread needs for one chunk or for one segment of one head.
struct Scratch {
  float *x, *y;    // lines of a segment
  float *reverse;  // state of the backward direction
  float *mix, *weighted;
  float *rows;     // for the form: lines of a segment and `taps` more
  float *weights;  // for the form: taps + 1 lines, or twice as many of kConvBlock channels

  Scratch(Carver& pieces, const Sizes& n, const Geometry& g) {
    const int64_t line = g.width > g.N_padded ? g.width : g.N_padded;
    x = pieces.take(g.slots * g.width);
    y = pieces.take(g.slots * g.width);
    reverse = pieces.take(n.directions == 2 ? g.state : 0);
    mix = pieces.take(kChunk * kChunk);
    weighted = pieces.take(kChunk * g.N_padded);
    rows = pieces.take((g.slots + n.taps) * line);
    weights = pieces.take((n.taps + 1) * (line > 2 * kConvBlock ? line : 2 * kConvBlock));
  }
};

// What a team needs.
struct ForwardSpace {
  float *shared, *states;
  float *gated, *squares;  // for the form, twice: of one stage while the next one is computed
  float* scratch;
  int64_t scratch_floats;

  ForwardSpace(Carver& pieces, const Sizes& n, const Plan& plan, const Geometry& g) {
    shared = pieces.take(g.samples * plan.chunk_count() * g.shared);
    states = pieces.take(g.samples * n.H * g.state);
    gated = pieces.take(2 * g.samples * g.stage * g.slots * n.H * n.P);
    squares = pieces.take(2 * g.samples * g.stage * g.slots * n.H);
    Carver counter(nullptr);
    Scratch(counter, n, g);
    scratch_floats = counter.needed();
    scratch = pieces.take(g.members * scratch_floats);
  }
};

int64_t floats_of_forward_team(const Sizes& n, const Plan& plan, const Geometry& g) {
  Carver counter(nullptr);
  ForwardSpace(counter, n, plan, g);
  return counter.needed();
}

int64_t forward_workspace(const Sizes& n, const Plan& plan) {
  const Geometry g(n, plan, false);
  Carver counter(nullptr);
  counter.take(n.directions * n.all_heads);  // A of a mixer
  counter.take(g.teams * floats_of_forward_team(n, plan, g));
  return counter.needed();
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
  int64_t end() const { return first + tokens; }
};

// y of one segment of one head, both directions, from its x. `from`: the state before the segment; `to`: that at its
// end, if it is needed at all, which may be the same place. `shared` is that of the segment's first chunk.
// prefetch_next(chunk) is called early, once for each chunk.
template <typename PrefetchNext>
void scan_segment(const Segment& segment, float* shared, int64_t h, const float* A, const float* from, float* to,
                  bool needs_end, const Scratch& s, const Sizes& n, const Geometry& g, PrefetchNext prefetch_next) {
  Decays decays;
  for (int64_t i = 0; i < segment.count; ++i) {
    const int64_t at = i * kChunk * g.width;
    const View c = view_of(Shared(shared + i * g.shared, n, g), segment.chunks[i], 0, h, A, n, g, s.x + at, s.y + at);
    const float* state = i ? to : from;
    prefetch_next(segment.chunks[i]);
    find_decays(c.delta, c.A, decays);
    find_mix(c, decays, s.mix);
    chunk_outputs<false>(c, decays, s.mix, state, n.N, g.width);
    if (i + 1 == segment.count && !needs_end) continue;
    advance_state(c, decays, state, to, s.weighted, n.N, g.N_padded, g.width);
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
// one per stage: what a stage's last loop reads is not written again before the next but one.
template <typename Form>
void run_forward(const Form& form, const Sizes& n, const Plan& plan, float* workspace) {
  const Geometry g(n, plan, false);
  const int64_t chunks = plan.chunk_count(), segments = plan.segment_count;
  const int64_t stage = Form::kFinishesTokens ? g.stage : segments;
  const int64_t lines = g.stage * g.slots, floats = floats_of_forward_team(n, plan, g);
  int64_t begun = 0;
#pragma omp parallel if (worth_threads(n))
  {
    const Team team(g, n, &begun);
    Carver pieces(workspace + team.index() * floats);
    const ForwardSpace space(pieces, n, plan, g);
    Carver own(space.scratch + team.member() * space.scratch_floats);
    const Scratch scratch(own, n, g);
    team.for_each_group([&](int64_t b0, int64_t samples) {
      team.share(samples * chunks, [&](int64_t i) {
        const Chunk& chunk = plan.chunks[i % chunks];
        const Shared shared(space.shared + i * g.shared, n, g);
        __builtin_memset(shared.B, 0, g.shared * sizeof(float));
        form.fill_shared(b0 + i / chunks, chunk, shared, scratch, g);
        find_scores(shared, chunk, n, g, scratch.rows);
      });
      for (int64_t k = 0; k < segments; k += stage) {
        const int64_t end = k + stage < segments ? k + stage : segments;
        const int64_t first = Segment(plan, k).first, tokens = Segment(plan, end - 1).end() - first;
        const int64_t turn = k / stage % 2 * g.samples * lines * n.H;
        float* gated = space.gated + turn * n.P;
        float* squares = space.squares + turn;
        team.share(samples * n.H, [&](int64_t i) {
          const int64_t b = b0 + i / n.H, h = i % n.H;
          float* state = space.states + i * g.state;
          if (k == 0) load_state(form.a.initial, b, h, n, g, state);
          form.start_head(h, scratch, g);
          for (int64_t j = k; j < end; ++j) {
            const Segment segment(plan, j);
            const int64_t line = (i / n.H * lines + segment.first - first) * n.H;
            float* shared = space.shared + (i / n.H * chunks + segment.first_chunk) * g.shared;
            form.fill_x(b, h, segment, scratch, g);
            scan_segment(segment, shared, h, form.A(), state, state, true, scratch, n, g,
                         [&](const Chunk& chunk) { form.prefetch_next(b, h, chunk, segment.tokens); });
            form.finish_head(b, h, segment, scratch, g, gated + line * n.P, squares + line);
          }
          if (end == segments) store_state(form.a.last, b, h, n, g, state);
        });
        if constexpr (Form::kFinishesTokens) {
          team.share_evenly(samples * tokens, [&](int64_t i) {
            const int64_t b = i / tokens, t = i % tokens;
            const int64_t line = (b * lines + t) * n.H;
            form.finish_token(b0 + b, first + t, gated + line * n.P, squares + line);
          });
        }
      }
    });
  }
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
