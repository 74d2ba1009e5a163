// Attention over a pyramid of token maps on CPU: what bindings.cpp calls. The mathematics is in
// mvar_kernels/ops/scale_attention/op.py.
//
// Results do not depend on the number of threads.
#pragma once

#include <stdint.h>

#include "common/instruction_set.h"

namespace mvar {

// (B, L, H, D), the last dimension contiguous; strides in elements
struct Heads {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
};

struct ScaleAttentionSizes {
  int64_t B, Lq, L, H, D;
  const int64_t* scales;  // tokens per scale, their sum is L
  int64_t scale_count;
  bool causal;
  float scale;
  const float* log_temperature;  // (H), or null where q and k are not normalised
};

struct ScaleAttentionForward {
  Heads q, k, v, out;
  float* lse;  // (B, H, Lq)
};

struct ScaleAttentionBackward {
  Heads grad_out, q, k, v;
  Heads dq, dk, dv;
  float* dlog_temperature;  // (H), written where log_temperature is given
};

// `workspace`: as many floats as the function beside it says
struct ScaleAttentionPair {
  void (*forward)(const ScaleAttentionForward&, const ScaleAttentionSizes&, float* workspace);
  int64_t (*forward_workspace)(const ScaleAttentionSizes&);
  void (*backward)(const ScaleAttentionBackward&, const ScaleAttentionSizes&, float* workspace);
  int64_t (*backward_workspace)(const ScaleAttentionSizes&);
};

struct ScaleAttentionKernels {
  ScaleAttentionPair f32, bf16;
};

MVAR_DECLARE_TABLE(ScaleAttentionKernels, scale_attention)

}  // namespace mvar
