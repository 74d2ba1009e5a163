// The backward of mamba2_mixer. Two places of the output hold something else for a while: that of dz, y of
// the scan, until all heads of a token have it; that of dxbc, the convolution and then its gradient, which the last
// loop turns into that of its input.
#pragma once

#include "mamba2/cpu/backward.h"
#include "mamba2/cpu/convolution_backward.h"
#include "mamba2/cpu/mixer.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

using mamba2::MixerBackward;
using mamba2::StepTokens;

struct MixerBackwardForm {
  static constexpr bool kNeedsOutputs = true;
  const MixerBackward& a;
  const Sizes& n;
  const BackwardSpace& space;
  const float* rates;

  int64_t E() const { return n.H * n.P; }
  const States& initial() const { return a.forward.initial; }
  const States& grad_last() const { return a.grad_last; }
  const States& dinitial() const { return a.dinitial; }
  const float* A() const { return rates; }

  void fill_shared(int64_t b, const Chunk& chunk, const Shared& shared, const BackwardScratch& s,
                   const Geometry& g) const {
    form().fill_shared(b, chunk, shared, s.forward, g);
  }

  void fill_x(int64_t b, int64_t h, const Segment& segment, const BackwardScratch& s, const Geometry& g) const {
    form().start_head(h, s.forward, g);
    form().fill_x(b, h, segment, s.forward, g);
  }

  // The same from the convolution that fill_x kept, and the slopes of SiLU there.
  void fill_x_again(int64_t b, int64_t h, const Segment& segment, const BackwardScratch& s, const Geometry& g) const {
    for_each_line(segment, g, [&](int64_t l, int64_t at) MVAR_INLINE_LAMBDA {
      const float* kept = row<float>(a.dxbc, b, l) + h * n.P;
      for_each_vector(n.P, [&](int64_t p, auto lanes, int) MVAR_INLINE_LAMBDA {
        const Vec value = load(kept + p, lanes), open = sigmoid(value);
        store(s.forward.x + at + p, value * open, All{});
        store(s.slopes + at + p, silu_slope(value, open), All{});
      });
    });
  }

  // y into dz's place, and its part of the two sums that the RMSNorm's backward needs of each token.
  void keep_outputs(int64_t b, int64_t h, const Segment& segment, const BackwardScratch& s, const Geometry& g,
                    int64_t sample) const {
    with_skip(a.forward.D, h, n, [&](auto D) MVAR_INLINE_LAMBDA {
      with_order(n, [&](auto gate_last) MVAR_INLINE_LAMBDA {
        for_each_line(segment, g, [&](int64_t l, int64_t at) MVAR_INLINE_LAMBDA {
          const float* z = row<float>(a.forward.z, b, l) + h * n.P;
          const float* grad = row<float>(a.grad_y, b, l) + h * n.P;
          const float* weight = a.forward.norm_weight + h * n.P;
          float* y = row<float>(a.dz, b, l) + h * n.P;
          Sum squares, products;
          for_each_vector(n.P, [&](int64_t p, auto lanes, int slot) MVAR_INLINE_LAMBDA {
            const Vec value =
                fma(D.at(p, lanes), load(s.forward.x + at + p, lanes), load(s.forward.y + at + p, lanes));
            const Vec gate = silu(load(z + p, lanes));
            const Vec gated = gate_last ? value : value * gate;
            store(y + p, value, lanes);
            squares.slot[slot] = fma(gated, gated, squares.slot[slot]);
            Vec weighted = load(grad + p, lanes) * load(weight + p, lanes);
            if constexpr (gate_last) weighted *= gate;
            products.slot[slot] = fma(gated, weighted, products.slot[slot]);
          });
          space.squares[(sample * n.L + l) * n.H + h] = squares.total();
          space.products[(sample * n.L + l) * n.H + h] = products.total();
        });
      });
    });
  }

  // With r = 1/√(mean(gated²)+eps): r, and r³ · mean(gated · w · grad). Where RMSNorm is before the gate, y is in the
  // place of gated and grad · SiLU(z) in that of grad; where there is none, r is 1 and constant.
  void find_factors(int64_t token) const {
    if (n.norm == Norm::kNone) {
      space.factors[2 * token] = 1;
      space.factors[2 * token + 1] = 0;
      return;
    }
    double squares = 0, products = 0;
    for (int64_t h = 0; h < n.H; ++h) {
      squares += space.squares[token * n.H + h];
      products += space.products[token * n.H + h];
    }
    const double r = 1 / __builtin_sqrt(squares / (double)E() + n.eps);
    space.factors[2 * token] = (float)r;
    space.factors[2 * token + 1] = (float)(r * r * r * (products / (double)E()));
  }

