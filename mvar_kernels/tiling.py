"""Tile shapes of Triton kernels: read from a committed table, never tuned at the first call.

So results and start-up time do not change from run to run. `python -m benchmarks.tune_triton` writes
the table (tiles.json) on a GPU: architecture → kernel → shape class → tile. What is not in it gets the
kernel's first candidate. "interpreter" is an architecture too: there, few and large tiles are fast. Its class "*" says
how the first candidate differs whatever the shape. Attention's are as large as its cases bear: there BLAS multiplies,
so that a score's last bit depends on where in its tile it lies, which the float32 gradients of scores of 100 show.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar_kernels import ffi
from mvar_kernels.dispatch import architecture, interpreted

TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Tile:
    """constexpr sizes of a kernel ("BLOCK_L": 64), its warps and the stages of its software pipeline.

    Instead of triton.Config, since the table is also read where Triton is not installed.
    """

    sizes: Mapping[str, int]
    warps: int = 4
    stages: int = 2

    def arguments(self) -> dict[str, Any]:
        """The launch's keyword arguments."""
        return {**self.sizes, "num_warps": self.warps, "num_stages": self.stages}


@cache
def table() -> Mapping[str, Mapping[str, Mapping[str, Tile]]]:
    raw = json.loads(TABLE.read_text())
    return {
        arch: {kernel: {name: Tile(**tile) for name, tile in classes.items()} for kernel, classes in kernels.items()}
        for arch, kernels in raw.items()
    }


Choose = Callable[[str, str, Sequence[Tile], torch.device], Tile]
_override: Choose | None = None


@contextmanager
def override(choose: Choose) -> Iterator[None]:
    """Select tiles by `choose`, with the arguments of :func:`chosen`, inside the context: for tuning."""
    global _override
    previous, _override = _override, choose
    try:
        yield
    finally:
        _override = previous


def chosen(kernel: str, shape_class: str, candidates: Sequence[Tile], device: torch.device) -> Tile:
    """The tile to launch `kernel` with. Shapes of one `shape_class` ("D64 bfloat16") share one."""
    if _override is not None:
        return _override(kernel, shape_class, candidates, device)
    classes, first = table().get(architecture(device), {}).get(kernel, {}), candidates[0]
    if "*" in classes:
        return replace(first, sizes={**first.sizes, **classes["*"].sizes})
    return classes.get(shape_class, first)


def matmul_instruction(device: torch.device) -> str:
    """What multiplies tiles of 16-bit numbers: "wgmma" on sm_90, "tcgen05" on sm_100 to sm_110, else "mma.sync"."""
    arch = architecture(device)
    capability = int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 90
    return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(capability // 10, "mma.sync")


def dot_block(size: int) -> int:
    """The block size of an operand of tl.dot with `size` elements: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def unsupported_dtype(first: Tensor) -> str | None:
    """Why Triton kernels do not support the dtype of the first input, which the others share, or None."""
    if interpreted() and first.dtype == torch.bfloat16:
        return "Triton's interpreter does not round bfloat16 as GPUs do"
    return ffi.unsupported_dtype(first, (torch.float32, torch.float16, torch.bfloat16))
