"""Convolutional encoder and decoder of the image tokenizer.

The network is VQGAN's (Esser et al., arXiv 2012.09841) as VAR uses it (Tian et al., arXiv 2404.02905):
residual blocks at successively halved resolutions, with single-head self-attention at the lowest one. Module names are
those of the published weight files.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvar_kernels as mk
from mvar_kernels.dispatch import native

NORM_GROUPS = 32
"""Number of groups of every GroupNorm; must divide all widths."""


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6, dtype=torch.float32)


def _conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, dtype=torch.float32)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    """3×3 convolution in float32, independent of torch's default dtype."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=padding, dtype=torch.float32)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU(norm(x)): one op outside of torch.compile, unless `norm` was changed.

    Without the C++ kernels, on a GPU above all, only without gradients, as PyTorch's backward is the faster one, and
    outside of autocast, in which a GPU's norms, unlike a CPU's, are float32.
    """
    if (
        torch.compiler.is_compiling()
        or type(norm) is not nn.GroupNorm
        or not norm.affine
        or "forward" in vars(norm)
        or norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or (not _has_cpp_kernel(x) and (torch.is_grad_enabled() or _is_autocast(x.device.type)))
    ):
        return F.silu(norm(x), inplace=True)
    return mk.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _has_cpp_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and native() is not None


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class ResidualBlock(nn.Module):
    """Two times (GroupNorm, SiLU, 3×3 convolution) and a skip connection: (B, in, h, w) → (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        same_width = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same_width else _conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        return self.conv2(norm_silu(self.norm2, h)).add_(self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions and a skip connection: (B, C, h, w) → (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = _conv1x1(channels, 3 * channels)
        self.proj_out = _conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h·w, 3·C)
        q, k, v = rows.chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, h·w, C)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class _Level(nn.Module):
    """Blocks at one resolution. With attention, each residual block is followed by an attention block."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1]) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttentionBlock(channels) if attention else nn.Identity() for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return x


class _DownLevel(_Level):
    def __init__(self, in_channels: int, channels: int, num_blocks: int, attention: bool, last: bool) -> None:
        super().__init__(in_channels, channels, num_blocks, attention)
        # Padding on the right and at the bottom only: the published weights expect this alignment.
        layers = [("pad", nn.ZeroPad2d((0, 1, 0, 1))), ("conv", conv3x3(channels, channels, stride=2, padding=0))]
        self.downsample = nn.Identity() if last else nn.Sequential(OrderedDict[str, nn.Module](layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class UpLevel(_Level):
    def __init__(self, in_channels: int, channels: int, num_blocks: int, attention: bool, last: bool) -> None:
        super().__init__(in_channels, channels, num_blocks, attention)
        layers = [("interpolate", nn.Upsample(scale_factor=2, mode="nearest")), ("conv", conv3x3(channels, channels))]
        self.upsample = nn.Identity() if last else nn.Sequential(OrderedDict[str, nn.Module](layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


def _middle(channels: int, attention: bool) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            block_1=ResidualBlock(channels, channels),
            attn_1=AttentionBlock(channels) if attention else nn.Identity(),
            block_2=ResidualBlock(channels, channels),
        )
    )


class Encoder(nn.Module):
    """Images (B, 3, R, R) → features (B, code_dim, R/f, R/f), where f = 2 ** (len(ch_mult) − 1).

    Level i has width ch·ch_mult[i] and `num_res_blocks` residual blocks; `attention` adds self-attention
    at the lowest level and in the middle blocks.
    """

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attention: bool, code_dim: int) -> None:
        super().__init__()
        widths = [ch] + [ch * mult for mult in ch_mult]
        lowest = len(ch_mult) - 1
        self.conv_in = conv3x3(3, ch)
        self.down = nn.ModuleList(
            _DownLevel(widths[i], widths[i + 1], num_res_blocks, attention and i == lowest, last=i == lowest)
            for i in range(len(ch_mult))
        )
        self.mid = _middle(widths[-1], attention)
        self.norm_out = _norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], code_dim)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(norm_silu(self.norm_out, h))


class Decoder(nn.Module):
    """Features (B, code_dim, h, w) → images (B, 3, h·f, w·f). Mirrors the encoder, with one more block per level."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attention: bool, code_dim: int) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        widths.append(widths[-1])  # output of the middle blocks
        lowest = len(ch_mult) - 1
        self.conv_in = conv3x3(code_dim, widths[-1])
        self.mid = _middle(widths[-1], attention)
        self.up = nn.ModuleList(  # from the highest resolution to the lowest, as in the weight files
            UpLevel(widths[i + 1], widths[i], num_res_blocks + 1, attention and i == lowest, last=i == 0)
            for i in range(len(ch_mult))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, features: Tensor) -> Tensor:
        h = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(norm_silu(self.norm_out, h))