  // Through norm and gate: dz, dy, the skip's part of dx, and the gradients of norm_weight and D.
  void fill_dy(int64_t b, int64_t h, const Segment& segment, const BackwardScratch& s, const Geometry& g,
               int64_t sample) const {
    const float* weight = a.forward.norm_weight + h * n.P;
    // Of this segment alone first: a sum of sums loses less than one long sum.
    float* dweight = s.forward.rows;
    __builtin_memset(dweight, 0, g.width * sizeof(float));
    with_skip(a.forward.D, h, n, [&](auto D) MVAR_INLINE_LAMBDA {
      SkipSum<decltype(D)> dD(dweight + g.width, g.width);
      with_order(n, [&](auto gate_last) MVAR_INLINE_LAMBDA {
        for_each_line(segment, g, [&](int64_t l, int64_t at) MVAR_INLINE_LAMBDA {
          const Vec r = splat(space.factors[2 * (sample * n.L + l)]);
          const Vec m = splat(space.factors[2 * (sample * n.L + l) + 1]);
          const float* z = row<float>(a.forward.z, b, l) + h * n.P;
          const float* grad = row<float>(a.grad_y, b, l) + h * n.P;
          float* dz = row<float>(a.dz, b, l) + h * n.P;
          for_each_vector(n.P, [&](int64_t p, auto lanes, int slot) MVAR_INLINE_LAMBDA {
            const Vec y = load(dz + p, lanes), gate = load(z + p, lanes), given = load(grad + p, lanes);
            const Vec open = sigmoid(gate), factor = gate * open, w = load(weight + p, lanes);
            Vec dfactor, dy, normed, dweighted;  // dweighted: of normed · w
            if constexpr (gate_last) {
              normed = y * r;
              dweighted = given * factor;
              dfactor = given * w * normed;
              dy = fma(-y, m, r * (dweighted * w));
            } else {
              const Vec gated = y * factor;
              const Vec dgated = fma(-gated, m, r * (given * w));
              dfactor = dgated * y;
              dy = dgated * factor;
              normed = gated * r;
              dweighted = given;
            }
            store(dz + p, dfactor * silu_slope(gate, open), lanes);
            store(s.forward.y + at + p, dy, All{});
            store(s.dx + at + p, D.at(p, lanes) * dy, All{});
            store(dweight + p, fma(dweighted, normed, load(dweight + p, All{})), All{});
            dD.add(p, slot, dy, load(s.forward.x + at + p, lanes));
          });
        });
      });
      dD.add_to(space.sums.dD + (b * n.H + h) * n.D_width(), n.P);
    });
    float* total = space.sums.dnorm_weight + b * E() + h * n.P;
    for (int64_t p = 0; p < n.P; ++p) total[p] += dweight[p];
  }

  // Through softplus, whose slope is the sigmoid, and the limits of Δ, past which it is 0.
  void take_delta(int64_t b, int64_t h, int64_t direction, const Chunk& chunk, const float* ddelta) const {
    const StepTokens& dt = a.forward.dt;
    const int64_t head = direction * n.all_heads + h;
    const auto token = [&](int64_t i) { return chunk.first + (direction ? chunk.q - 1 - i : i); };
    float steps[kChunk] = {};
    for (int64_t i = 0; i < chunk.q; ++i) {
      steps[i] = ((const float*)dt.data)[b * dt.batch_stride + token(i) * dt.row_stride + head] +
                 a.forward.dt_bias[head];
    }
    for (int v = 0; v < kChunkVecs; ++v) {
      float* at = steps + v * kWidth;
      const Vec step = load(at, All{});
      Vec dstep = sigmoid(step) * load(ddelta + v * kWidth, All{});
      if (n.limits_dt) {
        const Vec delta = softplus(step);
        dstep = delta < splat(n.dt_min) || delta > splat(n.dt_max) ? Vec{} : dstep;
      }
      store(at, dstep, All{});
    }
    double total = 0;
    for (int64_t i = 0; i < chunk.q; ++i) {
      ((float*)a.ddt.data)[b * a.ddt.batch_stride + token(i) * a.ddt.row_stride + head] = steps[i];
      total += steps[i];
    }
    space.sums.ddt_bias[(b * n.directions + direction) * n.H + h] += total;
  }

