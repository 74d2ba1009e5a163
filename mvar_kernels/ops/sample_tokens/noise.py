"""Counter-based noise, the same bits on every backend.

Philox-4x32-10 (Salmon et al., SC 2011): four 32-bit words from the key (seed, 64 bits) and the counter
(code // 4, position in the scale, scale, image index); the code takes word code % 4. So an image's
noise depends on the seed and its index alone, not on batch, device or order. Further samples of a scale
of l positions go on where its positions end: sample s of position i has the noise of position s·l + i,
which must stay below 2³². Scale and image have words of their own, so that no two samples share noise.

Transcendental functions differ in the last bits between libraries; here they are spelled out in
float32 additions, multiplications and divisions, each rounded on its own (no fused multiply-add), which
every backend can repeat bit for bit.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# ln 2 in two parts: multiples of the first by integers below 2¹¹ are exact in float32.
LN2_HIGH = 0.693145751953125
LN2_LOW = math.log(2) - LN2_HIGH


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2³²) as int64, for counters in [0, 2³²) as int64, broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        # int64 wraps, and the low 64 bits of the product are right all the same.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def gumbel(image_index: Tensor, shape: Sequence[int], scale_index: int, seed: int | Tensor) -> Tensor:
    """Standard Gumbel noise of shape (B, positions, codes) in float32 for images (B,) at one scale.

    G = −log E with E = −log(1 − u) exponential. u = word·2⁻³² + 2⁻³³ is fine near 0, where E is small and
    G large: those are the values of sampled codes.
    """
    device = image_index.device
    _, positions, codes = shape
    counter = (
        torch.arange(-(-codes // 4), dtype=torch.int64, device=device),
        torch.arange(positions, dtype=torch.int64, device=device)[:, None],
        torch.full((), scale_index, dtype=torch.int64, device=device),
        (image_index & MASK)[:, None, None],
    )
    words = torch.stack(philox(counter, seed), -1).flatten(-2)[..., :codes]  # (B, positions, codes)
    u = words.to(torch.float32) * 2.0**-32 + 2.0**-33
    kept = 1 - u
    lost = u - (1 - kept)  # what the rounding of 1 − u lost
    exponential = torch.where(kept > 0, -log(kept.clamp_min(2.0**-24)) + lost, math.log(2) * 25)
    return -log(exponential)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of normal positive float32 values, to within 2 units in the last place.

    x = m·2ᵉ with m in [√½, √2); log m = 2 artanh s with s = (m−1)/(m+1), by its series.
    """
    bits = x.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23  # 0x3F3504F3 is √½
    m = (bits - (e << 23)).view(torch.float32)
    s = (m - 1) / (m + 1)
    z = s * s
    series = z * (z * (z * (z * (2 / 9) + 2 / 7) + 2 / 5) + 2 / 3)
    whole = e.to(torch.float32)
    return whole * LN2_HIGH + (s * series + whole * LN2_LOW + 2 * s)


def exp_negative(x: Tensor) -> Tensor:
    """exp of float32 values ≤ 0, to within 2 units in the last place; 0 below −87."""
    clamped = x.clamp_min(-87.0)
    n = (clamped * math.log2(math.e) + 0.5).floor()
    r = clamped - n * LN2_HIGH - n * LN2_LOW  # |r| ≤ ln 2 / 2
    p = torch.ones_like(r)
    for k in range(7, 0, -1):
        p = p * (r / r.new_full((), k)) + 1  # a number instead of a tensor, and a GPU multiplies by 1/k
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x >= -87.0, p * power, 0.0)
