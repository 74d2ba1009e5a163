// mamba2_mixer on a GPU: what bindings.cpp calls. Forward direction, P = N = 64, four taps, an even number of heads.
#pragma once

#include "common/dtype.h"
#include "mamba2/mamba2.h"

namespace mvar {
namespace mamba2 {

// In A's place the arguments hold A_log: making A of it would cost a launch. Rows of zxbcdt and of the convolution's
// state start at multiples of 4 bytes, those of all else at multiples of 16.
struct CudaMixer {
  // workspace: as many bytes as workspace_bytes says
  void (*forward[kDtypes])(const MixerForward&, const Sizes&, void* workspace, void* stream);
  int64_t (*workspace_bytes[kDtypes])(const Sizes&);
};

}  // namespace mamba2

MVAR_DECLARE_TABLE(mamba2::CudaMixer, mamba2_mixer)

}  // namespace mvar
