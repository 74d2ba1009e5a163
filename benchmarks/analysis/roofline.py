"""The roofline model (Williams et al., 2009): rates of a large matmul and a large copy, and the ops' results."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks.common.environment import DEVICE
from benchmarks.common.results import save
from benchmarks.common.timing import interleaved
from mvar.inference.onednn import PrepackedLinear, can_prepack
from mvar.train.metrics import peak_flops

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
NAME = "products"
SIZES = {"cpu": (2048, 2048, 4096), "cuda": (8192, 8192, 8192)}
Row = Mapping[str, Any]
Ops = Mapping[str, Sequence[Row]]


def matmul_tflops(dtype: torch.dtype) -> float:
    """Of a large linear layer, on a CPU with prepacked weights where that is supported."""
    rows, inputs, outputs = SIZES[DEVICE.type]
    linear = torch.nn.Linear(inputs, outputs, bias=DEVICE.type == "cpu", dtype=dtype, device=DEVICE)
    layer = PrepackedLinear(linear) if can_prepack(DEVICE, dtype) else linear
    x = torch.randn(rows, inputs, device=DEVICE).to(dtype)
    with torch.no_grad():
        ms = interleaved({"matmul": lambda: layer(x)}, rounds=9, seconds=0.5)["matmul"]
    return 2 * rows * inputs * outputs / ms / 1e9


def copy(moved_bytes: int) -> Callable[[], torch.Tensor]:
    """A copy of so many bytes, half read and half written: the memory bound of an op that must move as many."""
    source = torch.ones(moved_bytes // 8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_gbps() -> float:
    """Of a copy far larger than the caches, bytes read and written."""
    ms = interleaved({"copy": copy(2**29)}, rounds=9, seconds=0.5)["copy"]
    return 2**29 / ms / 1e6


@cache
def peak_tflops(dtype: torch.dtype) -> tuple[float, str]:
    """The peak matmul rate and its source: in 16 bits on a known GPU its data sheet, else a measurement."""
    known = peak_flops(DEVICE) if dtype.itemsize == 2 else None
    return (known / 1e12, "data sheet") if known else (matmul_tflops(dtype), "measured")


def save_rates() -> None:
    """Write the matmul rates of this machine to products.json."""
    rows = [{"dtype": str(d).removeprefix("torch."), "gflops": 1e3 * matmul_tflops(d)} for d in DTYPES[DEVICE.type]]
    print(rows, save(NAME, rows))


class Point(NamedTuple):
    """One op, case, dtype and pass, of the fastest mvar backend.

    intensity: FLOP per byte that the op must do and move at least. gflops: reached. limit_gflops: what the slower of
    two would reach, a copy of as many bytes and as many FLOPs at the rate of a large matmul.
    """

    op: str
    dtype: str
    direction: str
    intensity: float
    gflops: float
    limit_gflops: float

    @property
    def share(self) -> float:
        return self.gflops / self.limit_gflops


def point(op: str, row: Row, matmul_gflops: Mapping[str, float]) -> Point | None:
    """None where no mvar backend gave a correct answer."""
    if not (ours := ours_ms(row)):
        return None
    gflop, dtype = row["flops"] / 1e9, row["dtype"]
    limit_ms = max(row["median_ms"]["copy"], 1e3 * gflop / matmul_gflops.get(dtype, float("inf")))
    intensity = row["flops"] / row["moved_bytes"]
    return Point(op, dtype, row["pass"], intensity, 1e3 * gflop / min(ours.values()), 1e3 * gflop / limit_ms)


def points(ops: Ops, matmul_gflops: Mapping[str, float]) -> list[Point]:
    found = (point(op, row, matmul_gflops) for op, rows in ops.items() for row in rows)
    return [p for p in found if p]


def fastest_copy_gbps(ops: Ops) -> float:
    """The fastest copy of any row, bytes read and written."""
    return max(row["moved_bytes"] / row["median_ms"]["copy"] for rows in ops.values() for row in rows) / 1e6


def ours_ms(row: Row) -> dict[str, float]:
    """Backend → milliseconds, of mvar's backends."""
    return {name: ms for name, ms in row["median_ms"].items() if name.startswith("mvar")}
