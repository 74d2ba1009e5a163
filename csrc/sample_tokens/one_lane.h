// What lanes.h gives a processor, for one thread of a GPU: vectors of one lane.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#define MVAR_INSTRUCTION_SET cuda
#define MVAR_INLINE __device__ __forceinline__
#define MVAR_UNROLL(times)  // nvcc unrolls by itself

namespace mvar {
namespace cuda {

// A float32 whose operations are rounded one by one, whatever the compiler may do to those of a float: nvcc makes one
// fused operation of a·b + c.
struct Vec {
  float number;

  MVAR_INLINE Vec(float x = 0.0f) : number(x) {}
};

typedef int32_t VecInt;
typedef uint32_t VecBits;
typedef uint64_t VecWide;

MVAR_INLINE Vec operator+(Vec a, Vec b) { return __fadd_rn(a.number, b.number); }
MVAR_INLINE Vec operator-(Vec a, Vec b) { return __fsub_rn(a.number, b.number); }
MVAR_INLINE Vec operator*(Vec a, Vec b) { return __fmul_rn(a.number, b.number); }
// To nearest by default; __fdiv_rn would not become a multiplication where b is a power of two.
MVAR_INLINE Vec operator/(Vec a, Vec b) { return a.number / b.number; }
MVAR_INLINE Vec operator-(Vec a) { return -a.number; }
MVAR_INLINE bool operator>(Vec a, Vec b) { return a.number > b.number; }
MVAR_INLINE bool operator>=(Vec a, Vec b) { return a.number >= b.number; }

MVAR_INLINE Vec splat(float value) { return value; }
MVAR_INLINE VecWide splat_wide(uint64_t value) { return value; }

MVAR_INLINE VecInt as_int(Vec v) { return (int32_t)__float_as_uint(v.number); }
MVAR_INLINE Vec as_float(VecInt v) { return __uint_as_float((uint32_t)v); }

MVAR_INLINE Vec to_float(VecInt v) { return (float)v; }
MVAR_INLINE VecInt to_int(Vec v) { return (int32_t)v.number; }
MVAR_INLINE VecInt round_down(Vec v) { return (int32_t)floorf(v.number); }
MVAR_INLINE Vec unsigned_to_float(VecBits v) { return (float)v; }

MVAR_INLINE VecWide multiply_low(VecWide a, VecWide b) { return (uint64_t)(uint32_t)a * (uint32_t)b; }

}  // namespace cuda
}  // namespace mvar
