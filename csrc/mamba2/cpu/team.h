// How the work is shared out among the threads.
#pragma once

#include "mamba2/cpu/geometry.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {
namespace {

// The threads that compute a sample: all of them, or each for itself, where the samples share out among the threads
// with at most an eighth of the time lost and that takes no more scratch. A thread then waits for nobody, and finds what
// it has just written in its own cache.
class Team {
 public:
  // taken: samples that all teams together have begun; 0 at first
  Team(const Geometry& g, const Sizes& n, int64_t* taken) : g_(g), n_(n), taken_(taken) {}

  int64_t index() const { return g_.alone ? this_thread() : 0; }
  int64_t member() const { return g_.alone ? 0 : this_thread(); }

  // body(first sample, samples) for all samples
  template <typename Body>
  void for_each_group(Body body) const {
    if (g_.alone) {
      int64_t b;
      while ((b = __atomic_fetch_add(taken_, 1, __ATOMIC_RELAXED)) < n_.B) body(b, 1);
      return;
    }
    for (int64_t b = 0; b < n_.B; b += g_.samples) body(b, n_.B - b < g_.samples ? n_.B - b : g_.samples);
  }

  // body(i) for i < count, all of which are done on return.
  template <typename Body>
  void share(int64_t count, Body body) const {
    if (g_.alone) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) body(i);
  }

  // The same in equal parts, for many short ones; the others may still be at theirs.
  template <typename Body>
  void share_evenly(int64_t count, Body body) const {
    if (g_.alone) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; ++i) body(i);
  }

  void wait() const {
    if (g_.alone) return;
#pragma omp barrier
  }

 private:
  const Geometry& g_;
  const Sizes& n_;
  int64_t* taken_;
};

}  // namespace
}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
