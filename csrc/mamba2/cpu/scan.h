// ssd_scan: the scan with its tensors read and written as they are.
#pragma once

#include "mamba2/cpu/forward.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

using mamba2::ScanForward;

template <typename T>
MVAR_INLINE T* row(const Heads& t, int64_t b, int64_t l, int64_t h) {
  return (T*)t.data + b * t.batch_stride + l * t.row_stride + h * t.head_stride;
}

template <typename T>
struct ScanForm {
  static constexpr bool kFinishesTokens = false;
  const ScanForward& a;
  const Sizes& n;

  const float* A() const { return a.A; }

  void fill_shared(int64_t b, const Chunk& chunk, const Shared& shared, const Scratch&, const Geometry& g) const {
    for (int64_t i = 0; i < chunk.q; ++i) {
      const int64_t l = chunk.first + i;
      const T* B = (const T*)a.B.data + b * a.B.batch_stride + l * a.B.row_stride;
      const T* C = (const T*)a.C.data + b * a.C.batch_stride + l * a.C.row_stride;
      for_each_vector(n.N, [&](int64_t j, auto lanes, int) MVAR_INLINE_LAMBDA {
        store(shared.B + i * g.N_padded + j, load(B + j, lanes), lanes);
        store(shared.C + i * g.N_padded + j, load(C + j, lanes), lanes);
      });
      for (int64_t d = 0; d < n.directions; ++d) {
        const float* dt = (const float*)a.dt.data + b * a.dt.batch_stride + l * a.dt.row_stride + d * a.dt.direction_stride;
        for_each_vector(n.H, [&](int64_t h, auto lanes, int) MVAR_INLINE_LAMBDA {
          store_delta(shared, chunk, d, h, i, load(dt + h, lanes), n);
        });
      }
    }
  }

  void start_head(int64_t, const Scratch&, const Geometry&) const {}

  void fill_x(int64_t b, int64_t h, const Segment& segment, const Scratch& s, const Geometry& g) const {
    for (int64_t c = 0; c < segment.count; ++c) {
      for (int64_t i = 0; i < segment.chunks[c].q; ++i) {
        const T* from = row<T>(a.x, b, segment.chunks[c].first + i, h);
        float* to = s.x + (c * kChunk + i) * g.width;
        for_each_vector(n.P, [&](int64_t p, auto lanes, int) MVAR_INLINE_LAMBDA {
          store(to + p, load(from + p, lanes), All{});
        });
      }
    }
  }

  // What will be written of this segment and, `tokens` later, read of the next.
  void prefetch_next(int64_t b, int64_t h, const Chunk& chunk, int64_t tokens) const {
    for (int64_t l = chunk.first; l < chunk.first + chunk.q; ++l) {
      prefetch_for_write(row<T>(a.y, b, l, h), n.P);
      if (l + tokens < n.L) prefetch(row<T>(a.x, b, l + tokens, h), n.P);
    }
  }

  void finish_head(int64_t b, int64_t h, const Segment& segment, const Scratch& s, const Geometry& g, float*,
                   float*) const {
    with_skip(a.D, h, n, [&](auto D) MVAR_INLINE_LAMBDA {
      for (int64_t c = 0; c < segment.count; ++c) {
        for (int64_t i = 0; i < segment.chunks[c].q; ++i) {
          const int64_t at = (c * kChunk + i) * g.width;
          T* to = row<T>(a.y, b, segment.chunks[c].first + i, h);
          for_each_vector(n.P, [&](int64_t p, auto lanes, int) MVAR_INLINE_LAMBDA {
            store(to + p, fma(D.at(p, lanes), load(s.x + at + p, All{}), load(s.y + at + p, All{})), lanes);
          });
        }
      }
    });
  }
};

template <typename T>
void scan(const ScanForward& a, const Sizes& n, const Plan& plan, float* workspace) {
  run_forward(ScanForm<T>{a, n}, n, plan, workspace);
}

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
