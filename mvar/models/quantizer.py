"""Multi-scale residual quantizer: feature map ↔ token maps, coarse to fine.

Tian et al., "Visual Autoregressive Modeling" (arXiv 2404.02905), section 3.2 and algorithms 1 and 2.
The reconstruction f̂ of a feature map f is accumulated over the scales, from f̂ = 0:

    z_k = area-downsample(f − f̂, p_k × p_k)          residual at scale k
    r_k = nearest code to each vector of z_k          tokens of scale k
    f̂  ← f̂ + φ_k(bicubic-upsample(codebook[r_k]))     φ(x) = ½·x + ½·conv(x), φ shared by adjacent scales

Everything is computed in float32, independent of the dtype of the weights and of autocast: tokens depend on differences
that 16-bit formats do not resolve.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from mvar_kernels.precision import true_float32

PHI_RATIO = 0.5  # weight of the convolution in φ
HITS_DECAY = 0.99  # of the moving average of code hits
CHUNK_ROWS = 4096  # rows per distance matrix: 134 MB for 4,096 codes


def phi_index(k: int, num_scales: int, num_phi: int) -> int:
    """Index of the φ for scale k: that with the tick nearest to k/(S−1) in [0, 1].

    As in the public VAR code: n = `num_phi` equidistant ticks from 1/(3n) to 1 − 1/(3n) for n = 4, from 1/(2n) to
    1 − 1/(2n) otherwise; the lower index wins a tie. Scales 2 and 7 of the published 10 lie halfway between two ticks,
    so the result depends on rounding: the order of the arithmetic must stay as it is.
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
        assert self.bias is not None  # its type in nn.Conv2d is Tensor | None
        convolved = F.conv2d(x, self.weight.float(), self.bias.float(), padding=1)
        return (1 - PHI_RATIO) * x + PHI_RATIO * convolved


