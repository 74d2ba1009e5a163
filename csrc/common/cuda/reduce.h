// Sums and maxima over a warp and over a block, in an order that the sizes alone decide.
#pragma once

#include <cuda_runtime.h>

namespace mvar {

constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kWarpSize = 32;

__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, distance));
  }
  return x;
}

}  // namespace mvar