  void finish_head(int64_t b, int64_t h, const Segment& segment, const BackwardScratch& s, const Geometry& g) const {
    for_each_line(segment, g, [&](int64_t l, int64_t at) MVAR_INLINE_LAMBDA {
      float* to = row<float>(a.dxbc, b, l) + h * n.P;
      for_each_vector(n.P, [&](int64_t p, auto lanes, int) MVAR_INLINE_LAMBDA {
        store(to + p, load(s.dx + at + p, lanes) * load(s.slopes + at + p, lanes), lanes);
      });
    });
  }

  void finish_shared(int64_t b, const Chunk& chunk, const BackwardScratch& s, const Geometry& g) const {
    const float* lines[] = {s.dB, s.dC};
    for (int64_t t = 0; t < chunk.q; ++t) {
      for (int64_t i = 0; i < 2; ++i) {
        float* to = row<float>(a.dxbc, b, chunk.first + t) + (i ? n.C_channel : n.B_channel);
        for_each_vector(n.N, [&](int64_t j, auto lanes, int) MVAR_INLINE_LAMBDA {
          const Vec value = load(to + j, lanes);
          store(to + j, load(lines[i] + t * g.N_padded + j, lanes) * silu_slope(value, sigmoid(value)), lanes);
        });
      }
    }
  }

  void finish_samples(int64_t b0, int64_t samples, const Team& team, const BackwardScratch& s) const {
    for (const ChannelRun& run : channel_runs(n)) {
      const int64_t blocks = (run.count + kConvBlock - 1) / kConvBlock;
      team.share(samples * blocks, [&](int64_t i) {
        const int64_t b = b0 + i / blocks, first = i % blocks * kConvBlock;
        const int64_t count = run.count - first < kConvBlock ? run.count - first : kConvBlock;
        float* dconv = space.sums.dconv + b * (E() + 2 * n.N) * (n.taps + 1);
        derive_convolution(a, n, b, {run.first + first, run.channel + first, count}, s.forward.weights, dconv);
      });
    }
  }

  void finish() const {
    const ChannelRuns runs = channel_runs(n);
    for (const ChannelRun& run : runs) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < run.count; ++i) sum_channel(run.first + i, run.channel + i);
    }
  }

  // c: numbered among the channels of the group; channel: of [x, B, C]
  void sum_channel(int64_t c, int64_t channel) const {
    const int64_t channels = E() + 2 * n.N;
    for (int64_t k = 0; k <= n.taps; ++k) {
      float total = 0;
      for (int64_t b = 0; b < n.B; ++b) total += space.sums.dconv[(b * (n.taps + 1) + k) * channels + c];
      (k < n.taps ? a.dconv_weight[channel * n.taps + k] : a.dconv_bias[channel]) = total;
    }
    if (c < E()) {
      float total = 0;
      for (int64_t b = 0; b < n.B; ++b) total += space.sums.dnorm_weight[b * E() + c];
      a.dnorm_weight[c] = total;
    }
    const int64_t skips = n.H * n.D_width();
    if (c < skips) a.dD[c] = sum_samples(space.sums.dD, c, skips, n.B);
    if (c >= n.H) return;
    for (int64_t d = 0; d < n.directions; ++d) {
      const int64_t at = d * n.H + c, head = d * n.all_heads + c, count = n.directions * n.H;
      a.ddt_bias[head] = sum_samples(space.sums.ddt_bias, at, count, n.B);
      // A = −exp(A_log)
      a.dA_log[head] = sum_samples(space.sums.dA, at, count, n.B) * finite_rate(A()[head]);
    }
  }

 private:
  MixerForm<float, true> form() const { return {a.forward, n, rates, a.dxbc}; }

  template <typename Body>
  MVAR_INLINE void for_each_line(const Segment& segment, const Geometry& g, Body body) const {
    for (int64_t c = 0; c < segment.count; ++c) {
      for (int64_t i = 0; i < segment.chunks[c].q; ++i) body(segment.chunks[c].first + i, (c * kChunk + i) * g.width);
    }
  }
};

void mixer_backward(const MixerBackward& a, const Sizes& n, const Plan& plan, float* workspace) {
  Carver pieces(workspace);
  const float* rates = find_rates(a.forward, n, pieces);
  run_backward(n, plan, pieces, [&](const BackwardSpace& space) { return MixerBackwardForm{a, n, space, rates}; });
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
