// Threads, where there are some: OpenMP is optional.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace mvar {

#if defined(_OPENMP)
static inline int max_threads() { return omp_get_max_threads(); }
static inline int thread_index() { return omp_get_thread_num(); }
#else
static inline int max_threads() { return 1; }
static inline int thread_index() { return 0; }
#endif

}  // namespace mvar
