// CUDA's execution model on a CPU, as far as this project's kernels use it: found instead of NVIDIA's header of this
// name when a .cu file is compiled by the host compiler for the tests.
//
// A launch runs its blocks one after another; the threads of a block are fibres on one thread of the machine. A fibre
// runs until it waits (__syncthreads, or an operation of its whole warp) or ends; then another one runs, in an order
// that is drawn anew each time, so that a missing barrier shows as a wrong answer, and repeatable, so that the answer
// stays wrong. Shared memory is filled with NaN before every block and checked for writes past its ends after it.
// What cannot be done on a GPU either (a barrier that some threads never reach, a warp operation of some lanes only)
// makes the launch fail.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

// Of the running thread.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr int kExchanged = 64;  // bytes that a lane may hand to its warp in one operation

extern int lane;  // of the running thread in its warp
extern unsigned char* shared;

void barrier();

// Hands `bytes` bytes to the warp, waits until every lane has done the same operation, and answers what all lanes
// handed over, `kExchanged` bytes apart. `operation` names it: lanes that wait for different ones are an error.
const unsigned char* exchange(const char* operation, const void* mine, size_t bytes);

template <typename T>
struct Lanes {
  const unsigned char* data;
  T operator[](int lane) const {
    T value;
    memcpy(&value, data + lane * kExchanged, sizeof(T));
    return value;
  }
};

template <typename T>
Lanes<T> exchange(const char* operation, const T& mine) {
  static_assert(sizeof(T) <= kExchanged, "more than a lane may hand over");
  return {exchange(operation, &mine, sizeof(T))};
}

void check_full(unsigned mask);

// cp.async: the copy takes place when it is waited for, and no sooner.
void start_copy(void* to, const void* from, size_t bytes, size_t valid);
void commit_copies();
void wait_for_copies(int groups_left);

int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
const char* last_failure();

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) {
  cuda_on_cpu::check_full(mask);
  cuda_on_cpu::exchange("__syncwarp", nullptr, 0);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  cuda_on_cpu::check_full(mask);
  return cuda_on_cpu::exchange("__shfl_xor_sync", value)[cuda_on_cpu::lane ^ other];
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  cuda_on_cpu::check_full(mask);
  return cuda_on_cpu::exchange("__shfl_sync", value)[lane & 31];
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  cuda_on_cpu::check_full(mask);
  const int lane = cuda_on_cpu::lane;
  return cuda_on_cpu::exchange("__shfl_up_sync", value)[lane < (int)delta ? lane : lane - (int)delta];
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  cuda_on_cpu::check_full(mask);
  const auto votes = cuda_on_cpu::exchange("__ballot_sync", vote);
  unsigned ballot = 0;
  for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) ballot |= (unsigned)votes[lane] << lane;
  return ballot;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// One thread runs at a time, so that atomics need nothing.
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorLaunchFailure = 719;
inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::last_failure(); }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

template <typename... Wanted, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...), Given&&... arguments) {
  const std::tuple<Wanted...> held(arguments...);
  return cuda_on_cpu::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                          [&] { std::apply(kernel, held); });
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
