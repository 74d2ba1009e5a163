"""A tokenizer for inference: decoder in one dtype and channels last, upsampling fused with its convolutions."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mvar.inference.only import OnlyForInference
from mvar.models.autoencoder import UpLevel
from mvar.models.tokenizer import Tokenizer, TokenizerConfig
from mvar.models.weights import ENCODER, without_storage

FLOAT32 = ("quantize.", "quant_conv.", "encoder.")
"""Parts that stay in float32."""
DECODED_PIXELS = 256 * 256
"""On a CPU the decoder runs on at most so many pixels at a time, but on one image at least. glibc's malloc requests
larger activations from the system and returns them each time: decoding eight images of 256×256 at once takes 1.13 times
as long as one after another in float32, and as long in bfloat16 (two AMD Zen 4 cores)."""


class InferenceTokenizer(OnlyForInference, Tokenizer):
    """A tokenizer for decoding: returned by :func:`mvar.load_tokenizer` with a dtype.

    Args:
        config: its configuration.
        weights: names and values; without those of the encoder, which then stays without storage, the tokenizer does
            not encode images. Each is converted before the next one is taken; those that need no conversion are shared.
        dtype: of the decoder's weights and activations.
    """

    def __init__(self, config: TokenizerConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        with without_storage():
            super().__init__(config)
        self.dtype = dtype
        converted = {name: _converted(name, t, dtype) for name, t in weights}
        missing, unexpected = self.load_state_dict(converted, assign=True, strict=False)
        if unexpected or any(not name.startswith(ENCODER + ".") for name in missing):
            raise RuntimeError(f"tokenizer: state dict: missing {missing}, unexpected {unexpected}")
        self.encodes = not missing
        del converted
        for level in self.decoder.modules():
            if isinstance(level, UpLevel) and isinstance(level.upsample, nn.Sequential):
                level.upsample = fuse_upsample_conv(level.upsample.conv)  # type: ignore[assignment, arg-type]
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        if not self.encodes:
            raise RuntimeError("the tokenizer was loaded without its encoder, for decoding only")
        return super().features(images)

    def _images(self, f_hat: Tensor) -> Tensor:
        decode = super()._images
        if f_hat.device.type != "cpu":
            return decode(f_hat)
        images = max(1, DECODED_PIXELS // self.resolution**2)
        return torch.cat([decode(part) for part in f_hat.split(images)])


def _converted(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if name.startswith(FLOAT32) or not value.is_floating_point():
        return value
    return value.to(dtype, memory_format=torch.channels_last if value.dim() == 4 else torch.preserve_format)


def fuse_upsample_conv(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Fuse nearest-neighbor upsampling by 2 and `conv` (3×3) into one transposed convolution of stride 2.

    In one dimension the upsampled row is s₀ s₀ s₁ s₁ …, so that two of the three taps w read the same source pixel:

        out[2i]   = w₀·s[i−1] + (w₁+w₂)·s[i]
        out[2i+1] = (w₀+w₁)·s[i] + w₂·s[i+1]

    4 multiplications per pixel instead of 9. VAR's upsampling layers at 256×256 take 46 % of their time in float32 and
    49 % in bfloat16 (two AMD Zen 5 cores).
    """
    fold = conv.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # (taps of the result, taps of conv)
    weight = torch.einsum("ocij,ki,lj->cokl", conv.weight, fold, fold)
    in_channels, out_channels = weight.shape[:2]
    fused = nn.ConvTranspose2d(
        in_channels, out_channels, kernel_size=4, stride=2, padding=1, dtype=weight.dtype, device="meta"
    )
    fused.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    fused.bias = conv.bias
    return fused
