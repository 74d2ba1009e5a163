"""adaLN in Triton: one pass over memory, whole rows in registers.

**Forward.** A program takes BLOCK_L tokens of one sample, each a whole row of C channels, masked to the
next power of two. The row is read once: mean, then variance of what is left, then the modulation, all on
registers. The modulation vectors are read once a program, so several rows share them.

**Backward.** With n = (x − mean)·r, r = 1/σ, w = grad·(1+scale):

    dx     = r·(w − mean(w) − n·r·mean(w·(x − mean)))        row by row
    dscale = Σ grad·n,  dshift = Σ grad                      over a sample's tokens
    gated:  d = grad_x' + dx is the gradient at x', hence that of x;  dbranch = gate·d,  dgate = Σ branch·d

mean and r are computed again: the rows are in registers anyway, and storing them would be two more
tensors. Stage 1: a program walks a slab of a sample's tokens, BLOCK_L at a time, writes dx (and dbranch)
and keeps its share of the sums over tokens in float32 registers; it writes them once, as
partials (B, slabs, sums, C). Stage 2 adds the slabs. Slabs follow from (B, L, C) alone and every addition has
its place: gradients are the same from run to run.

**Layout.** A thread owns one 16-byte vector of channels in each of its rows (warps = C / 256 in 16 bits):
accesses are coalesced, sums over tokens need no exchange between threads, and a sum over channels is one
exchange between warps.
"""

from mvar_kernels import tiling
from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.adaln.inputs import AdaLN, GatedAdaLN
from mvar_kernels.ops.adaln.triton.backward import adaln_backward, gated_adaln_backward
from mvar_kernels.ops.adaln.triton.common import WIDEST
from mvar_kernels.ops.adaln.triton.forward import adaln, gated_adaln


def _unsupported(call: AdaLN | GatedAdaLN) -> str | None:
    reason, C = tiling.unsupported_dtype(call.x), call.x.shape[-1]
    if reason is None and isinstance(call, GatedAdaLN):
        reason = tiling.unsupported_dtype(call.branch)
    return f"C={C} is not from 1 to {WIDEST}" if reason is None and not 1 <= C <= WIDEST else reason


adaln_triton = Implementation(_unsupported, adaln, adaln_backward)
gated_adaln_triton = Implementation(_unsupported, gated_adaln, gated_adaln_backward)
