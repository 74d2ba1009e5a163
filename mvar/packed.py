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

from functools import cache

import torch
from torch import Tensor, nn

from mvar.layers import FeedForward

PACKED_ROWS = 512  # the number of rows that a linear layer's packed layout is chosen for


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these layers can be used."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _packs(dtype)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """By trying: oneDNN is not everywhere, and packs bfloat16 only on CPUs with AVX-512 or avx_ne_convert."""
    try:
        with torch.no_grad():
            zeros = torch.zeros(64, 64, dtype=dtype, device="cpu")
            packed = torch.ops.mkldnn._reorder_linear_weight(zeros, PACKED_ROWS)
            torch.ops.mkldnn._linear_pointwise(zeros, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return False
    return True


class PackedLinear(nn.Module):
    """A linear layer, and GELU (tanh) after it if asked for."""

    takes_bias = True

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.out_features, self.bias = linear.out_features, linear.bias
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
