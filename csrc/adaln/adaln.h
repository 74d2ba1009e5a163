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

// What a call may have besides (mvar_kernels/ops/adaln/options.py). There `scale` is the factor without `plus`, `shift`
// the offset; both, and all else of the modulation, may be missing: then the data is null.
struct AdalnOptions {
  bool rms;
  float plus;
  bool wide_vectors, wide_tokens;  // float, and not the output's dtype: what is per sample, and what is per token
};

// `branch` and `gate` are read, and `x_new` written, by the gated form alone.
struct AdalnForward {
  Tokens x, branch;
  PerSample gate, scale, shift;
  Tokens x_new, out;
  AdalnOptions options;
  Tokens token_gate, token_scale, token_shift;
};

// `x` is what was normalised: the gated form's x_new. `grad_x_new`, `branch` and `gate` are read,
// and `dbranch` and `dgate` written, by the gated form alone.
struct AdalnBackward {
  Tokens grad_x_new, grad_out, x, branch;
  PerSample gate, scale;
  Tokens dx, dbranch;
  PerSample dgate, dscale, dshift;  // with options, of float
  AdalnOptions options;
  PerSample shift;  // read beside token_scale alone
  Tokens token_gate, token_scale;
  Tokens token_dgate, token_dscale, token_dshift;
};

struct AdalnPair {
  void (*forward)(const AdalnForward&, AdalnSizes);
  // `workspace`: as many floats as backward_workspace says
  void (*backward)(const AdalnBackward&, AdalnSizes, float* workspace);
};

struct AdalnKernels {
  AdalnPair plain[kDtypes], gated[kDtypes];
  // by the dtype of x and that of the output, and of the branch, if there is one
  AdalnPair with_options[kDtypes][kDtypes];
  int64_t (*backward_workspace)(AdalnSizes);
};

MVAR_DECLARE_TABLE(AdalnKernels, adaln)

}  // namespace mvar
