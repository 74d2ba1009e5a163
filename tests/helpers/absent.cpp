// In the place of the kernels of an instruction set that the machine of a build lacks: see MVAR_ABSENT in CMakeLists.txt.
#include "adaln/adaln.h"
#include "mamba2/mamba2.h"
#include "sample_tokens/sample_tokens.h"
#include "scale_attention/scale_attention.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

const AdalnKernels adaln{};
const mamba2::Kernels mamba2_kernels{};
const SampleTokensKernels sample_tokens{};
const ScaleAttentionKernels scale_attention{};

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
