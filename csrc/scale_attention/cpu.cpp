// Attention over a pyramid of token maps on CPU: the matmuls of each block of queries and keys are
// those of common/tile.h, on operands packed once per head (common/panels.h).

#include "scale_attention.h"

#include "backward.h"
#include "forward.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

const ScaleAttentionKernels scale_attention = {{
    {forward<float>, forward_workspace<float>, backward<float>, backward_workspace},
    {forward<bf16>, forward_workspace<bf16>, backward<bf16>, backward_workspace},
}};

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