class _SharedPhi(nn.Module):
    """All φ of a quantizer. `forward(k, x)` applies the φ of scale k."""

    def __init__(self, num_phi: int, num_scales: int, code_dim: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(_Phi(code_dim) for _ in range(num_phi))
        self.phi_of_scale = [phi_index(k, num_scales, num_phi) for k in range(num_scales)]

    def forward(self, k: int, x: Tensor) -> Tensor:
        return self.qresi_ls[self.phi_of_scale[k]](x)


class QuantizerOutput(NamedTuple):
    features: Tensor
    """(B, Cv, H, W) float32: f̂, with a straight-through gradient to the encoder's features."""
    vq_loss: Tensor
    """Scalar: mean over scales of β·‖f − sg(f̂)‖² + ‖sg(f) − f̂‖², each averaged over the elements."""
    hits: Tensor
    """(S, V) int64: number of tokens of the batch with each code, per scale."""


class Quantizer(nn.Module):
    """Codebook, φ and code statistics. Methods take float32 features and do not check their arguments.

    `ema_vocab_hit_SV` (S, V) float32: moving average of the hits per training batch of each code at each scale.
    `synchronized`: with torch.distributed, statistics and :meth:`revive` are over the batches of all processes.
    """

    ema_vocab_hit_SV: Tensor

    def __init__(self, patch_nums: tuple[int, ...], num_codes: int, code_dim: int, num_phi: int, beta: float) -> None:
        super().__init__()
        self.patch_nums = patch_nums
        self.num_codes = num_codes
        self.beta = beta
        self.synchronized = True
        self.embedding = nn.Embedding(num_codes, code_dim, dtype=torch.float32)
        # As in the public code: near zero, so that the initial f̂ is near zero
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        self.quant_resi = _SharedPhi(num_phi, len(patch_nums), code_dim)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(patch_nums), num_codes, dtype=torch.float32))

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up codes: (B, l) int64 → (B, l, Cv) float32."""
        return F.embedding(tokens, self.embedding.weight.float())

    def scale_features(self, k: int, embeddings: Tensor) -> Tensor:
        """Contribution of scale k to f̂: (B, p_k², Cv) → (B, Cv, H, W)."""
        side, full = self.patch_nums[k], self.patch_nums[-1]
        grid = embeddings.transpose(1, 2).unflatten(2, (side, side))  # (B, Cv, p_k, p_k)
        if side != full:
            grid = F.interpolate(grid, size=(full, full), mode="bicubic")
        grid = grid.contiguous()  # the memory layout determines the convolution kernel and its rounding
        with true_float32(grid.device), torch.autocast(grid.device.type, enabled=False):
            return self.quant_resi(k, grid)

    def scale_rows(self, k: int, features: Tensor) -> Tensor:
        """Area-downsample features to scale k: (B, Cv, H, W) → (B, p_k², Cv)."""
        side = self.patch_nums[k]
        if side != self.patch_nums[-1]:
            features = F.interpolate(features, size=(side, side), mode="area")
        return features.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """Index of the code at the smallest Euclidean distance: (B, l, Cv) → (B, l) int64.

        In float64, independent of torch's settings for float32 matmuls: distances to the nearest codes are small
        differences of large terms, and matmuls with bfloat16 factors changed the code of up to 1 % of the rows of the
        digits. 680 rows and 4,096 codes take 12 ms instead of 9 ms (one AMD Zen 3 core).
        """
        codes = self.embedding.weight.double()
        norms = codes.square().sum(dim=1)
        # ‖z − c‖² − ‖z‖²: ‖z‖² is the same for all codes
        chunks = rows.flatten(0, 1).split(CHUNK_ROWS)
        indices = [torch.addmm(norms, z.double(), codes.T, alpha=-2).argmin(dim=1) for z in chunks]
        return torch.cat(indices).view(rows.shape[:2]) if indices else rows.new_zeros(rows.shape[:2], dtype=torch.int64)

    def quantize(self, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, coarse to fine, the tokens (B, p_k²) of each scale and f̂ (B, Cv, H, W) up to that scale."""
        residual = features.detach()
        f_hat = torch.zeros_like(residual)
        for k in range(len(self.patch_nums)):
            tokens = self.nearest(self.scale_rows(k, residual))
            added = self.scale_features(k, self.embed(tokens))
            f_hat = f_hat + added
            residual = residual - added.detach()
            yield tokens, f_hat

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize (B, Cv, H, W) float32 with gradients. Updates the hit statistics in training mode."""
        f_hat, losses, hits = features, [], []
        for tokens, f_hat in self.quantize(features):
            commitment = F.mse_loss(features, f_hat.detach())
            losses.append(self.beta * commitment + F.mse_loss(f_hat, features.detach()))
            hits.append(tokens.flatten().bincount(minlength=self.num_codes))
        hits_sv = torch.stack(hits)
        if self.training:
            self._update_hits(hits_sv.to(self.ema_vocab_hit_SV.dtype))
        return QuantizerOutput(
            features=features + (f_hat - features).detach(),
            vq_loss=torch.stack(losses).mean(),
            hits=hits_sv,
        )

    def _processes(self) -> tuple[int, int]:
        """Rank and number of the processes that train this tokenizer."""
        if self.synchronized and distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    @torch.no_grad()
    def _update_hits(self, hits_sv: Tensor) -> None:
        if self._processes()[1] > 1:
            distributed.all_reduce(hits_sv)
        initialized = self.ema_vocab_hit_SV.any(dim=1, keepdim=True)  # the first batch initializes the average
        average = self.ema_vocab_hit_SV.lerp(hits_sv, 1 - HITS_DECAY)
        self.ema_vocab_hit_SV.copy_(torch.where(initialized, average, hits_sv))

    @torch.no_grad()
    def revive(self, features: Tensor, threshold: float, generator: torch.Generator | None = None) -> Tensor:
        """Replace unused codes by random residual vectors of these features; all codes if none has been hit yet.

        In distributed training the vectors are those of all processes' batches, so that N processes replace the same
        codes by the same vectors as one process with all images.

        Args:
            features: (B, Cv, H, W) float32, with the same B in all processes.
            threshold: a code is unused if its hits are at most this fraction of an even share.
            generator: on the CPU and in the same state in all processes; None for torch's default generator.

        Returns:
            (V,) bool, the replaced codes.
        """
        residual, rows = features, []
        for k, (_, f_hat) in enumerate(self.quantize(features)):
            rows.append(self.scale_rows(k, residual).flatten(0, 1))  # (B·p_k², Cv)
            residual = features - f_hat
        hits = self.ema_vocab_hit_SV.sum(dim=0)
        share = hits.mean()
        dead = hits <= threshold * share
        rank, world_size = self._processes()
        scale, row = _distinct_rows(int(dead.sum()), [len(own) * world_size for own in rows], generator)
        vectors = features.new_zeros(len(scale), features.shape[1])
        for k, own in enumerate(rows):
            first = rank * len(own)  # of this process, in the rows of all processes
            chosen = (scale == k) & (row >= first) & (row < first + len(own))
            vectors[chosen.to(vectors.device)] = own[(row[chosen] - first).to(own.device)]
        if world_size > 1:
            distributed.all_reduce(vectors)  # each is zero in all processes but one
        self.embedding.weight.data[dead] = vectors.to(self.embedding.weight.dtype)
        self.ema_vocab_hit_SV[:, dead] = share / len(rows)  # not replaced again before it has been tried
        return dead

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The published file is used with several schedules. Its statistics belong to one; others start at zero.
        name = prefix + "ema_vocab_hit_SV"
        stored = state_dict.get(name)
        if stored is not None and stored.shape[0] != len(self.patch_nums):
            state_dict[name] = stored.new_zeros(self.ema_vocab_hit_SV.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _distinct_rows(count: int, rows: list[int], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Scale and row of `count` vectors, (count,) int64 each, of scales with so many rows.

    The scales have equal shares, up to the number of their rows; the rest is of the last one. A row is drawn twice only
    if there are fewer rows than vectors: equal codes would remain unused.
    """
    last = len(rows) - 1
    scale = torch.randint(last + 1, (count,), generator=generator, dtype=torch.int64, device="cpu")
    row = torch.zeros_like(scale)
    for k, available in enumerate(rows):
        (chosen,) = (scale == k).nonzero(as_tuple=True)
        if k < last:
            scale[chosen[available:]] = last
            chosen = chosen[:available]
        order = torch.randperm(available, generator=generator, dtype=torch.int64, device="cpu")
        row[chosen] = order[torch.arange(len(chosen), dtype=torch.int64, device="cpu") % available]
    return scale, row
