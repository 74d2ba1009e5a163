"""LPIPS, the perceptual distance of images: a weighted distance of VGG16's features.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924). VGG16's
weights are read from torchvision's file, those of the features (version 0.1) from the installed package `lpips`, whose
code is not run: it requires torchvision, and draws global random numbers. Nothing is downloaded.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from mvar.models.autoencoder import conv3x3
from mvar.models.weights import without_storage
from mvar.utils.files import expanded
from mvar.utils.state_dict import read

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of VGG16's convolutions, between the poolings (Simonyan and Zisserman, arXiv 1409.1556, table 1)."""
WIDTHS = tuple(stage[-1] for stage in STAGES)
MIN_RESOLUTION = 2 ** (len(STAGES) - 1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], for VGG16's input
EPSILON = 1e-10  # lpips's, in the normalization of the features

VGG16_FILE = "vgg16-397923af.pth"
LPIPS_FILE = Path("weights", "v0.1", "vgg.pth")  # in the package


class LPIPS(nn.Module):
    """LPIPS distances (B,) float32 of images and reconstructions (B, 3, H, W) in [−1, 1].

    Gradients flow to the reconstructions. The weights are frozen; the modes of training and evaluation do not differ.
    Autocast affects the convolutions only.
    """

    linear: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, features: nn.Sequential, linear: Tensor) -> None:
        """features: :func:`_vgg16`. linear: (1472,) float32, the weights of the features of all stages."""
        super().__init__()
        self.features = features.requires_grad_(False)
        self.register_buffer("linear", linear)
        mean, std = (torch.tensor(v, dtype=torch.float32, device=linear.device).view(3, 1, 1) for v in (MEAN, STD))
        self.register_buffer("shift", 2 * mean - 1)  # of pixels in [−1, 1]
        self.register_buffer("scale", 2 * std)
        self.eval()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Raises ValueError for other shapes, or fewer than 16×16 pixels."""
        for name, value in (("images", images), ("reconstructions", reconstructions)):
            if value.dim() != 4 or value.shape[1] != 3 or min(value.shape[2:]) < MIN_RESOLUTION:
                expected = f"(B, 3, H, W) with at least {MIN_RESOLUTION}×{MIN_RESOLUTION} pixels"
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
        if images.shape != reconstructions.shape:
            raise ValueError(
                f"reconstructions: expected shape {tuple(images.shape)}, got {tuple(reconstructions.shape)}"
            )
        stages = zip(self._stages(images), self._stages(reconstructions), self.linear.split(WIDTHS), strict=True)
        distances = [((a - b).square().mean(dim=(2, 3)) * weight).sum(dim=1) for a, b, weight in stages]
        return torch.stack(distances).sum(dim=0)

    def _stages(self, images: Tensor) -> Iterator[Tensor]:
        """The output of each stage, (B, C, h, w) float32, with unit norm over the channels."""
        x = (images.float() - self.shift) / self.scale
        for layer, following in pairwise([*self.features, nn.MaxPool2d(2)]):
            x = layer(x)
            if isinstance(following, nn.MaxPool2d):
                features = x.float()
                yield features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)


def load_lpips(path: str | Path, device: torch.device) -> LPIPS:
    """LPIPS with VGG16's weights from a file.

    Args:
        path: torchvision's vgg16-397923af.pth, or another .pth or .safetensors file with the same names. The
            classifier's weights are not used and may be missing.

    Raises:
        ImportError: the package lpips is not installed.
        OSError: the file does not exist.
        ValueError: it does not contain VGG16's weights.
    """
    path = expanded(path)
    state, _ = read(path, "VGG16")
    linear = _linear_weights()
    with without_storage():
        features = _vgg16()
    expected = {name: tuple(value.shape) for name, value in features.state_dict(prefix="features.").items()}
    found = {name: tuple(value.shape) for name, value in state.items() if name.startswith("features.")}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path}: expected the weights of torchvision's VGG16 ({VGG16_FILE}): {name}: "
                f"expected shape {expected.get(name)}, got {found.get(name)}"
            )
    weights = {name.removeprefix("features."): state[name].to(device, torch.float32, copy=True) for name in expected}
    features.load_state_dict(weights, assign=True)
    return LPIPS(features, linear.to(device))


def _linear_weights() -> Tensor:
    """The weights of the features of all stages, (1472,) float32, from the package's file."""
    package = find_spec("lpips")
    if package is None or package.origin is None:
        raise ImportError("LPIPS requires the package lpips: pip install lpips")
    path = Path(package.origin).parent / LPIPS_FILE
    state, _ = read(path, "LPIPS")
    names = [f"lin{i}.model.1.weight" for i in range(len(WIDTHS))]
    shapes = [tuple(state[name].shape) if name in state else None for name in names]
    if shapes != [(1, width, 1, 1) for width in WIDTHS]:
        raise ValueError(f"{path}: expected the weights of lpips 0.1 for VGG16, got {', '.join(state)} of {shapes}")
    return torch.cat([state[name].flatten() for name in names]).float()


def _vgg16() -> nn.Sequential:
    """VGG16's layers up to the last one that LPIPS uses, with torchvision's numbers as their names."""
    layers: list[nn.Module] = []
    width = 3
    for stage in STAGES:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for channels in stage:
            layers += [conv3x3(width, channels), nn.ReLU(inplace=True)]
            width = channels
    return nn.Sequential(*layers)
