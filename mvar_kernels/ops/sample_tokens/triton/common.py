"""Parts of the Triton kernels: one row of codes at a time, held in the registers of one program.

Noise and weights: the same bits as noise.py, which explains them. Every operation here is one of its operations, in
its order and rounded on its own, so launches must set enable_fp_fusion=False; tl.fma is used where its product
is exact, or where bits do not matter. Only x / 3, 5 and 7 are made of a multiplication and an exact remainder, which
gives the same and spares the reciprocal, the checks and the branch of tl.div_rn.

Four codes share a Philox counter, so a row [BLOCK_V] is also taken as four quarters [BLOCK_V / 4], code % 4 in each: a
counter is worked out once, and its four words stay in the thread that has the four codes. Long chains of operations
go through the quarters one after the other, as the compiler would hold every intermediate of a whole row.

Filters: a threshold search without a sort. Both look for the largest logit such that what lies at or above
it, a count of codes or a sum of weights, is at least `need`. A round cuts the interval [low, high] that the
answer lies in and measures what lies at or above the cut, one reduction of the row.
"""

import math

import triton
import triton.language as tl

# ln 2 in two parts, as in noise.py.
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(math.log(2) - 0.693145751953125)
MINUS_LN2 = tl.constexpr(-math.log(2))
LOG2_E = tl.constexpr(math.log2(math.e))
LARGEST_EXPONENTIAL = tl.constexpr(math.log(2) * 25)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
WORD_UNIT = tl.constexpr(2.0**-32)
WEIGHT_ONE = tl.constexpr(2**30)
INFINITY = tl.constexpr(math.inf)
LARGEST = tl.constexpr((2 - 2**-23) * 2.0**127)
TOLERANCE = tl.constexpr(math.exp(2**-9))

# With the first cuts as they come and the others moved to a logit (largest_threshold), 4,096 normal logits take
# ten rounds for top-k = 900 and seven for top-p = 0.96 thereafter; a bisection of float32 keys takes 32.
COUNT_ROUNDS = tl.constexpr(12)
WEIGHT_ROUNDS = tl.constexpr(4)


