"""Simulates float32 matrix products of a CPU with AMX on any CPU.

On such a CPU oneDNN rounds the factors to bfloat16 if torch's precision is "medium" (and, with AMX for float16, to 11
bits at "high"), and accumulates in float32.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mvar_kernels import precision

aten = torch.ops.aten
FACTORS: Mapping[Any, tuple[int, ...]] = {
    aten.mm.default: (0, 1),
    aten.mm.out: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmm.out: (1, 2),
    aten.addmm_.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.addbmm.default: (1, 2),
    aten.linear.default: (0, 1),
}
"""Positions of the factors among the arguments."""


class _Rounding(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        places = FACTORS.get(func, ())
        if places and args[places[0]].dtype == torch.float32 and args[places[0]].device.type == "cpu" and reduced():
            self.rounded += 1
            args = tuple(_rounded(value) if i in places else value for i, value in enumerate(args))
        return func(*args, **(kwargs or {}))


def reduced() -> bool:
    """Whether torch's settings allow AMX to round the factors of float32 products."""
    if precision.HAS_NEW:
        return torch.backends.mkldnn.matmul.fp32_precision not in precision.TRUE
    return torch.get_float32_matmul_precision() != "highest"


def _rounded(factor: Tensor) -> Tensor:
    return factor.bfloat16().float()


@contextmanager
def amx() -> Iterator[_Rounding]:
    """Simulates products with AMX and counts them; the cached measurement of the CPU's precision is cleared."""
    precision._measured.cache_clear()
    try:
        with _Rounding() as mode:
            yield mode
    finally:
        precision._measured.cache_clear()
