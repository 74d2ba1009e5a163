"""Tensors on their way to the host while the device goes on."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start to copy tensors of one device to the host; the function given back waits for them.

    It waits for these copies alone, and not for what the device was told to do since.
    """
    device = tensors[0].device
    if device.type != "cuda":
        return lambda: tensors
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Pinned memory, which torch keeps for the next copy: only that can be written while the host does other things.
        copies = tuple(
            torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True).copy_(t, non_blocking=True)
            for t in tensors
        )
        arrived = stream.record_event()
    for t in tensors:
        t.record_stream(stream)

    def wait() -> tuple[Tensor, ...]:
        arrived.synchronize()
        return copies

    return wait


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