@triton.jit
def quarters(row):
    """Codes 4i, 4i+1, 4i+2 and 4i+3 of [BLOCK_V], each [BLOCK_V / 4]."""
    even, odd = tl.split(tl.reshape(row, (row.shape[0] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def join(first, second, third, fourth):
    """The row [BLOCK_V] of four quarters."""
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit
def below_infinity(logits):
    """+∞ and NaN as the largest finite number."""
    return tl.where(logits <= LARGEST, logits, LARGEST)


@triton.jit
def largest_logit(highest):
    """What a row's logits count relative to: its largest, or a finite number where all are −∞."""
    return tl.maximum(highest, -LARGEST)


@triton.jit
def divide(x, DIVISOR: tl.constexpr, POWER: tl.constexpr):
    """x / DIVISOR, rounded once, for DIVISOR = POWER ± 1 and POWER a power of two.

    The remainder of the first quotient is exact: each of its two terms nearly cancels. No quotient lies near enough
    to the middle of two floats for the last two roundings to matter; a test goes through all significands.
    """
    inverse: tl.constexpr = 1.0 / DIVISOR
    quotient = x * inverse
    remainder = tl.fma(quotient, -POWER, x) - quotient * (DIVISOR - POWER)
    return quotient + remainder * inverse


@triton.jit
def softmax_weight(x):
    """noise.exp_negative in multiples of 2⁻³⁰, so that sums are exact in any order; 0 for NaN.

    Nothing is left of exp where exp_negative ends, and a power of two may be multiplied sooner or later.
    """
    clamped = tl.where(x >= -87.0, x, -87.0)
    n = tl.floor(clamped * LOG2_E + 0.5)
    r = tl.fma(n, -LN2_HIGH, clamped) - n * LN2_LOW
    third = divide(r, 3.0, 4.0)
    p = divide(r, 7.0, 8.0) + 1.0
    p = tl.fma(p * third, 0.5, 1.0)
    p = p * divide(r, 5.0, 4.0) + 1.0
    p = tl.fma(p * r, 0.25, 1.0)
    p = p * third + 1.0
    p = tl.fma(p * r, 0.5, 1.0)
    p = p * r + 1.0
    return (p * ((n.to(tl.int32) + (127 + 30)) << 23).to(tl.float32, bitcast=True)).to(tl.int32)


@triton.jit
def log(x):
    """Natural logarithm of normal positive values."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - SQRT_HALF_BITS) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    series = z * (z * (z * (z * (2 / 9) + 2 / 7) + 2 / 5) + 2 / 3)
    exponent = e.to(tl.float32)
    return tl.fma(exponent, LN2_HIGH, s * series + exponent * LN2_LOW + s * 2.0)


@triton.jit
def gumbel(word):
    """Standard Gumbel noise from uniform 32-bit words."""
    u = word.to(tl.float32) * WORD_UNIT + WORD_UNIT / 2
    kept = 1.0 - u
    lost = u - (1.0 - kept)
    exponential = tl.where(kept > 0.0, lost - log(tl.maximum(kept, 2.0**-24)), LARGEST_EXPONENTIAL)
    return -log(exponential)


@triton.jit
def near_exponential(word):
    """The exponential variable under `gumbel`, to within 2⁻¹¹ of it."""
    u = word.to(tl.float32) * WORD_UNIT + WORD_UNIT / 2
    bits = tl.maximum(1.0 - u, 2.0**-25).to(tl.int32, bitcast=True)
    e = (bits - SQRT_HALF_BITS) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    t = tl.where(e == 0, -u, m - 1.0)  # of u, as 1 − u loses what makes the large values of the noise
    # −log(1 + t) / t for 1 + t from √½ to √2, with the least largest error: 3.5·10⁻⁴.
    slope = tl.fma(tl.fma(tl.fma(t, 0.22719341, -0.3543873), t, 0.50204439), t, -0.99970568)
    return tl.fma(t, slope, e.to(tl.float32) * MINUS_LN2)


@triton.jit
def philox(group, position, scale_index, image, seed_low, seed_high):
    """Philox-4x32-10: the words of codes 4·group to 4·group + 3. All uint32."""
    c0 = group
    c1 = position
    c2 = scale_index
    c3 = image
    k0 = seed_low
    k1 = seed_high
    for _ in tl.static_range(10):
        # One wide multiplication gives both halves of a product.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def row_noise(position, scale_index, image, seed_low, seed_high, BLOCK_V: tl.constexpr):
    """The Gumbel noise of all codes, [BLOCK_V]."""
    group = tl.arange(0, BLOCK_V // 4).to(tl.uint32)  # [BLOCK_V / 4]
    first, second, third, fourth = philox(group, position, scale_index, image, seed_low, seed_high)
    return join(gumbel(first), gumbel(second), gumbel(third), gumbel(fourth))


@triton.jit
def code_noise(code, position, scale_index, image, seed_low, seed_high):
    """The Gumbel noise of one code."""
    group = (code // 4).to(tl.uint32)
    first, second, third, fourth = philox(group, position, scale_index, image, seed_low, seed_high)
    even = tl.where(code % 4 == 0, first, third)
    odd = tl.where(code % 4 == 1, second, fourth)
    return gumbel(tl.where(code % 2 == 0, even, odd))


@triton.jit
def largest_threshold(row, weights, lowest, highest, at_lowest, at_highest, need, ROUNDS: tl.constexpr):
    """The largest logit with at least `need` at or above it, or a number below it and above the next logit.

    at_lowest ≥ need is what lies at or above `lowest`, at_highest what lies at or above `highest`, which is a logit.
    Answers the threshold and what lies at or above it: exactly `need`, or the threshold is a logit.

    The cut is made where `need` would lie if the logarithm of the amount fell on a straight line, moved a fifth of the
    way to the middle, or an end that is far from the answer would never move; every eighth is in the middle of the
    float32 values between, which bounds the number of rounds.

    In the first rounds an end of the interval becomes the cut itself. They mostly end a search of counts, as a cut
    between two logits is found when the amount is exactly `need`. With ties at the threshold there is none: in the
    other rounds the end moves on to the next logit, for one more reduction, until one logit is left.
    """
    low = lowest
    high = highest
    at_low = at_lowest
    at_high = at_highest
    step = tl.full((), 0, tl.int32)
    # The bits of a float are near enough to its logarithm, in a unit of their own.
    log_need = need.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
    while (low < high) & (at_low != need):
        log_low = at_low.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
        log_high = at_high.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
        part = (log_low - log_need) / tl.maximum(log_low - log_high, 1.0)
        cut = low + (part * 0.8 + 0.1) * (high - low)
        if step % 8 == 7:
            low_bits = low.to(tl.int32, bitcast=True)
            high_bits = high.to(tl.int32, bitcast=True)
            low_key = low_bits ^ ((low_bits >> 31) & 0x7FFFFFFF)  # in the order of the floats
            high_key = high_bits ^ ((high_bits >> 31) & 0x7FFFFFFF)
            middle = ((low_key.to(tl.int64) + high_key.to(tl.int64) + 1) >> 1).to(tl.int32)
            cut = (middle ^ ((middle >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        cut = tl.where((cut > low) & (cut <= high), cut, high)  # `high` for a NaN too
        amount = tl.sum(tl.where(row >= cut, weights, 0).to(need.dtype), 0)
        if amount >= need:
            low = cut
            at_low = amount
            if step >= ROUNDS:
                low = tl.min(tl.where(row >= cut, row, INFINITY), 0)
        else:
            high = cut
            at_high = amount
            if step >= ROUNDS:
                high = tl.max(tl.where(row >= cut, -INFINITY, row), 0)
        step += 1
    return low, at_low


@triton.jit
def keep_top_k(logits, highest, top_k):
    """Logits below the k-th largest become −∞; ties with it stay. top_k ≥ 1 is fewer than there are."""
    threshold = highest
    if top_k > 1:
        # Counts are floats: compilers count integers in bit masks, which takes twice the instructions.
        need = top_k.to(tl.float32)
        some = logits > -INFINITY
        count = tl.sum(tl.where(some, 1.0, 0.0), 0)
        lowest = tl.min(tl.where(some, logits, INFINITY), 0)
        threshold = lowest
        if count > need:
            one = tl.full((), 1, tl.float32)
            threshold, _ = largest_threshold(logits, 1.0, lowest, highest, count, one, need, COUNT_ROUNDS)
    return tl.where(logits >= threshold, logits, -INFINITY)


@triton.jit
def keep_top_p(logits, highest, dropped_share):
    """Logits that top-p drops become −∞: in ascending order of (logit, code) while the sum of weights ≤ the limit.

    dropped_share: 1 − top_p in float64.
    """
    first, second, third, fourth = quarters(logits)
    weights = join(
        softmax_weight(first - highest),
        softmax_weight(second - highest),
        softmax_weight(third - highest),
        softmax_weight(fourth - highest),
    )
    total = tl.sum(weights.to(tl.int64), 0)
    limit = (total.to(tl.float64) * dropped_share).to(tl.int64)
    # The last code weighs more than 1: below the total it is never dropped.
    most = tl.minimum(limit, total - 1)
    lowest = tl.min(tl.where(weights > 0, logits, highest), 0)  # what weighs nothing is dropped in any case
    largest_weight = tl.full((), WEIGHT_ONE, tl.int64)
    threshold, above = largest_threshold(
        logits, weights, lowest, highest, total, largest_weight, total - most, WEIGHT_ROUNDS
    )
    kept = tl.where(logits >= threshold, logits, -INFINITY)
    if total > 0:
        # Ties have one weight: how many of them are dropped is a division.
        weight = tl.maximum(softmax_weight(threshold - highest), 1)
        dropped = (most - (total - above)) // weight
    else:  # all are −∞: the last one alone stays
        dropped = tl.sum((kept == threshold).to(tl.int64), 0) - 1
    if dropped > 0:
        tied = kept == threshold
        rank = tl.cumsum(tied.to(tl.int32), 0)
        kept = tl.where(tied & (rank <= dropped), -INFINITY, kept)
    return kept


@triton.jit
def sample(logits, position, scale_index, image, seed_low, seed_high, BLOCK_V: tl.constexpr):
    """The code with the largest sum of logit and noise, the first of equals; 0 if all logits are −∞, the largest is 0.

    To the last bit the noise takes two long logarithms, of which nearly all are for codes that lose. So codes
    first run a race: the largest logit − log E is the least time E·exp(−logit), E the exponential variable under
    the noise. Those within a tolerance of the winner, most often it alone, then get their noise in full, one by one.
    The tolerance, 2⁻⁹, is about twice what the logarithms of two times and the sums they stand for can be off by
    together: 2⁻¹¹ for each E, and 2⁻¹⁷ for the exponential function and the roundings of sums, which are below 64.
    """
    offs_v = tl.arange(0, BLOCK_V)
    group = tl.arange(0, BLOCK_V // 4).to(tl.uint32)  # [BLOCK_V / 4]
    first, second, third, fourth = philox(group, position, scale_index, image, seed_low, seed_high)
    logit0, logit1, logit2, logit3 = quarters(logits)
    time = join(
        near_exponential(first) * tl.exp(-logit0),
        near_exponential(second) * tl.exp(-logit1),
        near_exponential(third) * tl.exp(-logit2),
        near_exponential(fourth) * tl.exp(-logit3),
    )  # [BLOCK_V], ∞ where dropped
    near = time <= tl.minimum(tl.min(time, 0) * TOLERANCE, LARGEST)
    code = tl.min(tl.where(near, offs_v, BLOCK_V), 0)
    last = tl.max(tl.where(near, offs_v, 0), 0)
    token = last
    if code < last:
        best = tl.full((), -INFINITY, tl.float32)
        while (code <= last) & (best < INFINITY):
            noise = code_noise(code, position, scale_index, image, seed_low, seed_high)
            score = tl.max(tl.where(offs_v == code, logits, -INFINITY), 0) + noise
            token = tl.where(score > best, code, token)
            best = tl.maximum(score, best)
            code = tl.min(tl.where(near & (offs_v > code), offs_v, BLOCK_V), 0)
    return token
