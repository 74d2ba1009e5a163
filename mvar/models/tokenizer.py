"""VAR's multi-scale residual VQ-VAE: images ↔ token maps, coarse to fine.

Tian et al., "Visual Autoregressive Modeling" (arXiv 2404.02905), section 3.2 and algorithms 1 and 2.
An encoder maps an image to a feature map, the quantizer (:mod:`mvar.models.quantizer`) maps features to tokens and
back, and a decoder maps features to an image.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvar.models.autoencoder import NORM_GROUPS, Decoder, Encoder, conv3x3
from mvar.models.config import SCHEDULES, check_patch_nums, is_positive_int, unbox, unboxed
from mvar.models.hub import HubMixin
from mvar.models.quantizer import Quantizer
from mvar_kernels.precision import true_float32

HITS_KEY = "quantize.ema_vocab_hit_SV"

BY_NUMBER_OF_SCALES = {len(SCHEDULES[resolution]): SCHEDULES[resolution] for resolution in (256, 1024)}


@dataclass(frozen=True)
class TokenizerConfig:
    """Configuration of a tokenizer; defaults are those of the published `vae_ch160v4096z32.pth`.

    patch_nums: side lengths of the token maps, strictly increasing; the last is that of the feature map.
    num_codes, code_dim: size and width of the codebook.
    ch, ch_mult, num_res_blocks, attention: see :class:`mvar.models.autoencoder.Encoder`.
    num_phi: number of φ convolutions, which scales share.
    beta: weight of the commitment loss.

    Raises:
        ValueError, TypeError: a field is out of range or of another type.
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
            raise ValueError(f"ch_mult: expected a non-empty tuple of positive integers, got {widths!r}")
        object.__setattr__(self, "ch_mult", tuple(unboxed(v) for v in widths))
        for name in ("num_codes", "code_dim", "ch", "num_res_blocks", "num_phi"):
            if not is_positive_int(getattr(self, name)):
                raise ValueError(f"{name}: expected a positive integer, got {getattr(self, name)!r}")
        if self.ch % NORM_GROUPS:
            raise ValueError(f"ch: expected a multiple of {NORM_GROUPS} (the groups of GroupNorm), got {self.ch}")
        if not isinstance(self.attention, bool):
            raise TypeError(f"attention: expected a bool, got {self.attention!r}")
        if not isinstance(self.beta, (int, float)) or not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta: expected a finite number of at least 0, got {self.beta!r}")

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], patch_nums: Sequence[int] | None = None) -> "TokenizerConfig":
        """Infer the configuration from a tokenizer's state dict, which does not determine `beta`.

        Args:
            state: state dict.
            patch_nums: side lengths of the token maps, as the published file is used with several schedules. None to
                infer them from the number of scales: 10 for the schedule of 256×256, 14 for that of 1024×1024.

        Raises:
            ValueError: a weight is missing, or no published schedule has this number of scales.
        """

        def shape(name: str) -> torch.Size:
            if name not in state:
                raise ValueError(f"not the weights of a tokenizer: {name!r} is missing")
            return state[name].shape

        def count(pattern: str) -> int:
            shape(pattern.format(0))
            return next(n for n in range(1, len(state) + 1) if pattern.format(n) not in state)

        if patch_nums is None:
            num_scales = shape(HITS_KEY)[0]
            if num_scales not in BY_NUMBER_OF_SCALES:
                raise ValueError(f"patch_nums: no published schedule has {num_scales} scales, expected side lengths")
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
    """Output of a training step; vq_loss and hits as in :class:`mvar.models.quantizer.QuantizerOutput`."""

    images: Tensor
    """(B, 3, R, R) float32: reconstruction, not clamped."""
    vq_loss: Tensor
    hits: Tensor


