// SiLU(GroupNorm(x)) in C++: what bindings.cpp calls. The mathematics is in mvar_kernels/ops/group_norm_silu/op.py.
//
// Results do not depend on the number of threads.
#pragma once

#include "common/dtype.h"
#include "common/instruction_set.h"
#include "common/views.h"

namespace mvar {

// Feature maps are (B, L, C) if channels_last, else (B, C, L).
struct GroupNormSizes {
  int64_t B, C, L, groups;
  bool channels_last;
  float eps;
};

struct GroupNormForward {
  Tokens x;
  const float *weight, *bias;  // (C,)
  Tokens out;
};

struct GroupNormBackward {
  Tokens grad_out, x;
  const float *weight, *bias;
  Tokens dx;
  float *dweight, *dbias;  // (B, C), to be added up over the samples
};

struct GroupNormPair {
  // `workspace`: as many floats as the table's function says
  void (*forward)(const GroupNormForward&, const GroupNormSizes&, float* workspace);
  void (*backward)(const GroupNormBackward&, const GroupNormSizes&, float* workspace);
};

struct GroupNormKernels {
  GroupNormPair of[kDtypes];
  int64_t (*workspace)(const GroupNormSizes&);
};

MVAR_DECLARE_TABLE(GroupNormKernels, group_norm_silu)

}  // namespace mvar
