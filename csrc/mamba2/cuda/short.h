// At most kShort tokens: the recurrence as it is written, token by token, in float32.
//
//     h ← a_t h + (Δ_t x_t) ⊗ B_t,    y_t = h C_t + D x_t          h: 64 rows p × 64 columns n
//
// A token is an outer product and a matrix times a vector. Half a warp holds 8 rows of h, a lane 4 columns of each:
//
//               n  0–3  4–7   …  60–63
//     p 16w      | 0  | 1  | … | 15 |    8 rows; below them 8 more for lanes 16–31      w: warp
//
// so that h is read and written in rows of 256 bytes, and B_t and C_t are 16 bytes a lane. y_t's sums over a row's 16
// lanes are taken for all 8 rows at once (sum_of_each).
//
// Bytes and operations of one head: h in and out are 32 KiB; a token adds 4·64 two-byte numbers (z, x, y · SiLU(z)
// written and read again) and 3·4096 multiply-adds. H200: 4.3 TB/s over 132 SMs is 18 bytes a cycle and SM, 1,800
// cycles for h; an SM's 128 lanes need 96 cycles for a token's multiply-adds, and some 130 with all else. The memory
// decides up to about 14 tokens; tensor cores, which want three launches and tiles of 16, have nothing to add here.
#pragma once

#include "mamba2/cuda/common.h"

namespace mvar {
namespace cuda {
namespace {

constexpr int kShort = 16;

struct ShortShared {
  float x[kShort][kP], B[kShort][kN], C[kShort][kN], y[kShort][kP];
  float delta[kShort], decay[kShort];
};

// One block a head of a sample.
template <typename T>
__global__ void __launch_bounds__(kBlock) mamba2_mixer_fwd_short_kernel(MixerForward a, Sizes n, Scratch scratch) {
  constexpr int kRowsOfLane = 8;
  ShortShared& m = shared<ShortShared>();
  const int lane = lane_index(), warp = warp_index(), L = (int)n.L, H = (int)n.H;
  const int head = (int)(blockIdx.x % (unsigned)H);
  const int64_t b = blockIdx.x / (unsigned)H;
  const int first_row = 2 * kRowsOfLane * warp + lane / 16 * kRowsOfLane, column = lane % 16 * 4;

  Vector<float, 4> h[kRowsOfLane];
  const float* h_in = a.initial.data + b * a.initial.batch_stride + head * a.initial.head_stride + column;
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) h[i] = load_vector<4>(h_in + (first_row + i) * a.initial.row_stride);

  uint32_t z[kShort / kWarps];
#pragma unroll
  for (int i = 0; i < kShort / kWarps; ++i) {
    const int l = warp + i * kWarps;
    z[i] = l < L ? load_pair(row_of<T>(a.z, b, l) + head * kP + 2 * lane) : 0;
  }

  // Every head convolves B and C itself: up to 16 · 128 channels are less than a launch.
  const Rows<T> rows(a, n, b);
  for (int part = 0; part < 3; ++part) {
    const int channel = (part == 0 ? head : H + part - 1) * kP + 2 * lane;
    const Convolution convolution(a, channel);
    float(*to)[kP] = part == 0 ? m.x : part == 1 ? m.B : m.C;
    for (int l = warp; l < L; l += kWarps) {
      store_pair(&to[l][2 * lane], convolution.at(rows, l, channel));
    }
  }
  if ((int)threadIdx.x < L) {
    const float delta = softplus(step_of<T>(a, b, threadIdx.x, head) + a.dt_bias[head]);
    m.delta[threadIdx.x] = delta;
    m.decay[threadIdx.x] = expf(delta * decay_rate(a.A_log[head]));
  }
  __syncthreads();

  for (int l = 0; l < L; ++l) {
    const auto B = load_vector<4>(&m.B[l][column]), C = load_vector<4>(&m.C[l][column]);
    const float delta = m.delta[l], decay = m.decay[l];
    float y[kRowsOfLane] = {};
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const float dx = delta * m.x[l][first_row + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        h[i].at[j] = fmaf(dx, B.at[j], decay * h[i].at[j]);
        y[i] = fmaf(h[i].at[j], C.at[j], y[i]);
      }
    }
    const float sum = sum_of_each<16>(y);
    if (lane % 2 == 0) m.y[l][first_row + lane / 2 % kRowsOfLane] = sum;
  }
  float* h_out = a.last.data + b * a.last.batch_stride + head * a.last.head_stride + column;
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) store_vector<4>(h_out + (first_row + i) * a.last.row_stride, h[i]);
  __syncthreads();

  const float D = a.D[head];
#pragma unroll
  for (int i = 0; i < kShort / kWarps; ++i) {
    const int l = warp + i * kWarps;
    if (l >= L) break;
    const float2 y{fmaf(D, m.x[l][2 * lane], m.y[l][2 * lane]), fmaf(D, m.x[l][2 * lane + 1], m.y[l][2 * lane + 1])};
    const int64_t at = (b * L + l) * H + head;
    const float squares = warp_sum(write_gated<T>(y, z[i], (Gated<T>*)scratch.gated + at * kP + 2 * lane));
    if (lane == 0) scratch.squares[at] = squares;
  }
  carry_convolution(a, n, rows, b, head);
}

}  // namespace
}  // namespace cuda
}  // namespace mvar
