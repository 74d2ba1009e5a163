"""What Mamba-2's Triton kernels share: one chunk's convolution, steps Δ and decays.

A chunk is at most 64 consecutive tokens of one batch row. With l_t = Δ_t·A ≤ 0 and its inclusive prefix sums
S_t = l_0 + … + l_t inside the chunk, token s reaches a later token t through

    exp(S_t − S_s) = a_{s+1} … a_t

Prefix sums in plain float32 would cancel: with S near −1000 the difference of two of them is off by 6e-5, and so
is, relatively, the decay. For float32 inputs they are therefore kept in two parts: multiples of 2⁻¹⁰, whose sums and
differences are exact (|S| ≤ 64·256 = 2¹⁴ fits 24 bits), and remainders below 2⁻¹⁰, whose sums are below 2⁻⁴ and so
lose 2⁻²⁸; for 16-bit inputs the two are added up, once all sums are taken. A log decay below −256 counts as −256:
float32's exp is 0 from −104 on. Every exponent is masked to −∞ before exp, and is never above 0 otherwise.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels.dispatch import check_not_capturing
from mvar_kernels.ops.mamba2.inputs import Mixer
from mvar_kernels.triton_math import divide, exp, widen

NO_LIMITS: dict[str, float | None] = {"DT_MIN": None, "DT_MAX": None}
# What is done with y of the mixer's scan: y · SiLU(z), RMSNorm(y · SiLU(z)), RMSNorm(y) · SiLU(z).
ONLY_GATE = tl.constexpr(0)
AFTER_GATE = tl.constexpr(1)
BEFORE_GATE = tl.constexpr(2)


def norm_kind(call: Mixer) -> int:
    """Which of them."""
    if call.norm_weight is None:
        return ONLY_GATE.value
    return BEFORE_GATE.value if call.norm_before_gate else AFTER_GATE.value


def limits(call: Mixer) -> dict[str, float | None]:
    """The limits of Δ, None where it has none."""
    return {"DT_MIN": call.dt_min, "DT_MAX": call.dt_max} if call.limits_dt else NO_LIMITS


@cache  # for good: a captured CUDA graph reads it where it lay at capture
def scale_of_tokens(scales: tuple[int, ...], device: torch.device) -> Tensor:
    """(L,) int32: the number of each token's scale."""
    check_not_capturing("ssd_scan, mamba2_mixer", device)
    numbers = [number for number, length in enumerate(scales) for _ in range(length)]
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@triton.jit
def clamped(v):
    """v, but −85 where less: there σ and SiLU are 0 to 10⁻³⁵, and exp(−v) has a normal reciprocal. NaN stays."""
    return tl.maximum(v, -85.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _refined_quotient(x, y):
    """x / y of normal numbers to a little more than its rounding: by a fast reciprocal, and a step of Newton's."""
    inverse = 1.0 / y
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, y, x), inverse, quotient)


@triton.jit
def sigmoids(v, EXACT: tl.constexpr):
    """σ(v), and 1 − σ(v) without its cancellation, of clamped v."""
    e = exp(-v, EXACT)
    if EXACT:
        open = _refined_quotient(1.0, 1.0 + e)
    else:
        open = 1.0 / (1.0 + e)
    return open, e * open


@triton.jit
def silu(v, EXACT: tl.constexpr):
    return divide(v, 1.0 + exp(-v, EXACT), EXACT)


@triton.jit
def refined_silu(v, EXACT: tl.constexpr):
    """SiLU with a refined quotient in any case: what 16-bit numbers add to the state is float32, too."""
    v = clamped(v)
    return _refined_quotient(v, 1.0 + exp(-v, EXACT))


@triton.jit
def softplus(v):
    """log(1 + exp(v)), to float32's precision relative to its own value, however small.

    log(1 + e) = 2·artanh(e / (2 + e)) with e = exp(−|v|) ≤ 1: a series in squares of at most 1/9, whose ninth
    term is below 2⁻²⁸ of the first. tl.log(1 + e) would lose a small e against the 1.
    """
    e = exp(-tl.abs(v))
    s = tl.div_rn(e, 2.0 + e)
    q = s * s
    series = 1.0 / 15.0 + q * (1.0 / 17.0)
    series = 1.0 / 13.0 + q * series
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return tl.where(v > 0, v, 0.0) + 2.0 * (s + s * q * series)


@triton.jit
def group_of(b, GROUPS: tl.constexpr):
    """The batch row of b, which counts the groups of all of them, and the group."""
    group = 0
    if GROUPS > 1:
        group = b % GROUPS
        b = b // GROUPS
    return b, group


@triton.jit
def limited(delta, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr):
    """Δ between its limits, which are None where it has none; NaN stays."""
    if DT_MIN is not None:
        delta = tl.where(delta < DT_MIN, DT_MIN, tl.where(delta > DT_MAX, DT_MAX, delta))
    return delta


@triton.jit
def load_vector(ptrs, mask):
    """Numbers, 0 where masked; a mask that is None is not needed."""
    if mask is None:
        vector = tl.load(ptrs)
    else:
        vector = tl.load(ptrs, mask=mask, other=0.0)
    return vector


@triton.jit
def load_skip(D_ptr, head, first_p, offs_p, mask_p, P: tl.constexpr, CHANNEL_D: tl.constexpr):
    """D of a head and of its channels from first_p on: one is 0, or where no matmul's diagonal can hold it, None."""
    if CHANNEL_D:
        skip = (0.0, load_vector(D_ptr + head * P + first_p + offs_p, mask_p).to(tl.float32))
    else:
        skip = (tl.load(D_ptr + head).to(tl.float32), None)
    return skip


