"""Where a GPU spends a generation: kernels by part of the engine, and the gaps between them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

import mvar
from benchmarks.measure import DEVICE, interleaved
from benchmarks.parts import PARTS, observed_parts
from mvar.tokenizer import Tokenizer

WHOLE = "generation"


def timeline(model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds by part of one generation, and the linear layers' rate.

    Kernels have names of their own libraries'; what they are for is known where they are launched. So they are timed in
    a generation without a graph, under torch's profiler, and taken from the time of a replay, which runs the same ones:
    what is left is gaps between kernels, and the host before and after the replay.
    """

    def run(**options: Any) -> mvar.Generated:
        return mvar.generate(model, tokenizer, labels, dtype=dtype, **options)

    run()
    run(graph=False)
    total_ms = interleaved({"mvar": run}, rounds=5, seconds=0, warm_up=False)["mvar"]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with observed_parts(record_function) as work, profile(activities=activities) as found:
        with record_function(WHOLE):
            run(graph=False)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    kernels = dict.fromkeys((WHOLE, *PARTS), 0.0)
    for event in found.events():
        # A range is an event of the host, which knows the kernels launched in it; its copy on the device knows none.
        if event.name in kernels and event.device_type == torch.autograd.DeviceType.CPU:
            kernels[event.name] += _device_us(event) / 1e3
    kernel_ms = kernels.pop(WHOLE)
    linear = kernels["linear layers"]
    return {
        "batch": len(labels),
        "total_ms": total_ms,
        "parts_ms": kernels | {"other kernels": kernel_ms - sum(kernels.values()), "gaps": total_ms - kernel_ms},
        "linear_tflops": work["linear layers"].flops / linear / 1e9 if linear else None,
        "product_tflops": product_tflops(dtype),
    }


def _device_us(event: Any) -> float:
    """Of the kernels launched in a range; on a machine without a GPU, of the operators on the host."""
    return float(event.device_time_total if DEVICE.type == "cuda" else event.cpu_time_total)


def product_tflops(dtype: torch.dtype, size: int = 8192) -> float:
    """Of a large product of random matrices here."""
    size = size if DEVICE.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    ms = interleaved({"product": lambda: a @ b}, rounds=9, seconds=0.3)["product"]
    return 2 * size**3 / ms / 1e9
