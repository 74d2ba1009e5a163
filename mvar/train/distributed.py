"""The processes of a run: torch.distributed as torchrun sets it up, DDP, FSDP2, activation checkpointing."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mvar import processes
from mvar.model import Model
from mvar.processes import Processes, own_device
from mvar.train.objective import Objective


@dataclass(frozen=True)
class World(Processes):
    """The processes of a run, each with its device, which add up tensors."""

    device: torch.device = torch.device("cpu")

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.total(torch.tensor(float(flag), dtype=torch.float32, device="cpu")))

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def union(self, names: Iterable[str]) -> set[str]:
        """What any process has."""
        found: list[set[str]] = [set(names)] * self.size
        if self.size > 1:
            dist.all_gather_object(found, set(names))
        return set().union(*found)


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun started (gloo on the CPU, NCCL on GPUs), or be alone; leave at the end."""
    where = own_device(device)
    current = torch.cuda.device(where) if where.type == "cuda" else nullcontext()
    with current, processes.joined("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo") as found:
        yield World(found.rank, found.size, where)


def recompute_blocks(model: Model) -> None:
    """Keep only the blocks' inputs for the backward, and compute the rest again there (arXiv 1604.06174)."""
    for block in model.typed_blocks():
        # Nothing random happens in a block, so no state of a generator need be kept.
        recomputed = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        setattr(block, "forward", recomputed)  # noqa: B010 (mypy minds an assignment)


def parallel(objective: Objective, world: World, *, fsdp: bool) -> nn.Module:
    """The objective for all processes: DDP's, or with every block's weights, gradients and optimizer state sharded.

    FSDP2 gathers weights in float32 and leaves dtypes to autocast, so that the recurrence's parameters, which
    must not be rounded, need no exception.
    """
    if fsdp:
        mesh = dist.init_device_mesh(world.device.type, (world.size,))
        for block in objective.model.typed_blocks():
            fully_shard(block.ada_lin, mesh=mesh)  # called for all blocks before the first one runs
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        return objective
    if world.size == 1:
        return objective
    ids = [world.device] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Buffers are constants of the configuration. The argument's next name is not in every torch from 2.8 on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def synchronised(module: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients in the backward of what is called in here, or (not `now`) only add them up."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not now else nullcontext():
        yield


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one: to be called by all processes alike."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
