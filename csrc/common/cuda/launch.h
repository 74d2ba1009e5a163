// Starting a kernel, and its shared memory.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mvar {

// A kernel's shared memory, as the structure that `launch` was given. The memory has one name for all kernels, because
// C++ allows one declaration of it.
template <typename Shared>
__device__ __forceinline__ Shared& shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char memory[];
#else
  unsigned char* memory = cuda_on_cpu::shared;
#endif
  return *reinterpret_cast<Shared*>(memory);
}

// Starts `kernel` on `grid` blocks of `threads` threads with `shared_bytes` of shared memory, and does not wait for it.
// Throws std::runtime_error where the launch is refused.
template <typename... Wanted, typename... Given>
void launch(void (*kernel)(Wanted...), dim3 grid, int threads, size_t shared_bytes, void* stream, Given... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // nothing to do
  constexpr size_t kWithoutAsking = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = (cudaStream_t)stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace mvar
