"""What the forward and backward kernels of scale attention share (see the package)."""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels.tiling import Tile, dot_block
from mvar_kernels.triton_math import LOG2_E, exp, exp2

MAX_LOG_TEMPERATURE = tl.constexpr(4.605170185988092)  # log 100
NORM_EPS = tl.constexpr(1e-12)
# Of float32: a row of which no key was seen yet has its largest score here, and no difference with it is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Of exponents, where it may be 0: −∞ times it must stay −∞.
LEAST_FACTOR = tl.constexpr(1e-37)
# The exponent of a weight that is not there: finite, as the temperature's gradient multiplies it by zero.
ABSENT = tl.constexpr(-1e30)


def tile(m: int, n: int, warps: int, stages: int) -> Tile:
    """m queries by n keys."""
    return Tile({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


Candidates = Mapping[int, tuple[Tile, ...]]


def candidates(q: Tensor, halves: Candidates, single: Candidates) -> tuple[Tile, ...]:
    """The tiles for q's dtype and head dimension."""
    return (single if q.itemsize == 4 else halves)[max(64, dot_block(q.shape[-1]))]


def shape_class(q: Tensor, cos: Tensor | None) -> str:
    rotary = "" if cos is None else " rotary"
    return f"D{dot_block(q.shape[-1])} {str(q.dtype).removeprefix('torch.')}{rotary}"


def strides(*tensors: Tensor) -> list[int]:
    """Batch, token and head stride of each; the last dimension is contiguous."""
    return [s for t in tensors for s in t.stride()[:3]]


@triton.jit
def load_tile(tiles_ptr):
    """(first row, rows, lo, full_lo, full_hi, hi) of this program's tile, see plan.Plan."""
    tile_ptr = tiles_ptr + 6 * tl.program_id(0)
    return (
        tl.load(tile_ptr),
        tl.load(tile_ptr + 1),
        tl.load(tile_ptr + 2),
        tl.load(tile_ptr + 3),
        tl.load(tile_ptr + 4),
        tl.load(tile_ptr + 5),
    )


@triton.jit
def key_head(h, GROUP: tl.constexpr):
    """The head of keys and values that GROUP heads of queries share."""
    if GROUP > 1:
        h = h // GROUP
    return h


@triton.jit
def seen_blocks(lo, full_hi, hi, key_lengths_ptr, b, BLOCK_N: tl.constexpr):
    """(full_hi, hi) of a tile of queries, of the keys that there are in the sample."""
    if key_lengths_ptr is not None:
        hi = tl.maximum(tl.minimum(tl.load(key_lengths_ptr + b), hi), lo).to(tl.int32)
        full_hi = tl.minimum(full_hi, lo + (hi - lo) // BLOCK_N * BLOCK_N)
    return full_hi, hi


@triton.jit
def row_offsets(offs, stride, BLOCK_D: tl.constexpr):
    """Offsets of whole rows; 64-bit, as one step may be the width of a packed projection times the batch."""
    return offs.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]  # [BLOCK, BLOCK_D]


@triton.jit
def row_mask(inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    return inside[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]  # [BLOCK, BLOCK_D]


@triton.jit
def load_rows(ptr, offs, stride, hi, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `offs` of a head, zero from row `hi` (where MASKED) and from column HEAD_DIM on."""
    ptrs = ptr + row_offsets(offs, stride, BLOCK_D)
    if MASKED:
        rows = tl.load(ptrs, mask=row_mask(offs < hi, HEAD_DIM, BLOCK_D), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        rows = tl.load(ptrs, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    else:
        rows = tl.load(ptrs)
    return rows  # [BLOCK, BLOCK_D]


@triton.jit
def square_sums(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)  # [BLOCK]


@triton.jit
def inverse_norm(x):
    """1/max(‖x‖, eps) of each row. A score of 100 multiplies its error: in float32 it is exactly rounded, twice; in
    16 bits it is one instruction, where the slow paths of the others would take the registers of half a tile."""
    if x.dtype == tl.float32:
        inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square_sums(x)), NORM_EPS))
    else:
        inverse = tl.rsqrt(tl.maximum(square_sums(x), NORM_EPS * NORM_EPS))
    return inverse  # [BLOCK]


@triton.jit
def unit_rows(x):
    """Rows over their lengths, in the dtype of x: an operand of a matmul."""
    if x.dtype == tl.float32:
        x = tl.div_rn(x, tl.maximum(tl.sqrt_rn(square_sums(x)), NORM_EPS)[:, None])
    else:
        x = (x.to(tl.float32) * inverse_norm(x)[:, None]).to(x.dtype)
    return x  # [BLOCK, BLOCK_D]


@triton.jit
def operand(q, factor, NORM: tl.constexpr):
    """A product's left operand, and what makes exponents of 2 of the product's rows: `factor` and log2 e, over the
    rows' lengths.

    Rows in 16 bits stay as they came: rounded unit vectors would cost a score of 100 half a unit. In float32 the
    operand takes all but log2 e, as the reference does it: every factor less is a rounding of the scores less.
    """
    if q.dtype == tl.float32:
        if NORM:
            q = unit_rows(q)
        q *= factor
        factors = tl.full([q.shape[0]], LOG2_E, tl.float32)
    else:
        factors = tl.full([q.shape[0]], factor * LOG2_E, tl.float32)
        if NORM:
            factors *= inverse_norm(q)
    return q, factors


@triton.jit
def scores_of(rows, columns, NORM: tl.constexpr):
    """rows · columnsᵀ, over the columns' lengths; in which precision: see `operand`."""
    if NORM:
        if columns.dtype == tl.float32:
            scores = tl.dot(rows, tl.trans(unit_rows(columns)), input_precision="ieee")
        else:
            scores = tl.dot(rows, tl.trans(columns)) * inverse_norm(columns)[None, :]
    else:
        scores = tl.dot(rows, tl.trans(columns), input_precision="ieee")
    return scores  # [BLOCK_ROWS, BLOCK_COLUMNS]


@triton.jit
def exponents_of(scores, peak, factor):
    """log2 of the weights, at most 0. The difference comes first: of scores of 1e10 the product's rounding alone is
    hundreds, and would make exponents positive."""
    return (scores - peak) * factor


@triton.jit
def through_norm(grad, x):
    """The gradient of rows x, from that of x/max(‖x‖, eps): without its part along x, where ‖x‖ is above eps."""
    inverse = inverse_norm(x)[:, None]
    unit = x.to(tl.float32) * inverse
    along = tl.where(square_sums(x) > NORM_EPS * NORM_EPS, tl.sum(unit * grad, 1), 0.0)
    return (grad - unit * along[:, None]) * inverse  # [BLOCK, BLOCK_D]


@triton.jit
def score_factor(scale, log_temperature_ptr, h, NORM: tl.constexpr):
    """What multiplies q·k, but for the norms."""
    factor = scale
    if NORM:
        temperature = tl.load(log_temperature_ptr + h).to(tl.float32)
        # Below -110 it is 0. Scores of 100 multiply its error: hardware's exp would cost weights 1e-5.
        factor *= exp(tl.maximum(tl.minimum(temperature, MAX_LOG_TEMPERATURE), -110.0))
    return factor


@triton.jit
def load_spans(spans_ptr, Lq, offs_m, mask_m):
    """The keys [lo, hi) that queries see, see plan.Plan; none from the end of the tile on."""
    lo = tl.load(spans_ptr + offs_m, mask=mask_m, other=0)
    hi = tl.load(spans_ptr + Lq + offs_m, mask=mask_m, other=0)
    return lo, hi  # [BLOCK_M]


@triton.jit
def where_seen(scores, absent, spans_ptr, Lq, offs_m, mask_m, offs_n, hi, MASKED: tl.constexpr):
    """Scores [BLOCK_M, BLOCK_N], `absent` where the query does not see the key; without spans keys from `hi` on."""
    if MASKED and spans_ptr is None:
        scores = tl.where((offs_n < hi)[None, :], scores, absent)
    elif MASKED:
        key_lo, key_hi = load_spans(spans_ptr, Lq, offs_m, mask_m)
        seen = (offs_n[None, :] >= key_lo[:, None]) & (offs_n[None, :] < key_hi[:, None])
        scores = tl.where(seen, scores, absent)
    return scores


@triton.jit
def next_weights(scores, peak, factor, EXACT: tl.constexpr):
    """Weights against the largest score so far, what earlier ones shrink by, and that score; from the block's scores
    and the largest one before."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = exp2(exponents_of(scores, new_peak[:, None], factor[:, None]), EXACT)
    return weights, exp2(exponents_of(peak, new_peak, factor), EXACT), new_peak
