"""The processes of a run that torchrun started: which device and share is whose, and where they wait for each other."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from mvar.errors import message

Value = TypeVar("Value")
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed asks for."""
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Processes:
    """This process among all of a run."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Wait for all others to come here, too; signals are handled meanwhile, which dist.barrier() does not."""
        if self.size > 1:
            arrival = dist.barrier(async_op=True)
            while not arrival.is_completed():
                time.sleep(POLL_SECONDS)
            arrival.wait()  # raises what went wrong

    def agreed(self, value: Value) -> Value:
        """The first process's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]


def own_device(name: str | None) -> torch.device:
    """The device asked for, or cuda where there is one: of several, this process's under torchrun.

    Raises ValueError where it cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros((), dtype=torch.float32, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} cannot be used: {message(error)}") from error
    return device


def launched() -> Processes:
    """This process's rank among those that torchrun's variables tell of; alone, where they tell of one or of none.

    Raises ValueError where they contradict one another.
    """
    size = _variable("WORLD_SIZE", 1)
    if size <= 1 and any(name not in os.environ for name in TORCHRUN):  # whatever is left in the environment
        return Processes()
    rank = _variable("RANK", None)
    if not 0 <= rank < size:
        raise ValueError(f"RANK: expected a number from 0 to below WORLD_SIZE, {size}, got {rank}")
    return Processes(rank, size)


def _variable(name: str, default: int | None) -> int:
    text = os.environ.get(name, default)
    if text is None:
        raise ValueError(f"{name} is not set, and WORLD_SIZE is {os.environ['WORLD_SIZE']}: start with torchrun")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number, got {text!r}") from None


@contextmanager
def joined(backend: str = "gloo") -> Iterator[Processes]:
    """Join the other processes, of torch.distributed's `backend`; where the program has joined them itself, or without
    all of torchrun's variables and more than one process, there is nothing to do.

    The default suits those that exchange a file's name and their presence: nothing for a GPU.
    """
    if dist.is_available() and dist.is_initialized():  # by the program that calls
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    expected = launched()
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing and expected.size == 1:  # torchrun's group of one is joined: FSDP2 asks for a group
        yield expected
        return
    if missing:
        raise ValueError(f"{missing[0]} is not set, and WORLD_SIZE is {expected.size}: start with torchrun")
    if not 0 <= _variable("MASTER_PORT", 0) < 1 << 16:
        raise ValueError(f"MASTER_PORT: expected a port, below {1 << 16}, got {os.environ['MASTER_PORT']!r}")
    dist.init_process_group(backend)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
