"""Linear layers with weights prepacked for oneDNN, by the operators that torch.compile uses for frozen graphs.

For inference on a CPU in float32 and bfloat16.

Linear layers, 1024×4096, one AMD Zen 5 core, GFLOP/s by rows:

    rows            2     32    512
    torch, fp32      30     54     91        (MKL)
    prepacked, fp32 49    165    216
    torch, bf16     51    279    360
    prepacked, bf16 147    356    439

Only under torch.no_grad(): with gradients, oneDNN uses its reference implementation for some bfloat16 sizes (1024×4256:
0.1 GFLOP/s).
"""

from functools import cache

import torch
from torch import Tensor, nn

from mvar.models.layers import FeedForward

PREPACK_ROWS = 512  # number of rows for which oneDNN chooses the layout


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device and dtype support these layers."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _can_prepack(dtype)


@cache
def _can_prepack(dtype: torch.dtype) -> bool:
    """Tried out, as some builds lack oneDNN and it prepacks bfloat16 only on CPUs with AVX-512 or avx_ne_convert."""
    try:
        with torch.no_grad():
            zeros = torch.zeros(64, 64, dtype=dtype, device="cpu")
            packed = torch.ops.mkldnn._reorder_linear_weight(zeros, PREPACK_ROWS)
            torch.ops.mkldnn._linear_pointwise(zeros, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return False
    return True


class PrepackedLinear(nn.Module):
    """A linear layer, optionally followed by GELU (tanh)."""

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.out_features, self.bias = linear.out_features, linear.bias
        self.prepacked: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight, PREPACK_ROWS)
        self.activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.prepacked, self.bias, *self.activation)
        return out


class PrepackedFeedForward(nn.Module):
    def __init__(self, ffn: FeedForward) -> None:
        super().__init__()
        self.fc1, self.fc2 = PrepackedLinear(ffn.fc1, gelu=True), PrepackedLinear(ffn.fc2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x))
        return out
