// The numbers that CUDA kernels read and write; they compute in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace mvar {

typedef __nv_bfloat16 bf16;
typedef __half f16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// 2^x in one instruction, to 2^-22 of it (PTX ISA, ex2.approx); 0 below the normal numbers.
__device__ __forceinline__ float exp2_approximate(float x) {
#if defined(__CUDACC__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}

// Numbers that one 16-byte access brings.
template <typename T>
constexpr int kPerAccess = 16 / sizeof(T);

// Numbers that are read and written in one access.
template <typename T, int n>
struct alignas(n * sizeof(T)) Vector {
  T at[n];
};

template <int n, typename T>
__device__ __forceinline__ Vector<T, n> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, n>*>(p);
}
template <int n, typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, n>& v) {
  *reinterpret_cast<Vector<T, n>*>(p) = v;
}

}  // namespace mvar
