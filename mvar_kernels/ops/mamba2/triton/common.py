"""What Mamba-2's Triton kernels share: one chunk's convolution, steps Δ and decays.

A chunk is at most 64 consecutive tokens of one batch row. With l_t = Δ_t·A ≤ 0 and its inclusive prefix sums
S_t = l_0 + … + l_t inside the chunk, token s reaches a later token t through

    exp(S_t − S_s) = a_{s+1} … a_t

Prefix sums in plain float32 would cancel: with S near −1000 the difference of two of them is off by 6e-5, and so
is, relatively, the decay. They are therefore kept in two parts: multiples of 2⁻¹⁰, whose sums and differences
are exact (|S| ≤ 64·256 = 2¹⁴ fits 24 bits), and remainders below 2⁻¹⁰, whose sums are below 2⁻⁴ and so lose 2⁻²⁸.
A log decay below −256 counts as −256: float32's exp is 0 from −104 on. Every exponent is masked to −∞
before exp, and is never above 0 otherwise.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar_kernels.dispatch import check_not_capturing
from mvar_kernels.triton_math import divide, exp


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
def load_rows(ptr, stride_l, start, offs_c, mask_c, L, CHUNK: tl.constexpr):
    """A chunk's rows at some channels [CHUNK, BLOCK_C], 0 in rows ≥ L. ptr: the batch row's first token."""
    offs_t = tl.arange(0, CHUNK)[:, None]
    ptr += tl.cast(start, tl.int64) * stride_l
    return tl.load(ptr + offs_t * stride_l + offs_c[None, :], mask=(offs_t < L - start) & mask_c[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride_l, tile, start, offs_c, mask_c, L, CHUNK: tl.constexpr):
    """The reverse of load_rows, in the dtype of the memory."""
    offs_t = tl.arange(0, CHUNK)[:, None]
    mask = (offs_t < L - start) & mask_c[None, :]
    ptr += tl.cast(start, tl.int64) * stride_l
    tl.store(ptr + offs_t * stride_l + offs_c[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv_weights(weight_ptr, bias_ptr, channel, offs_c, mask_c, TAPS: tl.constexpr):
    """A tile's weights, tap by tap, then its bias: TAPS + 1 vectors in float32 [BLOCK_C].

    channel: the tile's first channel of [x, B, C], offs_c counting from it, so that the addresses of a thread
    differ by constants and need no registers of their own.
    """
    weights = ()
    for tap in tl.static_range(TAPS):
        pointers = weight_ptr + channel * TAPS + tap + offs_c * TAPS
        weight = tl.load(pointers, mask=mask_c, other=0.0).to(tl.float32)
        weights = weights + (weight,)  # type: ignore[assignment]
    return weights + (tl.load(bias_ptr + channel + offs_c, mask=mask_c, other=0.0).to(tl.float32),)


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
    first_ptr = xbc_ptr + tl.cast(start - (TAPS - 1), tl.int64) * stride_l + channel
    out = weights[TAPS][None, :]
    for tap in tl.static_range(TAPS):
        token = start - (TAPS - 1) + tap + offs_t
        mask = (token >= 0) & (token < L) & mask_c[None, :]
        out += weights[tap][None, :] * tl.load(first_ptr + tap * stride_l + offs, mask=mask, other=0.0).to(tl.float32)
    if start < TAPS - 1:
        for tap in tl.static_range(TAPS - 1):
            row = start + tap + offs_t
            mask = (row < TAPS - 1) & mask_c[None, :]
            before = tl.load(conv_ptr + channel + row * stride_row + offs_c[None, :], mask=mask, other=0.0)
            out += weights[tap][None, :] * before.to(tl.float32)
    return out


@triton.jit
def conv_silu(
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
    """SiLU of conv_rows, EXACT where xbc is float32.

    start < L always: the branch keeps the compiler from computing the tile again for every register layout in which the
    matmuls need it.
    """
    tile = tl.zeros([CHUNK, offs_c.shape[0]], tl.float32)
    if start < L:
        tile = refined_silu(
            conv_rows(xbc_ptr, stride_l, conv_ptr, stride_row, weights, channel, offs_c, mask_c, start, L, TAPS, CHUNK),
            xbc_ptr.dtype.element_ty == tl.float32,
        )
    return tile


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


@triton.jit
def decay_matrix(coarse, fine, mask, EXACT: tl.constexpr):
    """exp((coarse_t + fine_t) − (coarse_s + fine_s)) [t, s] where mask, else 0.

    Forward direction: inclusive prefix sums, mask t > s. Backward direction (token s reaches an earlier t of
    its scale through a'_t … a'_{s−1}): the negative exclusive prefix sums, mask t < s and same scale.
    """
    exponents = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return exp(tl.where(mask, exponents, float("-inf")), EXACT)


@triton.jit
def forward_decays(delta, A, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """The forward direction's factors inside a chunk: how much of token s's x ⊗ B is in h_t [t, s] for s < t, of
    the h before the chunk in h_t, of s in the chunk's last h, of the h before the chunk in its last.
    """
    offs = tl.arange(0, CHUNK)
    coarse, fine = split_log_decays(delta * A)
    to_coarse, to_fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    all_coarse, all_fine = tl.sum(coarse, 0), tl.sum(fine, 0)
    inside = decay_matrix(to_coarse, to_fine, offs[:, None] > offs[None, :], EXACT) * delta[None, :]
    until_end = exp((all_coarse - to_coarse) + (all_fine - to_fine)) * delta
    return inside, exp(to_coarse + to_fine, EXACT), until_end, exp(all_coarse + all_fine)


@triton.jit
def backward_decays(delta, A, scale, first, last, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """The backward direction's factors, with g = r + Δ' x ⊗ B of the token after the chunk: how much of token s's
    x ⊗ B is in r_t [t, s], of g in r_t, of s in the chunk's own g (at its first token), of g in that.

    scale: of each token; first, last: those of the chunk's first and last token.
    """
    offs = tl.arange(0, CHUNK)
    coarse, fine = split_log_decays(delta * A)
    before_coarse, before_fine = tl.cumsum(coarse, 0) - coarse, tl.cumsum(fine, 0) - fine
    all_coarse, all_fine = tl.sum(coarse, 0), tl.sum(fine, 0)
    mask = (offs[:, None] < offs[None, :]) & (scale[:, None] == scale[None, :])
    inside = decay_matrix(-before_coarse, -before_fine, mask, EXACT) * delta[None, :]
    from_end = exp((all_coarse - before_coarse) + (all_fine - before_fine), EXACT)
    to_start = exp(before_coarse + before_fine, EXACT) * delta
    chunk_decay = tl.where(first == last, exp(all_coarse + all_fine, EXACT), 0.0)
    return inside, tl.where(scale == last, from_end, 0.0), tl.where(scale == first, to_start, 0.0), chunk_decay


@triton.jit
def steps(dt_ptr, stride_l, start, L, CHUNK: tl.constexpr):
    """A chunk's column of dt or Δ in float32 [CHUNK], 0 in rows ≥ L. dt_ptr: the batch row's first, at its head.

    start < L always: the branch keeps the compiler from loading the column again for every register layout.
    """
    column = tl.zeros([CHUNK], tl.float32)
    if start < L:
        pointers = dt_ptr + tl.cast(start, tl.int64) * stride_l + tl.arange(0, CHUNK) * stride_l
        column = tl.load(pointers, mask=tl.arange(0, CHUNK) < L - start, other=0.0).to(tl.float32)
    return column


@triton.jit
def softplus_steps(dt_ptr, stride_l, bias, start, L, CHUNK: tl.constexpr):
    """Δ = softplus(dt + bias) of a chunk, float32 [CHUNK], 0 in rows ≥ L. The branch: as in steps."""
    delta = tl.zeros([CHUNK], tl.float32)
    if start < L:
        pointers = dt_ptr + tl.cast(start, tl.int64) * stride_l + tl.arange(0, CHUNK) * stride_l
        dt = tl.load(pointers, mask=tl.arange(0, CHUNK) < L - start, other=0.0).to(tl.float32)
        delta = tl.where(tl.arange(0, CHUNK) < L - start, softplus(dt + bias), 0.0)
    return delta
