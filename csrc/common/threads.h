// How work is shared out among threads, and the memory that each works in.
#pragma once

#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/simd.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

// How many threads a parallel region gets, and which of them this is.
MVAR_INLINE int64_t threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

MVAR_INLINE int64_t this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Cuts arrays of floats from one piece of memory, each at the start of a cache line. Without memory it
// counts what is needed, the room to align the first included.
struct Carver {
  float* memory;
  int64_t floats = 0;

  explicit Carver(float* start) : memory((float*)(((uintptr_t)start + 63) / 64 * 64)) {}

  MVAR_INLINE float* take(int64_t n) {
    float* taken = memory ? memory + floats : nullptr;
    floats += (n + 15) / 16 * 16;
    return taken;
  }
  int64_t needed() const { return floats + 16; }
};

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