class Tokenizer(nn.Module, HubMixin):
    """Images (B, 3, R, R) in [−1, 1] ↔ tokens (B, L) int64, the scales concatenated, coarse to fine.

    Parameter and buffer names are those of the published weight files. Methods never write to their arguments
    and raise ValueError or TypeError for invalid ones. All except `forward` and `features` run without gradients and,
    on a CPU, with true float32 matmuls, independent of torch's settings. Autocast affects only encoder and decoder.
    `from_pretrained`, `save_pretrained` and `push_to_hub` are those of :class:`mvar.models.hub.HubMixin`.
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
        """Tokenize images: (B, 3, R, R) floating point in [−1, 1] → (B, L) int64.

        Under autocast the encoder runs in its dtype, which changes some tokens; the quantizer stays in float32.
        """
        with self._true_float32():
            return torch.cat([tokens for tokens, _ in self.quantize.quantize(self.features(images))], dim=1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Decode tokens: (B, L) int64 → (B, 3, R, R) float32, clamped to [−1, 1]."""
        self._check_tokens(tokens)
        *_, f_hat = self._partial_sums(tokens)
        return self.decode_features(f_hat)

    @torch.no_grad()
    def teacher_forcing_inputs(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 → (B, L − p_0², Cv) float32: :meth:`next_input` of all scales except the first, concatenated."""
        self._check_tokens(tokens)
        sums = self._partial_sums(tokens)
        rows = [self.next_input(k, f_hat) for k, f_hat in zip(range(1, len(self.scales)), sums, strict=False)]
        return torch.cat(rows, dim=1) if rows else self.embed(tokens[:, :0])

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Look up codes: (B, l) int64 → (B, l, Cv) float32.

        Does not check the range of the tokens, which would synchronize with the device at every scale.
        """
        _check_token_dtype(tokens)
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected shape (B, l), got {tuple(tokens.shape)}")
        return self.quantize.embed(tokens)

    @torch.no_grad()
    def scale_features(self, k: int, embeddings: Tensor) -> Tensor:
        """Contribution of scale k to the feature map f̂: (B, p_k², Cv) floating point → (B, Cv, H, W) float32."""
        self._check_scale(k)
        _check_floating("embeddings", embeddings, ("B", self.scales[k], self.code_dim))
        return self.quantize.scale_features(k, embeddings.float())

    @torch.no_grad()
    def next_input(self, k: int, f_hat: Tensor) -> Tensor:
        """Model input of scale k, f̂ of the coarser scales downsampled: (B, Cv, H, W) → (B, p_k², Cv) float32."""
        self._check_scale(k)
        self._check_features(f_hat)
        return self.quantize.scale_rows(k, f_hat.float())

    @torch.no_grad()
    def decode_features(self, f_hat: Tensor) -> Tensor:
        """Decode a feature map: (B, Cv, H, W) → (B, 3, R, R) float32, clamped to [−1, 1]."""
        self._check_features(f_hat)
        with self._true_float32():
            return self._images(f_hat).clamp(-1, 1)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct (B, 3, R, R) in [−1, 1] for training. Updates the hit statistics in training mode.

        The convolutions run in the memory format of the images.
        """
        quantized = self.quantize(self.features(images))
        channels_last = images.is_contiguous(memory_format=torch.channels_last)
        f_hat = quantized.features.contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        return TokenizerOutput(self._images(f_hat), quantized.vq_loss, quantized.hits)

    @torch.no_grad()
    def revive_dead_codes(
        self, images: Tensor, threshold: float = 0.05, generator: torch.Generator | None = None
    ) -> Tensor:
        """For training: replace rarely used codes by random residual vectors of these images.

        Called before the first step (when no code has been hit), this initializes the complete codebook; called every
        few dozen steps, it prevents codebook collapse on small data sets.

        Args:
            images: (B, 3, R, R) in [−1, 1].
            threshold, generator: see :meth:`mvar.models.quantizer.Quantizer.revive`.

        Returns:
            (V,) bool, the replaced codes.
        """
        with self._true_float32():
            return self.quantize.revive(self.features(images), threshold, generator)

    def features(self, images: Tensor) -> Tensor:
        """Input of the quantizer, with gradients: (B, 3, R, R) in [−1, 1] → (B, Cv, H, W) float32."""
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
            raise ValueError(f"tokens: expected shape (B, {self.num_tokens}), got {tuple(tokens.shape)}")
        # Values are not available while torch.compile traces.
        if not torch.compiler.is_compiling() and bool(((tokens < 0) | (tokens >= self.num_codes)).any()):
            values = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"tokens: expected values in [0, {self.num_codes}), got {values}")

    def _check_scale(self, k: int) -> None:
        if not 0 <= k < len(self.scales):
            raise ValueError(f"k: expected the index of a scale in [0, {len(self.scales)}), got {k}")

    def _check_features(self, f_hat: Tensor) -> None:
        _check_floating("f_hat", f_hat, ("B", self.code_dim, self.patch_nums[-1], self.patch_nums[-1]))


def _check_token_dtype(tokens: Tensor) -> None:
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens: expected int64, got {tokens.dtype}")


def _check_floating(name: str, value: Tensor, shape: tuple[str | int, ...]) -> None:
    """Raise unless `value` is floating point and has this shape, with any batch size."""
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {value.dtype}")
    if value.dim() != len(shape) or value.shape[1:] != shape[1:]:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(value.shape)}")
