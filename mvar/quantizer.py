"""The multi-scale residual quantizer: a feature map to token maps, coarse to fine, and back.

Tian et al., "Visual Autoregressive Modeling" (arXiv 2404.02905), section 3.2 and algorithms 1 and 2.
The reconstruction f̂ of a feature map f is built up scale by scale, from f̂ = 0:

    z_k = area-downsample(f − f̂, p_k × p_k)          what is still missing, seen at scale k
    r_k = the nearest code to each vector of z_k      the tokens of scale k
    f̂  ← f̂ + φ_k(bicubic-upsample(codebook[r_k]))     φ(x) = ½·x + ½·conv(x), a few φ shared by all scales

All of it is computed in float32, whatever the dtype of the weights and under autocast too: the tokens are
decided by differences that a 16-bit format does not resolve.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from mvar_kernels.precision import true_float32

PHI_RATIO = 0.5  # the convolution's share of φ
HITS_DECAY = 0.99
ROWS = 4096  # whose distances to all codes are in memory at a time: 134 MB of 4,096 codes


def phi_index(k: int, num_scales: int, num_phi: int) -> int:
    """Which of the shared φ serves scale k: the one whose tick lies nearest to k/(S−1) in [0, 1].

    The rule of the public VAR code: `num_phi` ticks in even steps from 1/(3n) to 1 − 1/(3n) for n = 4, from
    1/(2n) to 1 − 1/(2n) otherwise; the lower one wins a tie. Scales 2 and 7 of the published 10 lie halfway
    between two ticks, so that rounding decides: the order of the arithmetic is part of the rule.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    step = (1 - margin - margin) / max(num_phi - 1, 1)
    ticks = [i * step + margin for i in range(num_phi)]
    if num_phi > 1:
        ticks[-1] = 1 - margin
    position = k / max(num_scales - 1, 1)
    return min(range(num_phi), key=lambda i: abs(ticks[i] - position))


