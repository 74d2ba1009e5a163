// Sums over a warp, in an order that the sizes alone decide.
#pragma once

#include <cuda_runtime.h>

namespace mvar {

constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kWarpSize = 32;

__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

// The sums of eight numbers over each group of `lanes` neighbouring lanes (16 or 32): a lane i gets that of number
// i / (lanes / 8) % 8. Halving what is left at each step, it takes 8 or 9 shuffles where eight sums take 32 or 40.
template <int lanes>
__device__ __forceinline__ float sum_of_each(float (&v)[8]) {
  const unsigned lane = threadIdx.x % kWarpSize;
  int distance = lanes / 2;
#pragma unroll
  for (int kept = 4; kept > 0; kept /= 2, distance /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float given = upper ? v[i] : v[i + kept];
      v[i] = (upper ? v[i + kept] : v[i]) + __shfl_xor_sync(kWholeWarp, given, distance);
    }
  }
#pragma unroll
  for (; distance > 0; distance /= 2) v[0] += __shfl_xor_sync(kWholeWarp, v[0], distance);
  return v[0];
}

}  // namespace mvar
