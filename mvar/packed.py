"""Layers with their weights packed for oneDNN beforehand, through the operators that torch.compile itself uses for
frozen graphs. For inference on a CPU, in float32 and bfloat16.

Linear layers, 1024×4096, one AMD Zen 5 core, GFLOP/s by rows:

    rows            2     32    512
    torch, fp32     30     54     91        (MKL)
    packed, fp32    49    165    216
    torch, bf16     51    279    360
    packed, bf16   147    356    439

Only under torch.no_grad(): where gradients are recorded oneDNN takes its plain reference code for some bfloat16 sizes
(1024×4256: 0.1 GFLOP/s).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.model import FeedForward

PACKED_ROWS = 512  # the number of rows that a linear layer's packed layout is chosen for


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these layers can be used."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return device.type == "cpu" and known and dtype in (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """A linear layer, and GELU (tanh) after it if asked for."""

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.features, self.bias = linear.out_features, linear.bias
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight, PACKED_ROWS)
        self.after: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias if bias is None else bias, *self.after
        )
        return out


class PackedFeedForward(nn.Module):
    def __init__(self, ffn: FeedForward) -> None:
        super().__init__()
        self.fc1, self.fc2 = PackedLinear(ffn.fc1, gelu=True), PackedLinear(ffn.fc2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x))
        return out


class PackedUpsample(nn.Module):
    """Nearest-neighbour doubling and a 3×3 convolution, as one product: (B, C, h, w) → (B, C', 2h, 2w), channels last.

    Around a corner where four source pixels meet lie four pixels of the doubled map, one of each parity, and the
    3×3 windows of all four hold copies of just these source pixels. With the taps of copies added up beforehand,

        even row:  tap 0 on the upper source row, taps 1 + 2 on the lower
        odd row:   taps 0 + 1 on the upper,       tap 2 on the lower          (columns likewise)

    every corner is one row of a linear layer 4·C → 4·C': 4 products a pixel instead of 9. With it VAR's decoder at
    256×256 takes 82 % of the time in float32 and 87 % in bfloat16 (two AMD Zen 5 cores). Its other convolutions are
    left to torch: packed beforehand they made it 15 to 22 % slower.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        out_channels, channels = conv.weight.shape[:2]
        # [parity][source row][tap]
        fold = conv.weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        weight = torch.einsum("ocij,ayi,bxj->aboyxc", conv.weight, fold, fold)  # (2, 2, C', 2, 2, C)
        linear = nn.Linear(4 * channels, 4 * out_channels, device="meta")
        linear.weight = nn.Parameter(weight.reshape(4 * out_channels, 4 * channels), requires_grad=False)
        assert conv.bias is not None
        linear.bias = nn.Parameter(conv.bias.detach().repeat(4), requires_grad=False)
        self.linear = PackedLinear(linear)

    def forward(self, x: Tensor) -> Tensor:
        B, _, h, w = x.shape
        rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, h+2, w+2, C)
        around = [rows[:, y : y + h + 1, x : x + w + 1] for y in (0, 1) for x in (0, 1)]
        corners = self.linear(torch.cat(around, -1)).unflatten(-1, (2, 2, -1))  # (B, h+1, w+1, 2, 2, C')
        out = corners.new_empty(B, h, 2, w, 2, corners.shape[-1])
        for a in (0, 1):
            for b in (0, 1):
                # An even pixel's corner is the one before its source pixel, an odd one's the one after it.
                out[:, :, a, :, b] = corners[:, a : a + h, b : b + w, a, b]
        return out.view(B, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)
