"""VAR's multi-scale residual VQ-VAE: images to token maps, coarse to fine, and back.

Tian et al., "Visual Autoregressive Modeling" (arXiv 2404.02905), section 3.2 and algorithms 1 and 2.
An encoder turns an image into a feature map, `mvar.quantizer` that map into tokens and back, and a decoder
the map into an image.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvar.autoencoder import NORM_GROUPS, Decoder, Encoder, conv3x3
from mvar.config import SCHEDULES, check_patch_nums, is_positive_int, unbox, unboxed
from mvar.quantizer import Quantizer
from mvar_kernels.precision import true_float32

HITS_KEY = "quantize.ema_vocab_hit_SV"

BY_NUMBER_OF_SCALES = {len(SCHEDULES[resolution]): SCHEDULES[resolution] for resolution in (256, 1024)}


@dataclass(frozen=True)
class TokenizerConfig:
    """Every size of a tokenizer; the defaults are those of the published `vae_ch160v4096z32.pth`.

    patch_nums: side lengths of the token maps, strictly increasing; the last one is the feature map's.
    num_codes, code_dim: size of the codebook.
    ch, ch_mult, num_res_blocks, attention: the autoencoder, see `mvar.autoencoder.Encoder`.
    num_phi: number of φ convolutions, shared by the scales.
    beta: weight of the commitment loss.

    Raises ValueError or TypeError where a field is of no use.
    """

    patch_nums: tuple[int, ...]
    num_codes: int = 4096
    code_dim: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attention: bool = True
    num_phi: int = 4
    beta: float = 0.25

    def __post_init__(self) -> None:
        unbox(self)
        object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))
        widths = self.ch_mult
        if hasattr(widths, "tolist"):
            widths = widths.tolist()
        if not isinstance(widths, Sequence) or not widths or not all(is_positive_int(unboxed(v)) for v in widths):
            raise ValueError(f"ch_mult must be a non-empty tuple of positive integers, got {widths!r}")
        object.__setattr__(self, "ch_mult", tuple(unboxed(v) for v in widths))
        for name in ("num_codes", "code_dim", "ch", "num_res_blocks", "num_phi"):
            if not is_positive_int(getattr(self, name)):
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.ch % NORM_GROUPS:
            raise ValueError(f"ch must be a multiple of {NORM_GROUPS} (the groups of its GroupNorm), got {self.ch}")
        if not isinstance(self.attention, bool):
            raise TypeError(f"attention must be a bool, got {self.attention!r}")
        if not isinstance(self.beta, (int, float)) or not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta must be a finite number >= 0, got {self.beta!r}")

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], patch_nums: Sequence[int] | None = None) -> "TokenizerConfig":
        """Read every size off the names and shapes of a tokenizer's weights (`beta` is not in there).

        Without `patch_nums` the number of scales decides: 10 and 14 are the published schedules of 256×256
        and 1024×1024. The published file serves other resolutions too, with their `patch_nums`.

        Raises ValueError for a missing weight and for a number of scales of no published schedule.
        """

        def shape(name: str) -> torch.Size:
            if name not in state:
                raise ValueError(f"these are not the weights of a tokenizer: {name!r} is missing")
            return state[name].shape

        def count(pattern: str) -> int:
            shape(pattern.format(0))
            return next(n for n in range(1, len(state) + 1) if pattern.format(n) not in state)

        if patch_nums is None:
            num_scales = shape(HITS_KEY)[0]
            if num_scales not in BY_NUMBER_OF_SCALES:
                raise ValueError(f"patch_nums must be given: no published schedule has {num_scales} scales")
            patch_nums = BY_NUMBER_OF_SCALES[num_scales]
        num_codes, code_dim = shape("quantize.embedding.weight")
        ch = shape("encoder.conv_in.weight")[0]
        levels = count("encoder.down.{}.block.0.conv1.weight")
        return cls(
            patch_nums=tuple(patch_nums),
            num_codes=num_codes,
            code_dim=code_dim,
            ch=ch,
            ch_mult=tuple(shape(f"encoder.down.{i}.block.0.conv1.weight")[0] // ch for i in range(levels)),
            num_res_blocks=count("encoder.down.0.block.{}.conv1.weight"),
            attention="encoder.mid.attn_1.qkv.weight" in state,
            num_phi=count("quantize.quant_resi.qresi_ls.{}.weight"),
        )


class TokenizerOutput(NamedTuple):
    """What a training step needs; see `mvar.quantizer.QuantizerOutput` for the last two."""

    images: Tensor
    """(B, 3, R, R) float32: the reconstruction, not clamped."""
    vq_loss: Tensor
    usage: Tensor


class Tokenizer(nn.Module):
    """Images (B, 3, R, R) in [−1, 1] ↔ tokens (B, L) int64, all scales in a row, coarse to fine.

    Parameter and buffer names are those of the published weight files. All methods but `forward` run without
    gradients, never write to their arguments, and raise ValueError or TypeError for an argument that does not fit.
    On a CPU their float32 products are true float32, whatever torch's settings say; autocast reaches the encoder and
    the decoder alone.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.ch, config.ch_mult, config.num_res_blocks, config.attention, config.code_dim)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)
        self.quantize = Quantizer(
            config.patch_nums, config.num_codes, config.code_dim, num_phi=config.num_phi, beta=config.beta
        )
        self.quant_conv = conv3x3(config.code_dim, config.code_dim)
        self.post_quant_conv = conv3x3(config.code_dim, config.code_dim)
        self.patch_nums = config.patch_nums
        self.scales = tuple(side**2 for side in config.patch_nums)
        self.num_tokens = sum(self.scales)
        self.num_codes = config.num_codes
        self.code_dim = config.code_dim
        self.downsampling = 2 ** (len(config.ch_mult) - 1)
        self.resolution = config.patch_nums[-1] * self.downsampling

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) floating point in [−1, 1] → (B, L) int64.

        Under autocast the encoder computes in its dtype, which moves some tokens; the quantizer stays in float32.
        """
        with self._true_float32():
            return torch.cat([tokens for tokens, _ in self.quantize.quantize(self.features(images))], dim=1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 → (B, 3, R, R) float32, clamped to [−1, 1]."""
        self._check_tokens(tokens)
        *_, f_hat = self._partial_sums(tokens)
        return self.decode_features(f_hat)

    @torch.no_grad()
    def teacher_forcing_inputs(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 → (B, L − p_0², Cv) float32: for each scale but the first, f̂ of the coarser ones seen at it."""
        self._check_tokens(tokens)
        sums = self._partial_sums(tokens)
        rows = [self.next_input(k, f_hat) for k, f_hat in zip(range(1, len(self.scales)), sums, strict=False)]
        return torch.cat(rows, dim=1) if rows else self.embed(tokens[:, :0])

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """The codes' vectors: (B, l) int64 → (B, l, Cv) float32.

        The one method that does not check the range of the tokens: that would wait for the device at every scale.
        """
        _check_token_dtype(tokens)
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (B, l), got {tuple(tokens.shape)}")
        return self.quantize.embed(tokens)

    @torch.no_grad()
    def scale_features(self, k: int, embeddings: Tensor) -> Tensor:
        """What scale k adds to the feature map f̂: (B, p_k², Cv) floating point → (B, Cv, H, W) float32."""
        self._check_scale(k)
        _check_floating("embeddings", embeddings, ("B", self.scales[k], self.code_dim))
        return self.quantize.scale_features(k, embeddings.float())

    @torch.no_grad()
    def next_input(self, k: int, f_hat: Tensor) -> Tensor:
        """What the model is given for scale k, f̂ of the coarser scales: (B, Cv, H, W) → (B, p_k², Cv) float32."""
        self._check_scale(k)
        self._check_features(f_hat)
        return self.quantize.scale_rows(k, f_hat.float())

    @torch.no_grad()
    def decode_features(self, f_hat: Tensor) -> Tensor:
        """A feature map (B, Cv, H, W) → images (B, 3, R, R) float32, clamped to [−1, 1]."""
        self._check_features(f_hat)
        with self._true_float32():
            return self._images(f_hat).clamp(-1, 1)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct (B, 3, R, R) in [−1, 1] for training; in training mode the hit buffer is updated."""
        quantized = self.quantize(self.features(images))
        return TokenizerOutput(self._images(quantized.features), quantized.vq_loss, quantized.usage)

    @torch.no_grad()
    def revive_dead_codes(self, images: Tensor, threshold: float = 0.1) -> int:
        """For training: give the codes that are hardly used a place among what the codes miss in these images.

        A code is dead if an average batch hits it less than `threshold` times, all scales together. Called
        before the first step (when no code has been hit) this sets the whole codebook; called every few dozen
        steps it keeps small data sets from falling back on a handful of codes. Returns how many codes it moved.
        """
        with self._true_float32():
            return self.quantize.revive(self.features(images), threshold)

    def features(self, images: Tensor) -> Tensor:
        """What the quantizer is given, with gradients: (B, 3, R, R) in [−1, 1] → (B, Cv, H, W) float32."""
        _check_floating("images", images, ("B", 3, self.resolution, self.resolution))
        return self.quant_conv(self.encoder(images.to(self.encoder.norm_out.weight.dtype))).float()  # (B, Cv, H, W)

    def _true_float32(self) -> AbstractContextManager[None]:
        return true_float32(self.quantize.embedding.weight.device)

    def _images(self, f_hat: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(f_hat.to(self.decoder.norm_out.weight.dtype))).float()

    def _partial_sums(self, tokens: Tensor) -> Iterator[Tensor]:
        """f̂ (B, Cv, H, W) after each scale."""
        by_scale = enumerate(tokens.split(self.scales, dim=1))
        return accumulate(self.scale_features(k, self.embed(tokens_k)) for k, tokens_k in by_scale)

    def _check_tokens(self, tokens: Tensor) -> None:
        _check_token_dtype(tokens)
        if tokens.dim() != 2 or tokens.shape[1] != self.num_tokens:
            raise ValueError(f"tokens must have shape (B, {self.num_tokens}), got {tuple(tokens.shape)}")
        # Their values are not there while a graph is traced.
        if not torch.compiler.is_compiling() and bool(((tokens < 0) | (tokens >= self.num_codes)).any()):
            found = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"tokens must lie in [0, {self.num_codes}), got {found}")

    def _check_scale(self, k: int) -> None:
        if not 0 <= k < len(self.scales):
            raise ValueError(f"k must be a scale's index in [0, {len(self.scales)}), got {k}")

    def _check_features(self, f_hat: Tensor) -> None:
        _check_floating("f_hat", f_hat, ("B", self.code_dim, self.patch_nums[-1], self.patch_nums[-1]))


def _check_token_dtype(tokens: Tensor) -> None:
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, got {tokens.dtype}")


def _check_floating(name: str, value: Tensor, shape: tuple[str | int, ...]) -> None:
    """Raise unless `value` is floating point and of that shape, whose first entry "B" stands for any number."""
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.dim() != len(shape) or value.shape[1:] != shape[1:]:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(value.shape)}")
