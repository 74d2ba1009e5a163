"""What time a launch would take on an H100, estimated from what kernel_costs.py counts."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Machine(NamedTuple):
    """Rates that kernels reach, not peaks.

    issue: share of the cycles in which each of a multiprocessor's four schedulers issues an instruction.
    mma_sync: rate of mma.sync, as a share of that of wgmma.
    """

    multiprocessors: int
    clock: float
    issue: float
    bytes_per_s: float
    flops_per_s: float
    mma_sync: float
    launch_us: float


# Assumed, not measured. One instruction in two cycles is what kernels reach that alternate between tensor cores and
# arithmetic with 8 to 16 warps on a multiprocessor, each of which waits 4 to 30 cycles for a result: 0.45 with 8 warps,
# 0.55 with 16. On Hopper mma.sync reaches some 0.62 of wgmma's rate (Luo et al., arXiv 2402.13499).
H100 = Machine(132, 1.75e9, 0.5, 3.0e12, 800e12, 0.62, 1.0)
ARCH = "sm_90"


def limits_us(row: Mapping[str, Any]) -> dict[str, float]:
    """What each part of an H100 would take for a launch, alone."""
    seconds = 0.0
    for kind, flops in row["tensor_core_flops"].items():
        instruction, dtype = kind.split()
        share = (0.5 if dtype == "TF32" else 1.0) * (1.0 if instruction == "HGMMA" else H100.mma_sync)
        seconds += flops / (share * H100.flops_per_s)
    issued = H100.multiprocessors * 4 * H100.clock * H100.issue
    return {
        "memory": 1e6 * (row["read_bytes"] + row["written_bytes"]) / H100.bytes_per_s,
        "instructions": 1e6 * row["warp_instructions"] / issued,
        "tensor cores": 1e6 * seconds,
    }


def estimate_us(row: Mapping[str, Any]) -> float:
    """A launch's time: the slowest part's, and the gap between two launches of a CUDA graph."""
    return max(limits_us(row).values()) + H100.launch_us


def bound_us(moved_bytes: int, flops: int) -> float:
    """The op's lower bound (roofline), from the bytes and FLOPs of its spec."""
    return 1e6 * max(moved_bytes / H100.bytes_per_s, flops / H100.flops_per_s)
