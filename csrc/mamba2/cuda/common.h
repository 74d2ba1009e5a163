// Shared by the kernels of cuda.cu: scratch memory, the convolution and its state, the gate, float32 in three parts.
//
// In all of them a lane that reads or writes tokens holds two neighbouring channels, so that a warp takes the 64
// channels of a head, or of B or C, in one access. Before they are computed with, the two are one register (pack).
#pragma once

#include <float.h>

#include <type_traits>

#include "common/cuda/launch.h"
#include "common/cuda/numbers.h"
#include "common/cuda/reduce.h"
#include "common/cuda/tensor_core.h"
#include "mamba2/mamba2.h"

namespace mvar {
namespace cuda {
namespace {

using mamba2::MixerForward;
using mamba2::Plan;
using mamba2::Sizes;

constexpr int kP = 64, kN = 64, kTaps = 4;
constexpr int kWarps = 4, kBlock = kWarps * kWarpSize;

// y · SiLU(z) between two launches. bfloat16 is rounded once more; float16, whose range it can leave though the
// normalised row cannot, is kept in float32.
template <typename T>
using Gated = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;

struct Scratch {
  void* gated;      // (B·L, E) Gated<T>
  float* squares;   // (B·L, H): the sum of squares of a token's gated values in each head
  char* prepared;   // (B·L, kArrays<T>, 64): see chunks.h
  float* products;  // (B·L): C·B
};

__device__ __forceinline__ int lane_index() { return (int)(threadIdx.x % kWarpSize); }
__device__ __forceinline__ int warp_index() { return (int)(threadIdx.x / kWarpSize); }

// The value of another lane.
__device__ __forceinline__ float from_lane(float value, int lane) { return __shfl_sync(kWholeWarp, value, lane); }

// To two roundings of float32, which is more than its operands are good for: where exp's argument is large and its
// error with it, either the result is tiny or the 1 outweighs it.
__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

__device__ __forceinline__ float softplus(float v) { return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))); }

// A = −exp(A_log), finite: tokens past the end have Δ = 0, and 0·∞ would be NaN.
__device__ __forceinline__ float decay_rate(float A_log) {
  const float rate = expf(A_log);
  return rate > FLT_MAX ? -FLT_MAX : -rate;
}

// A token's row of z or of dt.
template <typename T, typename Strided>
__device__ __forceinline__ const T* row_of(const Strided& t, int64_t b, int64_t l) {
  return (const T*)t.data + b * t.batch_stride + l * t.row_stride;
}

// dt of a token and head, before softplus.
template <typename T>
__device__ __forceinline__ float step_of(const MixerForward& a, int64_t b, int64_t l, int head) {
  return a.dt.is_float32 ? row_of<float>(a.dt, b, l)[head] : to_float(row_of<T>(a.dt, b, l)[head]);
}

// Two neighbouring channels in one access.
template <typename T>
__device__ __forceinline__ uint32_t load_pair(const T* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}
template <typename T>
__device__ __forceinline__ void store_pair(T* p, uint32_t packed) {
  *reinterpret_cast<uint32_t*>(p) = packed;
}
__device__ __forceinline__ void store_pair(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }

// v as a sum of bf16 numbers, of 8 bits each: three are float32's 24.
constexpr int kParts = 3;
template <int count>
__device__ __forceinline__ void split(float2 v, uint32_t (&parts)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    parts[i] = pack<bf16>(v.x, v.y);
    const float2 part = unpack<bf16>(parts[i]);
    v.x -= part.x;
    v.y -= part.y;
  }
}

// One sample's rows of [x, B, C] before the convolution: token −1 is the state's last row.
template <typename T>
struct Rows {
  const T *tokens, *before;
  int64_t stride, before_stride;
  int L;

  __device__ Rows(const MixerForward& a, const Sizes& n, int64_t b)
      : tokens((const T*)a.xbc.data + b * a.xbc.batch_stride),
        before((const T*)a.conv_state.data + b * a.conv_state.batch_stride),
        stride(a.xbc.row_stride),
        before_stride(a.conv_state.row_stride),
        L((int)n.L) {}

  // Zeros from token L on.
  __device__ __forceinline__ uint32_t at(int l, int channel) const {
    if (l < 0) return load_pair(before + (l + kTaps - 1) * before_stride + channel);
    return l < L ? load_pair(tokens + l * stride + channel) : 0;
  }
};

// SiLU of the convolution at two channels.
struct Convolution {
  Vector<float, kTaps> weight[2];
  float bias[2];

  __device__ Convolution(const MixerForward& a, int channel) {
    for (int c = 0; c < 2; ++c) {
      weight[c] = load_vector<kTaps>(a.conv_weight + (channel + c) * kTaps);
      bias[c] = a.conv_bias[channel + c];
    }
  }

  // rows: the kTaps rows that end in the token.
  template <typename T>
  __device__ __forceinline__ float2 of(const uint32_t* rows) const {
    float2 sum{bias[0], bias[1]};
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const float2 row = unpack<T>(rows[tap]);
      sum.x = fmaf(weight[0].at[tap], row.x, sum.x);
      sum.y = fmaf(weight[1].at[tap], row.y, sum.y);
    }
    return {silu(sum.x), silu(sum.y)};
  }

  template <typename T>
  __device__ __forceinline__ float2 at(const Rows<T>& rows, int l, int channel) const {
    uint32_t window[kTaps];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) window[tap] = rows.at(l + tap - (kTaps - 1), channel);
    return of<T>(window);
  }
};

// The convolution's new state: a block writes the channels of its head, that of head 0 also those of B and C.
template <typename T>
__device__ void carry_convolution(const MixerForward& a, const Sizes& n, const Rows<T>& rows, int64_t b, int head) {
  constexpr int kPairs = kN / 2, kRows = kTaps - 1;
  T* out = (T*)a.last_conv.data + b * a.last_conv.batch_stride;
  const int count = (head == 0 ? 3 : 1) * kRows * kPairs;
  for (int i = (int)threadIdx.x; i < count; i += kBlock) {
    const int part = i / (kRows * kPairs), row = i / kPairs % kRows;
    const int channel = (part == 0 ? head : (int)n.H + part - 1) * kP + i % kPairs * 2;
    store_pair(out + row * a.last_conv.row_stride + channel, rows.at(rows.L - kRows + row, channel));
  }
}

// Writes y · SiLU(z) of two channels and returns the sum of its squares.
template <typename T>
__device__ __forceinline__ float write_gated(float2 y, uint32_t packed_z, Gated<T>* to) {
  const float2 z = unpack<T>(packed_z);
  y.x *= silu(z.x);
  y.y *= silu(z.y);
  if constexpr (std::is_same_v<Gated<T>, T>) {
    store_pair(to, pack<T>(y.x, y.y));
  } else {
    store_pair(to, y);
  }
  return fmaf(y.x, y.x, y.y * y.y);
}

}  // namespace
}  // namespace cuda
}  // namespace mvar
