"""Where a generation spends its time, by part of the model, under torch.profiler."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import mvar
from benchmarks.analysis.flops import OURS, Work, decoder_flops, decoder_norm_bytes, work
from benchmarks.analysis.roofline import copy_gbps, matmul_tflops
from benchmarks.common.environment import DEVICE
from benchmarks.common.timing import interleaved
from mvar.models.tokenizer import Tokenizer

GENERATION, DECODER, CONVOLUTIONS = "generation", "decoder", "convolutions"
PART_OF = {
    "aten::linear": "linear layers",
    "mkldnn::_linear_pointwise": "linear layers",
    "mvar::scale_attention": "attention",
    "mvar::mamba2_mixer": "mixer",
    "mvar::adaln": "adaLN",
    "mvar::gated_adaln": "adaLN",
    "mvar::sample_tokens": "drawing",
    "aten::embedding": "quantizer",
    "aten::conv2d": CONVOLUTIONS,
    "aten::conv_transpose2d": CONVOLUTIONS,
    "aten::upsample_bicubic2d": "quantizer",
    "aten::adaptive_avg_pool2d": "quantizer",
    DECODER: DECODER,
}
"""Operators, and the part that their time counts for. What an operator calls counts for its caller, except in the
decoder, where convolutions count for themselves."""


def profile_cpu(model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds by part of the median of three generations, beside the lower bound of each part."""
    run = partial(mvar.generate, model, tokenizer, labels, dtype=dtype)
    run()
    total, spent = sorted((_profiled(run) for _ in range(3)), key=lambda found: found[0])[1]
    convolutions = Work(0, round(decoder_flops(tokenizer.config, len(labels))))
    decoder = Work(decoder_norm_bytes(tokenizer.config, len(labels), dtype.itemsize))
    parts = work(OURS, model.config, len(labels), dtype.itemsize)
    parts |= {CONVOLUTIONS: convolutions, "quantizer": Work(), DECODER: decoder}
    gflops, gbps = 1e3 * matmul_tflops(dtype), copy_gbps()
    return {
        "total_ms": total,
        "parts_ms": spent | {"rest": total - sum(spent.values())},
        "gflop": {name: part.flops / 1e9 for name, part in parts.items()},
        "moved_mb": {name: part.moved_bytes / 1e6 for name, part in parts.items()},
        "peak_gflops": gflops,
        "copy_gbps": gbps,
        "floor_ms": {name: max(part.flops / gflops, part.moved_bytes / gbps) / 1e6 for name, part in parts.items()},
    }


def profile_gpu(model: mvar.Model, tokenizer: Tokenizer, labels: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds by part of one generation, the gaps between kernels, and the rate of the linear layers.

    A kernel counts for the operator that launches it, which a replayed CUDA graph does not show. So kernels are timed
    in a generation without a graph and subtracted from the time of a replay, which runs the same kernels: the
    difference is the gaps between them, and the host before and after the replay.
    """
    run = partial(mvar.generate, model, tokenizer, labels, dtype=dtype)
    run()
    run(graph=False)
    total = interleaved({"mvar": run}, rounds=5, seconds=0, warm_up=False)["mvar"]
    kernels, spent = _profiled(partial(run, graph=False))
    linear = work(OURS, model.config, len(labels), dtype.itemsize)["linear layers"]
    return {
        "batch": len(labels),
        "total_ms": total,
        "parts_ms": spent | {"other kernels": kernels - sum(spent.values()), "gaps": total - kernels},
        "linear_tflops": linear.flops / spent["linear layers"] / 1e9 if spent["linear layers"] else None,
        "product_tflops": matmul_tflops(dtype),
    }


def _profiled(run: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Milliseconds of a call, in all and by part: of the kernels that it launches, without a GPU of the operators."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with profile(activities=activities) as found:
        with record_function(GENERATION):
            run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    parts = dict.fromkeys(dict.fromkeys(PART_OF.values()), 0.0)

    def add(event: Any, part: str | None = None) -> None:
        """Count the time that an event spends itself, not in what it calls, for its part or that of its caller."""
        if part in (None, DECODER):
            part = PART_OF.get(event.name, part)
        if part:
            parts[part] += _ms(event) - sum(map(_ms, event.cpu_children))
        for child in event.cpu_children:
            add(child, part)

    # A range is an event of the host, with the kernels launched in it; its copy on the device has none.
    on_host = torch.autograd.DeviceType.CPU
    (whole,) = (e for e in found.events() if e.name == GENERATION and e.device_type == on_host)
    add(whole)
    return _ms(whole), parts


def _ms(event: Any) -> float:
    us: float = event.device_time_total if DEVICE.type == "cuda" else event.cpu_time_total
    return us / 1e3
