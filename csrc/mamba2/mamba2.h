// Mamba-2 in C++ and CUDA: what bindings.cpp calls. The mathematics is in mvar_kernels/ops/mamba2/{scan,mixer}.py.
//
// Results do not depend on the number of threads.
#pragma once

#include "common/dtype.h"
#include "common/instruction_set.h"
#include "common/views.h"

namespace mvar {
namespace mamba2 {

// What is done with y of the scan and g = SiLU(z).
enum class Norm : int64_t {
  kNone,        // y g
  kAfterGate,   // RMSNorm(y g)
  kBeforeGate,  // RMSNorm(y) g
};

// A kernel computes one group: H heads that share B and C (groups.h).
struct Sizes {
  int64_t B, L, H, P, N;
  int64_t directions;  // 2: bidirectional
  int64_t taps;        // of the convolution
  int64_t groups;
  bool channel_D;      // D is (H, P), else (H)
  Norm norm;
  bool limits_dt;      // Δ is at least dt_min and at most dt_max
  float dt_min, dt_max;
  float eps;           // of the RMSNorm
  void* stream;        // on a GPU
  int64_t all_heads;   // of all groups: from a direction's entries of A, A_log and dt_bias to the next's
  int64_t B_channel, C_channel;  // of [x, B, C], counted from the group's first of x

  int64_t D_width() const { return channel_D ? P : 1; }
};

// A run of tokens of one scale that is computed by matmuls: q ≤ kChunk of them.
struct Chunk {
  int64_t first, q;
  bool starts_scale, ends_scale;
};

constexpr int64_t kChunk = 16;

// The sequence as chunks, and the chunks in segments: segment i is chunks segments[i] … segments[i+1]−1.
struct Plan {
  const Chunk* chunks;
  const int64_t* segments;
  int64_t segment_count;
  int64_t longest_segment;  // in chunks
  int64_t chunk_count() const { return segments[segment_count]; }
};

// Δ, or dt before its bias and softplus: (B, L, H), or (B, L, 2, H). On a CPU always float32.
struct StepTokens {
  void* data;
  int64_t batch_stride, row_stride, direction_stride;
  bool is_float32;  // else of the dtype of the other inputs
};

// (B, H, P, N) float32
struct States {
  float* data;
  int64_t batch_stride, head_stride, row_stride;
};

// Parameters are contiguous float32; A, A_log and dt_bias are (directions, all_heads), A < 0.
struct ScanForward {
  Heads x;
  StepTokens dt;
  const float* A;
  Tokens B, C;
  const float* D;
  States initial;
  Heads y;
  States last;
};

struct MixerForward {
  Tokens z, xbc;      // adjacent where there is one group; xbc is (B, L, E+2GN)
  StepTokens dt;
  Tokens conv_state;  // (B, taps−1, E+2GN)
  States initial;
  const float *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *norm_weight;
  Tokens y, last_conv;
  States last;
};

// Gradients are float32 and contiguous.
struct ScanBackward {
  ScanForward forward;  // but for y and last
  Heads grad_y;
  States grad_last;
  Heads dx;
  StepTokens ddt;
  Tokens dB, dC;
  float *dA, *dD;
  States dinitial;
};

struct MixerBackward {
  MixerForward forward;  // but for y, last_conv and last
  Tokens grad_y, grad_last_conv;
  States grad_last;
  Tokens dz, dxbc;
  StepTokens ddt;
  Tokens dconv_state;
  States dinitial;
  float *dconv_weight, *dconv_bias, *ddt_bias, *dA_log, *dD, *dnorm_weight;
};

// Null: there is no such kernel. workspace: as many floats as the function of that pass says, in the memory of the GPU
// where the kernel runs there. On a GPU the plan is not read; rows of zxbcdt and of the convolution's state start at
// multiples of 4 bytes there, those of all else at multiples of 16.
struct Kernels {
  void (*scan_forward[kDtypes])(const ScanForward&, const Sizes&, const Plan&, float* workspace);
  void (*mixer_forward[kDtypes])(const MixerForward&, const Sizes&, const Plan&, float* workspace);
  int64_t (*forward_workspace[kDtypes])(const Sizes&, const Plan&);
  void (*scan_backward)(const ScanBackward&, const Sizes&, const Plan&, float* workspace);
  void (*mixer_backward)(const MixerBackward&, const Sizes&, const Plan&, float* workspace);
  int64_t (*backward_workspace)(const Sizes&, const Plan&);
};

}  // namespace mamba2

MVAR_DECLARE_TABLE(mamba2::Kernels, mamba2_kernels)

}  // namespace mvar
