"""The dtype in which a device generates fastest: by a measurement on a CPU, by the architecture on a GPU."""

import threading
import time
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor, nn

from mvar.inference.onednn import PrepackedLinear, can_prepack
from mvar_kernels.precision import true_float32

CPU_DTYPES = (torch.float32, torch.bfloat16)
"""Without float16, for which there are neither prepacked layers nor C++ kernels."""
ROWS, IN_FEATURES, OUT_FEATURES = 16, 16384, 64
"""One block of oneDNN's, which a single thread computes: waiting for other threads on a busy machine is not measured.

The weights are 2 MiB in bfloat16, more than an L1 cache.
"""
ROUNDS, MAX_SECONDS = 9, 0.03
MIN_SPEEDUP = 2**0.5
"""Above it, bfloat16 is preferred to float32, which is more precise.

An instruction that multiplies bfloat16 has at least twice the rate of float32's; without one, bfloat16 is converted to
float32 first, and has at most the same rate. √2 is as far from 2 as from 1.
"""


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which generation is fastest on the device.

    CPU: bfloat16 if :func:`linear_rates` has more than :data:`MIN_SPEEDUP` times the rate of float32, else float32.
    GPU: bfloat16 from Ampere on, float16 on older ones. Other devices: float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type != "cpu":
        return torch.float32
    rates = linear_rates()
    faster = rates.get(torch.bfloat16, 0.0) > MIN_SPEEDUP * rates.get(torch.float32, 0.0)
    return torch.bfloat16 if faster else torch.float32


def linear_rates() -> Mapping[torch.dtype, float]:
    """GFLOP/s of one thread in prepacked linear layers on the CPU by dtype, measured at the first call in a process.

    Float32 is true float32. Empty where bfloat16 cannot be prepacked: there torch's own linear layers are slower in
    bfloat16 than in float32 (7 and 30 GFLOP/s for 64 rows and 1024×1024 weights, AMD EPYC family 25 model 17, oneDNN
    limited to AVX2).
    """
    with _lock:  # functools.cache alone would let several threads measure, and disturb one another
        return _linear_rates()


_lock = threading.Lock()


@cache
def _linear_rates() -> Mapping[torch.dtype, float]:
    cpu = torch.device("cpu")
    if not all(can_prepack(cpu, dtype) for dtype in CPU_DTYPES):
        return {}
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), true_float32(cpu):
        calls = {dtype: _linear_call(dtype) for dtype in CPU_DTYPES}
        for call in calls.values():
            _thread_seconds(call)  # oneDNN compiles a kernel
        # Interleaved, as the clock rate may change. The minimum, as caches are shared with other processes.
        rounds: list[dict[torch.dtype, float]] = []
        while len(rounds) < ROUNDS and sum(sum(seconds.values()) for seconds in rounds) < MAX_SECONDS:
            rounds.append({dtype: _thread_seconds(call) for dtype, call in calls.items()})
    gflop = 2e-9 * ROWS * IN_FEATURES * OUT_FEATURES
    return {dtype: gflop / min(seconds[dtype] for seconds in rounds) for dtype in calls}


def _linear_call(dtype: torch.dtype) -> Callable[[], Tensor]:
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False, dtype=dtype, device="meta")
    weight = torch.ones(OUT_FEATURES, IN_FEATURES, dtype=dtype, device="cpu")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return partial(PrepackedLinear(linear), torch.ones(ROWS, IN_FEATURES, dtype=dtype, device="cpu"))


def _thread_seconds(call: Callable[[], Tensor]) -> float:
    """CPU time of the calling thread, without the time for which other processes run on its core."""
    start = time.thread_time()
    call()
    return time.thread_time() - start
