// The backward of ssd_scan.
#pragma once

#include "mamba2/cpu/backward.h"
#include "mamba2/cpu/scan.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

using mamba2::ScanBackward;

struct ScanBackwardForm {
  static constexpr bool kNeedsOutputs = false;
  const ScanBackward& a;
  const Sizes& n;
  const BackwardSpace& space;

  const States& initial() const { return a.forward.initial; }
  const States& grad_last() const { return a.grad_last; }
  const States& dinitial() const { return a.dinitial; }
  const float* A() const { return a.forward.A; }

  void fill_shared(int64_t b, const Chunk& chunk, const Shared& shared, const BackwardScratch& s,
                   const Geometry& g) const {
    ScanForm<float>{a.forward, n}.fill_shared(b, chunk, shared, s.forward, g);
  }

  void fill_x(int64_t b, int64_t h, const Segment& segment, const BackwardScratch& s, const Geometry& g) const {
    ScanForm<float>{a.forward, n}.fill_x(b, h, segment, s.forward, g);
  }

  void fill_x_again(int64_t b, int64_t h, const Segment& segment, const BackwardScratch& s, const Geometry& g) const {
    fill_x(b, h, segment, s, g);
  }

  // dy, and the skip's part of dx and dD.
  void fill_dy(int64_t b, int64_t h, const Segment& segment, const BackwardScratch& s, const Geometry& g,
               int64_t) const {
    with_skip(a.forward.D, h, n, [&](auto D) MVAR_INLINE_LAMBDA {
      SkipSum<decltype(D)> dD(s.forward.rows, g.width);
      for (int64_t c = 0; c < segment.count; ++c) {
        for (int64_t i = 0; i < segment.chunks[c].q; ++i) {
          const float* from = row<float>(a.grad_y, b, segment.chunks[c].first + i, h);
          const int64_t at = (c * kChunk + i) * g.width;
          for_each_vector(n.P, [&](int64_t p, auto lanes, int slot) MVAR_INLINE_LAMBDA {
            const Vec dy = load(from + p, lanes);
            store(s.forward.y + at + p, dy, All{});
            store(s.dx + at + p, D.at(p, lanes) * dy, All{});
            dD.add(p, slot, dy, load(s.forward.x + at + p, All{}));
          });
        }
      }
      dD.add_to(space.sums.dD + (b * n.H + h) * n.D_width(), n.P);
    });
  }

  void take_delta(int64_t b, int64_t h, int64_t direction, const Chunk& chunk, const float* ddelta) const {
    for (int64_t i = 0; i < chunk.q; ++i) {
      const int64_t l = chunk.first + (direction ? chunk.q - 1 - i : i);
      ((float*)a.ddt.data)[b * a.ddt.batch_stride + l * a.ddt.row_stride + direction * a.ddt.direction_stride + h] =
          ddelta[i];
    }
  }

  void finish_head(int64_t b, int64_t h, const Segment& segment, const BackwardScratch& s, const Geometry& g) const {
    for (int64_t c = 0; c < segment.count; ++c) {
      for (int64_t i = 0; i < segment.chunks[c].q; ++i) {
        const float* from = s.dx + (c * kChunk + i) * g.width;
        float* to = row<float>(a.dx, b, segment.chunks[c].first + i, h);
        __builtin_memcpy(to, from, n.P * sizeof(float));
      }
    }
  }

  void finish_shared(int64_t b, const Chunk& chunk, const BackwardScratch& s, const Geometry& g) const {
    for (int64_t i = 0; i < chunk.q; ++i) {
      const int64_t l = chunk.first + i;
      float* dB = (float*)a.dB.data + b * a.dB.batch_stride + l * a.dB.row_stride;
      float* dC = (float*)a.dC.data + b * a.dC.batch_stride + l * a.dC.row_stride;
      __builtin_memcpy(dB, s.dB + i * g.N_padded, n.N * sizeof(float));
      __builtin_memcpy(dC, s.dC + i * g.N_padded, n.N * sizeof(float));
    }
  }

  void finish_samples(int64_t, int64_t, const Team&, const BackwardScratch&) const {}

  void finish() const {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n.directions * n.H; ++i) {
      a.dA[i / n.H * n.all_heads + i % n.H] = sum_samples(space.sums.dA, i, n.directions * n.H, n.B);
    }
    const int64_t skips = n.H * n.D_width();
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < skips; ++i) a.dD[i] = sum_samples(space.sums.dD, i, skips, n.B);
  }
};

void scan_backward(const ScanBackward& a, const Sizes& n, const Plan& plan, float* workspace) {
  Carver pieces(workspace);
  run_backward(n, plan, pieces, [&](const BackwardSpace& space) { return ScanBackwardForm{a, n, space}; });
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
