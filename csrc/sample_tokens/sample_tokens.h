// Token sampling in C++ and CUDA: what bindings.cpp calls. The mathematics is in mvar_kernels/ops/sample_tokens/op.py.
//
// Tokens are bit for bit those of reference.py, whatever the instruction set. Results do not depend on
// the number of threads.
#pragma once

#include "common/dtype.h"
#include "common/instruction_set.h"
#include "common/views.h"

namespace mvar {

struct SamplingSizes {
  int64_t B, L, V;
  void* stream;  // on a GPU
};

// What becomes of the logits of an image before they are sampled from.
struct Filters {
  float guidance;
  int64_t top_k;
  double top_p;
  float temperature;
};

// One scale's logits and how to sample from them.
struct Sampling {
  Tokens cond, uncond;  // (B, L, V); uncond.data null: cond is guided already
  const int64_t* image_index;
  int64_t image_index_stride;
  Filters filters;          // of all images, unless there are
  const double* per_image;  // (B, 4), the four numbers of each, or null
  const uint64_t* seed;
  uint32_t scale_index;
  int64_t samples;  // of each position
};

struct SoftEmbedding {
  const void* codebook;  // (V, width)
  int64_t codebook_stride, width;
  float sharpness, temperature;
};

struct SampleTokensKernels {
  // tokens: (B, L, samples); workspace: as many floats as `workspace` says
  void (*sample[kDtypes])(const Sampling&, SamplingSizes, int64_t* tokens, float* workspace);
  // mean: (B, L, width) in the codebook's dtype, the second index
  void (*soft_embedding[kDtypes][kDtypes])(const Sampling&, const SoftEmbedding&, SamplingSizes, void* mean, float* workspace);
  int64_t (*workspace)(int64_t V);
};

MVAR_DECLARE_TABLE(SampleTokensKernels, sample_tokens)

}  // namespace mvar
