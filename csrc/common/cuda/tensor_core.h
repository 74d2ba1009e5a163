// Tensor cores and asynchronous copies (sm_80 and later): the PTX instructions, and the same for the host compiler.
//
// Fragments of m16n8k16, as the PTX ISA lays them out; lane = 4·g + t (g: 0–7, t: 0–3), two 16-bit numbers a register,
// the lower column (of A, C) or row (of B) in the lower half:
//     A (16, 16)   a[0] = A[g][2t, 2t+1]    a[1] = A[g+8][2t, 2t+1]    a[2] = A[g][2t+8, 2t+9]    a[3] = A[g+8][2t+8, 2t+9]
//     B (16, 8)    b[0] = B[2t, 2t+1][g]    b[1] = B[2t+8, 2t+9][g]
//     C (16, 8)    c[0], c[1] = C[g][2t, 2t+1]    c[2], c[3] = C[g+8][2t, 2t+1]    float32
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/cuda/numbers.h"

namespace mvar {

// Two numbers rounded and packed as fragments hold them.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T both[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t packed;
  memcpy(&packed, both, 4);
  return packed;
}

// The lower and the upper one, as they were packed.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  T both[2];
  memcpy(both, &packed, 4);
  return {to_float(both[0]), to_float(both[1])};
}

#if defined(__CUDACC__)

// c += A·B
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8×8 matrices of 16-bit numbers from shared memory. Lane i names row i % 8 of matrix i / 8 (16 bytes, aligned);
// register m then holds M_m[g][2t, 2t+1], transposed M_m[2t, 2t+1][g].
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"((uint32_t)__cvta_generic_to_shared(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"((uint32_t)__cvta_generic_to_shared(row))
               : "memory");
}

// 16 bytes from global to shared memory, without waiting; only the first `valid` (0 to 16) are read, the rest is 0.
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from),
               "r"(valid)
               : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `left` of this thread's groups are under way. Other threads see the data after __syncthreads.
template <int left>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

#else

template <typename T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    float2 a[4], b[2];
  };
  Fragments mine;
  for (int i = 0; i < 4; ++i) mine.a[i] = unpack<T>(a[i]);
  for (int i = 0; i < 2; ++i) mine.b[i] = unpack<T>(b[i]);
  const auto lanes = cuda_on_cpu::exchange("mma", mine);
  const int lane = cuda_on_cpu::lane, g = lane / 4, t = lane % 4;
  for (int k = 0; k < 16; k += 2) {
    const int owner = k % 8 / 2, high = k / 8;  // the lane and the register of columns k, k+1 of A and rows of B
    const Fragments of_row = lanes[4 * g + owner];
    for (int column = 0; column < 2; ++column) {
      const float2 b_k = lanes[4 * (2 * t + column) + owner].b[high];
      for (int half = 0; half < 2; ++half) {
        const float2 a_k = of_row.a[2 * high + half];
        c[2 * half + column] += a_k.x * b_k.x + a_k.y * b_k.y;
      }
    }
  }
}

inline void load_matrices(uint32_t (&registers)[4], const void* row) {
  const auto rows = cuda_on_cpu::exchange<const char*>("ldmatrix", (const char*)row);
  const int lane = cuda_on_cpu::lane, g = lane / 4, t = lane % 4;
  for (int m = 0; m < 4; ++m) memcpy(&registers[m], rows[8 * m + g] + 4 * t, 4);
}

inline void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  const auto rows = cuda_on_cpu::exchange<const char*>("ldmatrix.trans", (const char*)row);
  const int lane = cuda_on_cpu::lane, g = lane / 4, t = lane % 4;
  for (int m = 0; m < 4; ++m) {
    for (int i = 0; i < 2; ++i) memcpy((char*)&registers[m] + 2 * i, rows[8 * m + 2 * t + i] + 2 * g, 2);
  }
}

inline void copy_async(void* to, const void* from, int valid = 16) {
  cuda_on_cpu::start_copy(to, from, 16, valid);
}
inline void commit_copies() { cuda_on_cpu::commit_copies(); }
template <int left>
inline void wait_for_copies() {
  cuda_on_cpu::wait_for_copies(left);
}

#endif

}  // namespace mvar
