// Attention over a pyramid of token maps, in C++ and CUDA: what bindings.cpp calls. The mathematics is in
// mvar_kernels/ops/scale_attention/op.py.
//
// Results do not depend on the number of threads.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/instruction_set.h"
#include "common/views.h"

namespace mvar {

struct ScaleAttentionForward {
  Heads q, k, v, out;
  float* lse;  // (B, H, Lq)
};

struct ScaleAttentionBackward {
  Heads grad_out, q, k, v;
  Heads dq, dk, dv;
  float* dlog_temperature;  // (H), written where log_temperature is given
};

struct ScaleAttentionSizes {
  int64_t B, Lq, L, H, D;
  int64_t group;  // query heads that share a head of keys and values: H over the number of these
  const int64_t* scales;  // tokens per scale, their sum is L; all queries see an only one
  int64_t scale_count;
  bool causal;
  float scale;
  const float* log_temperature;  // (H), or null where q and k are not normalised
  // (L, angles), or null where q and k are not rotated; angles: D/2 or D
  const float *cos, *sin;
  int64_t angles;
  bool interleaved;
  const int64_t* key_lengths;  // (B), or null where all keys are seen
  // On a GPU: tiles (tile_count, 6) and spans (2, Lq) of mvar_kernels/ops/scale_attention/plan.py
  const int32_t *tiles, *spans;
  int64_t tile_count;
  void* stream;
};

// Null: there is no such kernel. `workspace`: as many floats as the function of that pass says
struct ScaleAttentionPair {
  void (*forward)(const ScaleAttentionForward&, const ScaleAttentionSizes&, float* workspace);
  int64_t (*forward_workspace)(const ScaleAttentionSizes&);
  void (*backward)(const ScaleAttentionBackward&, const ScaleAttentionSizes&, float* workspace);
  int64_t (*backward_workspace)(const ScaleAttentionSizes&);
};

struct ScaleAttentionKernels {
  ScaleAttentionPair of_dtype[kDtypes];
};

MVAR_DECLARE_TABLE(ScaleAttentionKernels, scale_attention)

}  // namespace mvar
