"""The processes of a run that torchrun started: which device and share is whose, and where they wait for each other."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from mvar.errors import message

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process among all of a run."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Wait for all others to come here, too."""
        if self.size > 1:
            dist.barrier()

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


@contextmanager
def joined(backend: str = "gloo") -> Iterator[Processes]:
    """Join the other processes, of torch.distributed's `backend`; without torchrun's variables there is none.

    The default suits those that exchange a file's name and their presence: nothing for a GPU.
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone and "MASTER_ADDR" not in os.environ:  # torchrun's group of one is joined: FSDP2 asks for a group
        yield Processes()
        return
    dist.init_process_group(backend)
    # torchrun ends all processes with the first that fails: as an exception, so that they tidy up.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()
