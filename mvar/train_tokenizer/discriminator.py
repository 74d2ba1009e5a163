"""The adversarial part of a tokenizer's loss: a PatchGAN discriminator, hinge losses and VQGAN's adaptive weight.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (arXiv 1611.07004), as Esser et al.,
"Taming Transformers for High-Resolution Image Synthesis" (VQGAN, arXiv 2012.09841), use it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.models.autoencoder import NORM_GROUPS
from mvar.models.config import is_positive_int
from mvar.models.weights import without_storage

WEIGHT_STD = 0.02  # of the initial convolutions
MAX_WIDTH = 8  # the widest layer, in multiples of `channels`
DELTA = 1e-4  # δ of the adaptive weight
MAX_ADAPTIVE_WEIGHT = 1e4


class Discriminator(nn.Module):
    """PatchGAN: images (B, 3, R, R) in [−1, 1] → logits (B, 1, h, h) float32, h = R / 2^num_layers − 2.

    Positive logits stand for real images. Each depends on a patch, of 70×70 pixels with 3 layers, and on GroupNorm's
    statistics of the image. The layers are `num_layers` 4×4 convolutions of stride 2 with `channels`·min(2^i, 8) output
    channels, one more of stride 1, and one to the logits.

    GroupNorm replaces the papers' BatchNorm. It normalizes every image by itself, so that a batch gives the same
    gradients on one process as spread over several; BatchNorm would take its statistics from one process's images.

    Args:
        channels: output channels of the first convolution.
        num_layers: number of convolutions of stride 2.
        resolution: R of the images.
        seed: seed of the weights. No other random numbers are drawn.

    Raises:
        ValueError: an argument is out of range, or the images are too small for the number of layers.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, *, resolution: int, seed: int = 0) -> None:
        super().__init__()
        if not is_positive_int(channels) or 2 * channels % NORM_GROUPS:
            raise ValueError(f"channels: expected a positive multiple of {NORM_GROUPS // 2}, got {channels!r}")
        if not is_positive_int(num_layers):
            raise ValueError(f"num_layers: expected a positive integer, got {num_layers!r}")
        # Each of the two last convolutions removes one row and one column.
        if not is_positive_int(resolution) or resolution >> num_layers < 3:
            raise ValueError(
                f"resolution: expected at least {3 << num_layers} for {num_layers} layers of stride 2, "
                f"got {resolution!r}; use a smaller num_layers"
            )
        widths = [channels * min(2**i, MAX_WIDTH) for i in range(num_layers + 1)]
        with without_storage():
            layers: list[nn.Module] = [_conv(3, channels, stride=2), _leaky_relu()]
            for i in range(1, num_layers + 1):
                layers += [
                    _conv(widths[i - 1], widths[i], stride=2 if i < num_layers else 1, bias=False),
                    nn.GroupNorm(NORM_GROUPS, widths[i], dtype=torch.float32),
                    _leaky_relu(),
                ]
            layers.append(_conv(widths[-1], 1, stride=1))
            self.layers = nn.Sequential(*layers)
        self.to_empty(device="cpu")
        self._init_weights(seed)

    @torch.no_grad()
    def _init_weights(self, seed: int) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                layer.weight.normal_(0, WEIGHT_STD, generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
            elif isinstance(layer, nn.GroupNorm):
                layer.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).float()

    def frozen(self, images: Tensor) -> Tensor:
        """The same logits, with gradients to the images only: for the generator's loss.

        Neither computes the weights' gradients nor runs DistributedDataParallel's hooks: call it on the module inside.
        """
        weights = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return torch.func.functional_call(self, weights, (images,))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """½·(mean max(0, 1 − real) + mean max(0, 1 + fake)), a scalar (Lim and Ye, arXiv 1705.02894; ½ as in VQGAN).

    Args:
        real_logits, fake_logits: logits of images and of their reconstructions, of any shape. The reconstructions must
            be detached.
    """
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def generator_loss(fake_logits: Tensor) -> Tensor:
    """−mean fake, a scalar, of the logits of reconstructions (Lim and Ye, arXiv 1705.02894)."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    last_layer: Tensor,
    all_reduce: Callable[[Tensor], Tensor],
    *,
    loss_scale: float = 1.0,
) -> Tensor:
    """Weight λ of the generator's loss (VQGAN, arXiv 2012.09841, equation 7): a scalar in [0, 10⁴] without gradient.

    λ = ‖∇L_rec‖ / (‖∇L_gan‖ + δ) with δ = 10⁻⁴: both losses then change the decoder's last layer equally strongly. The
    gradients are means over all processes, so that λ is the same in each, and equals that of one process with the
    whole batch. With gradient accumulation, λ is that of the images of one backward pass.

    Both graphs are kept for the backward pass. The `.grad` of no parameter is changed.

    Args:
        reconstruction_loss, adversarial_loss: scalars, means over this process's images.
        last_layer: weight of the decoder's last convolution.
        all_reduce: sum over all processes, such as :meth:`mvar.train.distributed.TrainContext.all_reduce_sum`.
        loss_scale: scale of the losses for float16's small range, that of the GradScaler. Without it, gradients of
            images would be rounded to zero: each is at most about 1 / (3·R²·B). λ does not depend on it otherwise.

    Returns:
        λ; NaN if a gradient is not finite, so that this step is skipped, and the loss scale lowered.
    """
    gradients = [
        torch.autograd.grad(loss * loss_scale, last_layer, retain_graph=True)[0].flatten()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    # The number of processes is summed along, so that one collective is enough.
    *sums, processes = all_reduce(torch.cat([*gradients, gradients[0].new_ones(1)])).split(last_layer.numel())
    reconstruction, adversarial = (torch.linalg.vector_norm(total / processes / loss_scale) for total in sums)
    weight = (reconstruction / (adversarial + DELTA)).clamp(0, MAX_ADAPTIVE_WEIGHT)
    return torch.where((reconstruction + adversarial).isfinite(), weight, torch.nan)


def _conv(in_channels: int, out_channels: int, stride: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 4, stride, padding=1, bias=bias, dtype=torch.float32)


def _leaky_relu() -> nn.LeakyReLU:
    return nn.LeakyReLU(0.2, inplace=True)
