"""One chunk of a head's scan: its decays, its outputs and the state after it.

With l_t = Δ_t·A ≤ 0, S_t = l_0 + … + l_t inside the chunk, and h the state before it:

    y_t = Σ_{s ≤ t} (C_t·B_s) exp(S_t − S_s) Δ_s x_s + exp(S_t) h C_t + D x_t
    h ← exp(S_end) h + Σ_s exp(S_end − S_s) Δ_s x_s ⊗ B_s

The backward direction is the mirror image, with its own Δ and A: S_t = l_t + … + l_last, pairs s > t of one scale, and
the state that comes from the right. So both directions have the same factors, of three vectors [CHUNK] that depend on
S and Δ alone, and Δ. For 16-bit inputs they are exponents of 2, each rounded once (R = S·log₂e):

    R_t,   T_t = R_t − log₂Δ_t,   U_t = R_end − T_t
    Δ_s exp(S_t − S_s) = 2^(R_t − T_s),   Δ_s exp(S_end − S_s) = 2^U_s

R_t − T_s cancels where decays are fast, but only y depends on it, which has 16 bits. float32 has S_t in two parts,
whose differences do not cancel (split_log_decays), and Δ_t.

Precision. Products that give y round their operands to bfloat16, in float16 to tf32, which is as precise and has
float32's range: C·B, h and x after its convolution leave float16's where y fits. The mixer's scores have D and
Δ_t C_t·B_t on the diagonal, from float32, rounded once: where Δ is large they are all there is to y, a factor common to
a head's channels, which RMSNorm scales up again where it nearly cancels. The state is an output in float32. It stays
float32 from chunk to chunk; what a chunk adds to it is made of two bfloat16 parts of each factor, without the product
of the small parts: errors of 2⁻¹⁸ of a product, where three tf32 products leave 2⁻²³ in twice the time. It is added to
the decayed state outside the tensor cores, whose accumulators truncate.
"""

import triton
import triton.language as tl

from mvar_kernels.ops.mamba2.triton.common import split_log_decays
from mvar_kernels.triton_math import INTERPRETED, LOG2_E, as_bfloat16, bfloat16_parts, exp

VECTORS = tl.constexpr(4)


