// Mamba-2 on CPU: see chunk.h and chunk_backward.h for the arithmetic, forward.h and backward.h for the order
// of work.

#include "mamba2/cpu/mixer.h"
#include "mamba2/cpu/mixer_backward.h"
#include "mamba2/cpu/scan.h"
#include "mamba2/cpu/scan_backward.h"

namespace mvar {
namespace MVAR_INSTRUCTION_SET {

const mamba2::Kernels mamba2_kernels = {
    {scan<float>, scan<bf16>},
    {mixer<float>, mixer<bf16>},
    {forward_workspace, forward_workspace},
    scan_backward,
    mixer_backward,
    backward_workspace,
};

}  // namespace MVAR_INSTRUCTION_SET
}  // namespace mvar
