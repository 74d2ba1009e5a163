"""Scale attention in Triton: FlashAttention over a tile plan made once per scale schedule (plan.py).

Forward. A program takes one tile of queries of one head and goes through the blocks of keys that its plan names,
keeping of each row the largest score so far m, the sum of weights l and the sum of weights times values a (float32):

    s = q·kᵀ,   m' = max(m, max s),   p = 2^(c (s − m')),   l' = l·2^(c (m − m')) + Σ p,   a' = a·2^(c (m − m')) + p v

so that a/l is the output and (c m + log2 l)·ln 2 the log of the sum of exponentials; c is all that multiplies q·k, and
log2 e. p takes a power of 2, too, with which all keys' weights add up to at most 1: values may be 3e38. Blocks that the
whole tile sees take no mask, the others the spans of their rows. The tile is the fastest index of the grid, the longest
first: the tiles of a scale read its keys at the same time, from L2, and what is left at the end of the launch are the
short tiles of the last heads.

Query and key norms. A tile holds whole rows, so their lengths are summed from the very tile that is multiplied; no
normalized copy is written. In 16 bits q and k go to the tensor cores as they came and 1/‖q‖, the temperature, the scale
and 1/‖k‖ stay in float32 outside the matmul.

Rotary position embedding. A tile of q or k is read as the two channels of each pair, in halves of D/2 where they lie
so, rotated in float32, after its norm, and rounded to its dtype as models round it. In registers the two lie side by
side wherever they are in memory: of both factors of a score alike, it stays what it is. A tensor core's result has
columns 2i and 2i + 1 of a row in one thread, so that gradients are rotated back, by the transpose, without an exchange.

Backward. With P the weights over their sum, c the scale times the temperature, and unit rows where there is a norm:

    δ = Σ P·(dO·vᵀ),   dS = c P (dO·vᵀ − δ),   dv = Pᵀ dO,   dq = dS k,   dk = dSᵀ q,   dτ = Σ dS·S/c

1. dq: a tile of queries goes through the keys twice: first for m, l and δ, which it also writes, then for dq and its
   part of dτ. The first time, a thread keeps m and the sums of the columns that it holds itself; they meet at the end.
2. dk and dv: a tile of keys goes through the blocks of queries that see them, squares of scores transposed: in bfloat16
   they are made so, and Pᵀ and dSᵀ are left operands straight from registers.
3. dτ: a program adds the parts of one head in their order.

One program takes a scale that attends to itself alone, or several packed ones, through 1 and then 2, where it has at
most 256 tokens, 16 bits and heads of at most 64 (backward._longest_whole): what it reads again comes from the caches,
and memory moves 7 tensors. Otherwise 1 and 2 are kernels with a program a tile, and move 11. Counted for M-VAR-d16's
680 tokens at batch 32 on an H100 (sm_90, Triton 3.7.1, bfloat16, no norms), against two kernels of 8 and 4 warps as
they were before: 312 MB instead of 490, 104 instead of 163 µs at 3.0 TB/s; 118 million warp instructions instead of
253, 256 instead of 548 µs at half of the issue rate; with norms 180 million instead of 342. dq in the registers of one
program for all queries, with dk and dv in the same pass, saves a third of the scores, but 256 queries spill.

Every output has one program that writes it, and every sum an order that the shapes alone decide: no atomics. The
gradient through a row's norm needs the whole row, which is there: dx = (g − x̂(x̂·g))/‖x‖.

Nothing is taken from the forward. P from the log of the sum of exponentials is only as exact as that was rounded, at
the size of the scores, and δ = Σ dO·O as the output: where one key is far ahead dO·vᵀ − δ is a small difference of
large numbers, and a δ from a float16 output put the gradients 60 to 3,000 times out of tolerance. From the very
products that δ is the mean of, it is exactly 0 where a weight is 1. The rows of dS add up to 0, so that what keys have
in common cancels in dq: there dS goes to the tensor cores in parts that hold its float32 bits. Both kernels must find
the same scores where rounding them matters (1e10), see _through_queries. dτ takes scores from the largest one on, small
numbers where the weights are not: a common offset of 100 would be multiplied by what rounding leaves of Σ dS.
"""

from mvar_kernels import tiling
from mvar_kernels.dispatch import Implementation
from mvar_kernels.ops.scale_attention.inputs import Attention
from mvar_kernels.ops.scale_attention.triton.backward import backward
from mvar_kernels.ops.scale_attention.triton.forward import forward


def _unsupported(call: Attention) -> str | None:
    # k and v share its dtype, and no other size is limited: the public function has checked.
    B, _, H, D = call.q.shape
    if (reason := tiling.unsupported_dtype(call.q)) is not None:
        return reason
    if D > 256:
        return f"head dimension D={D} is more than 256"
    return f"batch B={B} or heads H={H} is more than the 65535 that a launch may have" if max(B, H) > 65535 else None


scale_attention_triton = Implementation(_unsupported, forward, backward)