@triton.jit
def operand(v, DTYPE: tl.constexpr):
    """v as an operand of a matmul that gives y. tf32 is rounded here, as tensor cores truncate; NaN and inf stay."""
    if DTYPE == tl.float32:
        rounded = v
    elif DTYPE == tl.bfloat16:
        rounded = v
        if v.dtype == tl.float32 or INTERPRETED:
            rounded = as_bfloat16(v.to(tl.float32))
    elif v.dtype == tl.float16:
        rounded = v.to(tl.float32)
    else:
        bits = (v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        rounded = tl.where(tl.abs(v) < 3.4e38, bits.to(tl.float32, bitcast=True), v)
    return rounded


@triton.jit
def decay_vectors(delta, A, REVERSE: tl.constexpr, EXACT: tl.constexpr):
    """The vectors of one direction along axis 0 and their entries at its end, where the state leaves the chunk.

    delta: Δ, 0 in rows ≥ L; A: finite.
    """
    coarse, fine = split_log_decays(delta * A)
    end_coarse, end_fine = tl.sum(coarse, 0), tl.sum(fine, 0)
    coarse, fine = tl.cumsum(coarse, 0, reverse=REVERSE), tl.cumsum(fine, 0, reverse=REVERSE)
    if EXACT:
        vectors, end = (coarse, fine, delta, delta), (end_coarse, end_fine)
    else:
        sums, step = (coarse + fine) * LOG2_E, tl.log2(delta)
        until = ((end_coarse - coarse) + (end_fine - fine)) * LOG2_E + step
        vectors, end = (sums, sums - step, until, delta), ((end_coarse + end_fine) * LOG2_E, end_fine)
    return vectors, end


@triton.jit
def load_decays(ptr, start, offs, CHUNK: tl.constexpr):
    """The entries `offs` of a chunk's vectors, from a head's (chunks, VECTORS, CHUNK)."""
    ptr += start * VECTORS + offs
    return tl.load(ptr), tl.load(ptr + CHUNK), tl.load(ptr + 2 * CHUNK), tl.load(ptr + 3 * CHUNK)


@triton.jit
def pair_decays(vectors, mask, EXACT: tl.constexpr):
    """How much of token s's x ⊗ B is in the state of t [t, s], where mask."""
    if EXACT:
        coarse, fine = vectors[0], vectors[1]
        exponents = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        decays = exp(tl.where(mask, exponents, float("-inf"))) * vectors[2][None, :]
    else:
        decays = tl.exp2(tl.where(mask, vectors[0][:, None] - vectors[1][None, :], float("-inf")))
    return decays


@triton.jit
def decay_of_state(vectors, EXACT: tl.constexpr):
    """How much of the state that enters the chunk is in that of t."""
    if EXACT:
        decays = exp(vectors[0] + vectors[1])
    else:
        decays = tl.exp2(vectors[0])
    return decays


@triton.jit
def decay_until(end, vectors, EXACT: tl.constexpr):
    """How much of token s's x ⊗ B is in the state that leaves the chunk. end: the vectors' entries there."""
    if EXACT:
        decays = exp((end[0] - vectors[0]) + (end[1] - vectors[1])) * vectors[2]
    else:
        decays = tl.exp2(vectors[2])
    return decays


@triton.jit
def scores_of(C, B, decays, diagonal, DTYPE: tl.constexpr):
    """(C_t·B_s)·decays[t, s], plus the diagonal where t = s: an operand of the matmul with x."""
    PRECISION: tl.constexpr = "tf32" if DTYPE == tl.float16 else "ieee"
    offs = tl.arange(0, C.shape[0])
    added = tl.where(offs[:, None] == offs[None, :], diagonal, 0.0)
    scores = tl.dot(operand(C, DTYPE), tl.trans(operand(B, DTYPE)), input_precision=PRECISION)
    return operand(tl.fma(scores, decays, added), DTYPE)


@triton.jit
def from_state(C, state, decays, DTYPE: tl.constexpr):
    """decays_t · state C_t [t, BLOCK_P]; state: an operand."""
    PRECISION: tl.constexpr = "tf32" if DTYPE == tl.float16 else "ieee"
    return tl.dot(operand(C, DTYPE), tl.trans(state), input_precision=PRECISION) * decays[:, None]


@triton.jit
def add_from_tokens(y, scores, x, DTYPE: tl.constexpr):
    """y + scores x, of operands."""
    PRECISION: tl.constexpr = "tf32" if DTYPE == tl.float16 else "ieee"
    return tl.dot(scores, x, y, input_precision=PRECISION)


@triton.jit
def advance(state, chunk_decay, x, weights, B, B_low, DTYPE: tl.constexpr):
    """chunk_decay · state + (x ⊙ weights)ᵀ (B + B_low) in float32 [BLOCK_P, BLOCK_N]; B_low: None, or B's low part."""
    weighted = x * weights[:, None]
    if DTYPE == tl.float32:
        added = tl.dot(tl.trans(weighted), B, input_precision="ieee")
    else:
        high, low = bfloat16_parts(weighted)
        if DTYPE == tl.float16:
            B, B_low = bfloat16_parts(B.to(tl.float32))
        else:
            B = operand(B, DTYPE)
        added = tl.dot(tl.trans(low), B, input_precision="ieee")
        if B_low is not None:
            added = tl.dot(tl.trans(high), operand(B_low, tl.bfloat16), added, input_precision="ieee")
        added = tl.dot(tl.trans(high), B, added, input_precision="ieee")
    return tl.fma(state, chunk_decay, added)


@triton.jit
def scale_numbers(scale_ptr, start, L, CHUNK: tl.constexpr):
    """A chunk's scale numbers [CHUNK], those of its first and last token, and whether it continues to the left."""
    offs = start + tl.arange(0, CHUNK)
    scale = tl.load(scale_ptr + offs, mask=offs < L, other=-1)
    first = tl.load(scale_ptr + start)
    last = tl.load(scale_ptr + start + CHUNK - 1, mask=start + CHUNK <= L, other=-2)
    continues = tl.load(scale_ptr + start - 1, mask=start > 0, other=-2) == first
    return scale, first, last, continues