@triton.jit
def load_tile(ptrs, mask_rows, mask_columns):
    """A tile of rows and columns, 0 where masked; a mask [rows, 1] or [columns] that is None is not needed."""
    if mask_rows is None and mask_columns is None:
        tile = tl.load(ptrs)
    elif mask_columns is None:
        tile = tl.load(ptrs, mask=mask_rows, other=0.0)
    elif mask_rows is None:
        tile = tl.load(ptrs, mask=mask_columns[None, :], other=0.0)
    else:
        tile = tl.load(ptrs, mask=mask_rows & mask_columns[None, :], other=0.0)
    return tile


@triton.jit
def load_rows(ptr, stride_l, start, offs_c, mask_c, L, CHUNK: tl.constexpr):
    """A chunk's rows at some channels [CHUNK, BLOCK_C], 0 in rows ≥ L. ptr: the batch row's first token."""
    offs_t = tl.arange(0, CHUNK)[:, None]
    ptr += tl.cast(start, tl.int64) * stride_l
    return load_tile(ptr + offs_t * stride_l + offs_c[None, :], offs_t < L - start, mask_c)


@triton.jit
def store_tile(ptrs, tile, mask_rows, mask_columns):
    """The reverse of load_tile, in the dtype of the memory."""
    tile = tile.to(ptrs.dtype.element_ty)
    if mask_rows is None and mask_columns is None:
        tl.store(ptrs, tile)
    elif mask_columns is None:
        tl.store(ptrs, tile, mask=mask_rows)
    elif mask_rows is None:
        tl.store(ptrs, tile, mask=mask_columns[None, :])
    else:
        tl.store(ptrs, tile, mask=mask_rows & mask_columns[None, :])


@triton.jit
def store_rows(ptr, stride_l, tile, start, offs_c, mask_c, L, CHUNK: tl.constexpr):
    """The reverse of load_rows."""
    offs_t = tl.arange(0, CHUNK)[:, None]
    ptr += tl.cast(start, tl.int64) * stride_l
    store_tile(ptr + offs_t * stride_l + offs_c[None, :], tile, offs_t < L - start, mask_c)


@triton.jit
def conv_weights(weight_ptr, bias_ptr, channel, offs_c, mask_c, TAPS: tl.constexpr):
    """A tile's weights, tap by tap, then its bias: TAPS + 1 vectors in float32 [BLOCK_C].

    channel: the tile's first channel of [x, B, C], offs_c counting from it, so that the addresses of a thread
    differ by constants and need no registers of their own.
    """
    weights = ()
    for tap in tl.static_range(TAPS):
        pointers = weight_ptr + channel * TAPS + tap + offs_c * TAPS
        weights = weights + (load_vector(pointers, mask_c).to(tl.float32),)  # type: ignore[assignment]
    return weights + (load_vector(bias_ptr + channel + offs_c, mask_c).to(tl.float32),)


@triton.jit
def conv_rows(
    xbc_ptr,
    stride_l,
    conv_ptr,
    stride_row,
    weights,
    channel,
    offs_c,
    mask_c,
    start,
    L,
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Causal depth-wise convolution with bias, before SiLU: float32 [CHUNK, BLOCK_C], finite also in rows ≥ L.

    xbc_ptr: the batch row's first token, first channel of [x, B, C]; conv_ptr: its TAPS−1 rows before the first
    token. weights, channel, offs_c, mask_c: as in conv_weights; start: the chunk's first token.
    """
    offs_t = tl.arange(0, CHUNK)[:, None]
    offs = offs_t * stride_l + offs_c[None, :]
    xbc_ptr += tl.cast(start, tl.int64) * stride_l + channel
    out = weights[TAPS][None, :] + tl.zeros([CHUNK, offs_c.shape[0]], tl.float32)
    if (start >= TAPS - 1) & (start + CHUNK <= L):
        for tap in tl.static_range(TAPS):
            rows = load_tile(xbc_ptr + (tap - TAPS + 1) * stride_l + offs, None, mask_c)
            out += weights[tap][None, :] * widen(rows)
    else:
        # In 16 bits one load chooses between both, which takes fewer registers; float32 adds the state's rows last.
        ONE_LOAD: tl.constexpr = xbc_ptr.dtype.element_ty != tl.float32
        for tap in tl.static_range(TAPS):
            token = start + tap - (TAPS - 1) + offs_t
            ptrs, mask = xbc_ptr + (tap - TAPS + 1) * stride_l + offs, token < L
            if ONE_LOAD:
                before = conv_ptr + channel + (token + TAPS - 1) * stride_row + offs_c[None, :]
                ptrs = tl.where(token < 0, before, ptrs)
            else:
                mask = mask & (token >= 0)
            out += weights[tap][None, :] * widen(load_tile(ptrs, mask, mask_c))
        if start < TAPS - 1 and not ONE_LOAD:
            for tap in tl.static_range(TAPS - 1):
                row = start + tap + offs_t
                before = conv_ptr + channel + row * stride_row + offs_c[None, :]
                out += weights[tap][None, :] * widen(load_tile(before, row < TAPS - 1, mask_c))
    return out


@triton.jit
def finite_rate(A):
    """A = −exp(A_log) may be −∞, and 0·∞ would be NaN in rows ≥ L, whose Δ is 0."""
    return tl.where(A < -3.4028234663852886e38, -3.4028234663852886e38, A)


@triton.jit
def split_log_decays(log_a):
    """l_t as a multiple of 2⁻¹⁰ and a remainder in [0, 2⁻¹⁰). Rows ≥ L must be 0."""
    log_a = tl.where(log_a < -256.0, -256.0, log_a)
    coarse = tl.floor(log_a * 1024.0) * (1.0 / 1024.0)
    return coarse, log_a - coarse
