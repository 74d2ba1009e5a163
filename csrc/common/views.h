// How a kernel sees its tensors: a pointer and strides in elements, the last dimension contiguous.
#pragma once

#include <stdint.h>

namespace mvar {

// (B, L, C)
struct Tokens {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
};

// (B, C); batch_stride 0 where all samples share one row
struct PerSample {
  void* data;
  int64_t batch_stride;
};

// (B, L, H, D)
struct Heads {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
};

}  // namespace mvar
