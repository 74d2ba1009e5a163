"""Peak memory of this process or its GPU, or of a child process. Linux."""

import gc
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.common.environment import ALLOCATOR, DEVICE
from mvar.utils.memory import return_freed_memory

T = TypeVar("T")


def peak_gib(run: Callable[[], Any]) -> float:
    """The most memory that this process, or its GPU, holds while `run` runs, including what it held before."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    run()
    return _status_gib("VmHWM")


def held_gib() -> float:
    """Memory that this process, or its GPU, holds now."""
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated() / 2**30
    gc.collect()
    return _status_gib("VmRSS")


def _status_gib(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 2**20


def in_subprocess(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a function in a process of its own, without the settings for timing, which keep freed memory.

    Raises RuntimeError where that process ends without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    settings = {name: os.environ.pop(name) for name in ALLOCATOR if name in os.environ}
    process.start()
    os.environ.update(settings)
    sender.close()
    try:
        result: T = receiver.recv()
        return result
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__}: exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    sender.send(function(*arguments))


def trim() -> None:
    """Return free memory to the system, which other processes need, in spite of the settings for timing."""
    gc.collect()
    return_freed_memory()
