// mamba2_mixer in CUDA, forward, for generation: P = N = 64, four taps, bfloat16 and float16. The result
// (mvar_kernels/ops/mamba2/reference.py): with [z, xBC, dt] = zxbcdt,
//
//     [x, B, C] = SiLU(conv(xBC)),   Δ = softplus(dt + dt_bias),   a = exp(Δ A)
//     h_t = a_t h_{t−1} + Δ_t x_t ⊗ B_t,   y_t = h_t C_t + D x_t            of each head
//     out = RMSNorm(y · SiLU(z)) · norm_weight                              over all heads
//
// Launches: prepare and chunks (cuda/chunks.h), or for at most kShort tokens one for both (cuda/short.h), then norm.
// RMSNorm is over all heads, and blocks of one launch cannot wait for one another: a block leaves y · SiLU(z) and, per
// token, the sum of its squares; norm adds the heads' sums in their order and scales the row. Clusters would not spare
// it: they hold 16 blocks at most, M-VAR has 24 to 64 heads, and sm_80 has none.
//
// What y · SiLU(z) costs in between, at (B, L, H) = (16, 256, 32) in bfloat16: 16.8 MB are written and read, in
// addition to the 51.6 MB of zxbcdt and out and the 16.8 MB of h, which cannot be avoided. The L2 cache of an H200 (60 MB) may keep them.
//
// Not yet measured. Lower bounds on an H200 (4.3 TB/s, 790 TFLOP/s; tensor-core work as in cuda/chunks.h, 64 kFLOP a token
// and head), and what is expected of these kernels, a launch counted as 2 µs:
//
//     B, L, H          bytes needed         with y · SiLU(z)      tensor cores         expected
//     16, 1, 32        17.0 MB   4.0 µs     17.1 MB   4.0 µs      none                  8–10 µs
//     16, 256, 32      68.4 MB  15.9 µs    102.0 MB  23.7 µs      8.3 GFLOP  10.5 µs   30–40 µs
//     2, 256, 32        8.6 MB   2.0 µs     12.7 MB   3.0 µs      1.0 GFLOP   1.3 µs   15–20 µs
//
// In the last row 64 blocks walk 8 chunks each, at about 1.5 µs: not throughput but one block's latency decides. To
// measure first there: two blocks a head, of 32 rows p each.
#include "mamba2/cuda/chunks.h"
#include "mamba2/cuda/short.h"

namespace mvar {
namespace cuda {
namespace {

// One block a token. In bfloat16 gated is y itself: each thread reads what it then writes.
template <typename T>
__global__ void __launch_bounds__(kBlock) mamba2_mixer_fwd_norm_kernel(MixerForward a, Sizes n, Scratch scratch) {
  const int64_t token = blockIdx.x;
  const int H = (int)n.H, E = H * kP;
  float sum = 0.0f;  // each warp takes all
  for (int head = lane_index(); head < H; head += kWarpSize) sum += scratch.squares[token * H + head];
  const float factor = 1.0f / sqrtf(warp_sum(sum) / (float)E + n.eps);
  for (int c = 8 * (int)threadIdx.x; c < E; c += 8 * kBlock) {
    const auto gated = load_vector<8>((const Gated<T>*)scratch.gated + token * E + c);
    Vector<T, 8> y;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const auto weight = load_vector<4>(a.norm_weight + c + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) y.at[i + j] = from_float<T>(to_float(gated.at[i + j]) * factor * weight.at[j]);
    }
    store_vector<8>((T*)a.y.data + token * E + c, y);
  }
}

// Scratch memory in the workspace, and how many floats of it. `y`: where gated is, if it is of y's dtype.
template <typename T>
Scratch carve(const Sizes& n, float* workspace, void* y, int64_t* floats) {
  int64_t taken = 0;
  const auto take = [&](int64_t wanted) {
    char* at = (char*)workspace + taken;
    taken += (wanted + 127) / 128 * 128;
    return at;
  };
  const int64_t tokens = n.B * n.L;
  Scratch s{};
  s.squares = (float*)take(tokens * n.H * (int64_t)sizeof(float));
  s.gated = std::is_same_v<Gated<T>, T> ? y : take(tokens * n.H * kP * (int64_t)sizeof(Gated<T>));
  if (n.L > kShort) {
    s.products = (float*)take(tokens * (int64_t)sizeof(float));
    s.prepared = take(tokens * kArrays<T> * kN * 2);
  }
  if (floats) *floats = taken / (int64_t)sizeof(float);
  return s;
}

template <typename T>
int64_t forward_workspace(const Sizes& n, const Plan&) {
  int64_t floats = 0;
  carve<T>(n, nullptr, nullptr, &floats);
  return floats;
}

template <typename T>
void forward(const MixerForward& a, const Sizes& n, const Plan&, float* workspace) {
  const Scratch scratch = carve<T>(n, workspace, a.y.data, nullptr);
  const dim3 heads((unsigned)(n.B * n.H)), tokens((unsigned)(n.B * n.L));
  if (n.L <= kShort) {
    launch(mamba2_mixer_fwd_short_kernel<T>, heads, kBlock, sizeof(ShortShared), n.stream, a, n, scratch);
  } else {
    const dim3 blocks((unsigned)((n.B * n.L + kWarps - 1) / kWarps));
    launch(mamba2_mixer_fwd_prepare_kernel<T>, blocks, kBlock, 0, n.stream, a, n, scratch);
    launch(mamba2_mixer_fwd_chunks_kernel<T>, heads, kBlock, sizeof(ChunkShared<T>), n.stream, a, n, scratch);
  }
  launch(mamba2_mixer_fwd_norm_kernel<T>, tokens, kBlock, 0, n.stream, a, n, scratch);
}

}  // namespace

const mamba2::Kernels mamba2_kernels = {
    {},
    {nullptr, forward<bf16>, forward<f16>},
    {nullptr, forward_workspace<bf16>, forward_workspace<f16>},
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace cuda
}  // namespace mvar
