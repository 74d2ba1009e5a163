// adaLN in C++ and CUDA: what bindings.cpp calls. The mathematics is in mvar_kernels/ops/adaln/op.py.
//
// Results do not depend on the number of threads.
#pragma once

#include "common/dtype.h"
#include "common/instruction_set.h"
#include "common/views.h"

namespace mvar {

struct AdalnSizes {
  int64_t B, L, C;
  float eps;
  void* stream;  // on a GPU
};

// `branch` and `gate` are read, and `x_new` written, by the gated form alone.
struct AdalnForward {
  Tokens x, branch;
  PerSample gate, scale, shift;
  Tokens x_new, out;
};

// `x` is what was normalised: the gated form's x_new. `grad_x_new`, `branch` and `gate` are read,
// and `dbranch` and `dgate` written, by the gated form alone.
struct AdalnBackward {
  Tokens grad_x_new, grad_out, x, branch;
  PerSample gate, scale;
  Tokens dx, dbranch;
  PerSample dgate, dscale, dshift;
};

struct AdalnPair {
  void (*forward)(const AdalnForward&, AdalnSizes);
  // `workspace`: as many floats as backward_workspace says
  void (*backward)(const AdalnBackward&, AdalnSizes, float* workspace);
};

struct AdalnKernels {
  AdalnPair plain[kDtypes], gated[kDtypes];
  int64_t (*backward_workspace)(AdalnSizes);
};

MVAR_DECLARE_TABLE(AdalnKernels, adaln)

}  // namespace mvar
