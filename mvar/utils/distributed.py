"""torch.distributed under torchrun: this process's rank and device, and the collectives that commands need."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from mvar.utils.errors import message

Value = TypeVar("Value")
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that torch.distributed requires."""
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class DistContext:
    """This process's rank among the processes of a run. Every process must call barrier and broadcast."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes. Unlike dist.barrier(), Python's signal handlers run while it waits."""
        if self.world_size > 1:
            work = dist.barrier(async_op=True)
            while not work.is_completed():
                time.sleep(POLL_SECONDS)
            work.wait()  # raises the error of a failed barrier

    def shard(self, items: Sequence[Value], *, desc: str, unit: str) -> Iterable[Value]:
        """This process's items, every `world_size`-th; the main process shows a progress bar if it has a terminal."""
        no_bar = None if self.is_main_process else True  # None: on a terminal only
        return tqdm(items[self.rank :: self.world_size], desc=desc, unit=unit, disable=no_bar)

    def broadcast(self, value: Value) -> Value:
        """The main process's value, in all processes."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]


def local_device(name: str | None) -> torch.device:
    """The device with this name; for "cuda" or None on a GPU machine the GPU of this process's LOCAL_RANK.

    Raises ValueError if it cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros((), dtype=torch.float32, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} cannot be used: {message(error)}") from error
    return device


def context_from_environment() -> DistContext:
    """Rank and world size from torchrun's environment variables, without a process group.

    A single process (rank 0 of 1) if WORLD_SIZE is at most 1 and another variable is missing. Raises ValueError if the
    variables are inconsistent.
    """
    world_size = _variable("WORLD_SIZE", 1)
    if world_size <= 1 and any(name not in os.environ for name in TORCHRUN):  # left over in a shell's environment
        return DistContext()
    rank = _variable("RANK", None)
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK: expected a number from 0 to below WORLD_SIZE, {world_size}, got {rank}")
    return DistContext(rank, world_size)


def _variable(name: str, default: int | None) -> int:
    text = os.environ.get(name, default)
    if text is None:
        raise ValueError(f"{name} is not set, and WORLD_SIZE is {os.environ['WORLD_SIZE']}: start with torchrun")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number, got {text!r}") from None


@contextmanager
def init_distributed(backend: str = "gloo") -> Iterator[DistContext]:
    """Initialize torch.distributed's default process group from torchrun's variables; destroy it at the end.

    A group that the program initialized itself is used, and left as it is. A single process without all of the
    variables gets none. The default backend serves commands that exchange Python objects only.

    Raises ValueError if a variable is missing or out of range.
    """
    if dist.is_available() and dist.is_initialized():
        yield DistContext(dist.get_rank(), dist.get_world_size())
        return
    expected = context_from_environment()
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing and expected.world_size == 1:  # torchrun's group of one process is initialized: FSDP2 requires a group
        yield expected
        return
    if missing:
        raise ValueError(f"{missing[0]} is not set, and WORLD_SIZE is {expected.world_size}: start with torchrun")
    if not 0 <= _variable("MASTER_PORT", 0) < 1 << 16:
        raise ValueError(f"MASTER_PORT: expected a port, below {1 << 16}, got {os.environ['MASTER_PORT']!r}")
    dist.init_process_group(backend)
    try:
        yield DistContext(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