class _Phi(nn.Conv2d):
    """φ(x) = ½·x + ½·conv(x) in float32: (B, Cv, H, W) → (B, Cv, H, W)."""

    def __init__(self, code_dim: int) -> None:
        super().__init__(code_dim, code_dim, kernel_size=3, padding=1, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None  # nn.Conv2d's type allows for none
        convolved = F.conv2d(x, self.weight.float(), self.bias.float(), padding=1)
        return (1 - PHI_RATIO) * x + PHI_RATIO * convolved


class _SharedPhi(nn.Module):
    """All φ of a quantizer: `forward(k, x)` applies that of scale k."""

    def __init__(self, num_phi: int, num_scales: int, code_dim: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(_Phi(code_dim) for _ in range(num_phi))
        self.choice = [phi_index(k, num_scales, num_phi) for k in range(num_scales)]

    def forward(self, k: int, x: Tensor) -> Tensor:
        return self.qresi_ls[self.choice[k]](x)


class QuantizerOutput(NamedTuple):
    features: Tensor
    """(B, Cv, H, W) float32: f̂; its gradient goes straight through to the encoder's features."""
    vq_loss: Tensor
    """Scalar: mean over the scales of β·‖f − sg(f̂)‖² + ‖sg(f) − f̂‖², each a mean over the elements."""
    usage: Tensor
    """(S,) float32: the fraction of the codes that this batch uses at each scale."""


class Quantizer(nn.Module):
    """Codebook, φ and code statistics; its methods take float32 features and check nothing.

    `ema_vocab_hit_SV` (S, V) float32 holds how often a training batch uses each code at each scale, on average.
    """

    ema_vocab_hit_SV: Tensor

    def __init__(self, patch_nums: tuple[int, ...], num_codes: int, code_dim: int, num_phi: int, beta: float) -> None:
        super().__init__()
        self.patch_nums = patch_nums
        self.num_codes = num_codes
        self.beta = beta
        self.embedding = nn.Embedding(num_codes, code_dim, dtype=torch.float32)
        # As in the public code: near zero, so that a fresh f̂ is near zero too
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        self.quant_resi = _SharedPhi(num_phi, len(patch_nums), code_dim)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(patch_nums), num_codes, dtype=torch.float32))

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, l) int64 → (B, l, Cv) float32."""
        return F.embedding(tokens, self.embedding.weight.float())

    def scale_features(self, k: int, embeddings: Tensor) -> Tensor:
        """What scale k adds to f̂: (B, p_k², Cv) → (B, Cv, H, W)."""
        side, full = self.patch_nums[k], self.patch_nums[-1]
        grid = embeddings.transpose(1, 2).unflatten(2, (side, side))  # (B, Cv, p_k, p_k)
        if side != full:
            grid = F.interpolate(grid, size=(full, full), mode="bicubic")
        grid = grid.contiguous()  # the memory layout picks the convolution's kernel, and with it the rounding
        with true_float32(grid.device), torch.autocast(grid.device.type, enabled=False):
            return self.quant_resi(k, grid)

    def scale_rows(self, k: int, features: Tensor) -> Tensor:
        """Features seen at scale k: (B, Cv, H, W) → (B, p_k², Cv)."""
        side = self.patch_nums[k]
        if side != self.patch_nums[-1]:
            features = F.interpolate(features, size=(side, side), mode="area")
        return features.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """The code at the smallest Euclidean distance: (B, l, Cv) → (B, l) int64.

        In float64, which no setting of float32 products reaches: distances to the nearest codes are small differences
        of large terms, and products with factors in bfloat16 took another code for up to 1 % of the rows of digits.
        680 rows and 4,096 codes take 12 ms instead of 9 (one AMD Zen 3 core).
        """
        codes = self.embedding.weight.double()
        norms = codes.square().sum(dim=1)
        # ‖z − c‖² less ‖z‖², which is the same for all codes
        found = [
            torch.addmm(norms, z.double(), codes.T, alpha=-2).argmin(dim=1) for z in rows.flatten(0, 1).split(ROWS)
        ]
        return torch.cat(found).view(rows.shape[:2]) if found else rows.new_zeros(rows.shape[:2], dtype=torch.int64)

    def quantize(self, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Coarse to fine: the tokens (B, p_k²) of each scale, and f̂ (B, Cv, H, W) up to that scale."""
        rest = features.detach()
        f_hat = torch.zeros_like(rest)
        for k in range(len(self.patch_nums)):
            tokens = self.nearest(self.scale_rows(k, rest))
            added = self.scale_features(k, self.embed(tokens))
            f_hat = f_hat + added
            rest = rest - added.detach()
            yield tokens, f_hat

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize (B, Cv, H, W) float32 with gradients; in training mode, count the codes in the hit buffer."""
        f_hat, losses, hits = features, [], []
        for tokens, f_hat in self.quantize(features):
            commitment = F.mse_loss(features, f_hat.detach())
            losses.append(self.beta * commitment + F.mse_loss(f_hat, features.detach()))
            hits.append(tokens.flatten().bincount(minlength=self.num_codes))
        hits_sv = torch.stack(hits).to(self.ema_vocab_hit_SV.dtype)  # (S, V)
        if self.training:
            self._record(hits_sv)
        return QuantizerOutput(
            features=features + (f_hat - features).detach(),
            vq_loss=torch.stack(losses).mean(),
            usage=(hits_sv > 0).float().mean(dim=1),
        )

    @torch.no_grad()
    def _record(self, hits_sv: Tensor) -> None:
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(hits_sv)
        seen = self.ema_vocab_hit_SV.any(dim=1, keepdim=True)  # the first batch sets the average
        self.ema_vocab_hit_SV.copy_(torch.where(seen, self.ema_vocab_hit_SV.lerp(hits_sv, 1 - HITS_DECAY), hits_sv))

    @torch.no_grad()
    def revive(self, features: Tensor, threshold: float) -> int:
        """Replace the codes with fewer hits per batch than `threshold` by random vectors that the codes are to match.

        features: (B, Cv, H, W) float32. Returns the number of codes replaced.
        """
        rest, rows = features, []
        for k, (_, f_hat) in enumerate(self.quantize(features)):
            rows.append(self.scale_rows(k, rest).flatten(0, 1))  # (B·p_k², Cv)
            rest = features - f_hat
        dead = (self.ema_vocab_hit_SV.sum(dim=0) < threshold).nonzero().flatten()
        # As many candidates from the coarse scales, which have few rows, as from the fine ones
        candidates = torch.stack(
            [r[torch.randint(len(r), dead.shape, dtype=torch.int64, device=r.device)] for r in rows]
        )
        scale = torch.randint(len(rows), dead.shape, dtype=torch.int64, device=dead.device)
        codebook = self.embedding.weight.data
        codebook[dead] = candidates[scale, torch.arange(len(dead), dtype=torch.int64, device=dead.device)].to(
            codebook.dtype
        )
        self.ema_vocab_hit_SV[:, dead] = 1 / len(rows)  # time to prove itself
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(codebook, src=0)
        return len(dead)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # One published file serves several schedules. Its statistics fit one of them only: the others start at zero.
        name = prefix + "ema_vocab_hit_SV"
        stored = state_dict.get(name)
        if stored is not None and stored.shape[0] != len(self.patch_nums):
            state_dict[name] = stored.new_zeros(self.ema_vocab_hit_SV.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
