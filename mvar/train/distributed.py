"""Distributed training: the collectives of a training run, DDP, FSDP2 and activation checkpointing."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
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

from mvar.utils.distributed import DistContext, init_distributed, local_device


@dataclass(frozen=True)
class TrainContext(DistContext):
    """Rank, world size and device of this process. All methods are collective: every process calls them."""

    device: torch.device = torch.device("cpu")

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag), dtype=torch.float32, device="cpu")))

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world_size == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def union(self, names: Iterable[str]) -> set[str]:
        """The union of all processes' sets."""
        found: list[set[str]] = [set(names)] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, set(names))
        return set().union(*found)


@contextmanager
def init_training(device: str | None) -> Iterator[TrainContext]:
    """Initialize the process group for training: gloo on the CPU, NCCL on GPUs. Raises as :func:`init_distributed`."""
    local = local_device(device)
    current = torch.cuda.device(local) if local.type == "cuda" else nullcontext()
    with current, init_distributed("cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo") as context:
        yield TrainContext(context.rank, context.world_size, local)


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Keep only each block's inputs for the backward pass, which recomputes the rest (arXiv 1604.06174)."""
    for block in blocks:
        # A block draws no random numbers, so no generator's state needs to be kept.
        recomputed = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        setattr(block, "forward", recomputed)  # noqa: B010 (mypy rejects an assignment)


def parallelize(objective: nn.Module, blocks: Sequence[nn.Module], context: TrainContext, *, fsdp: bool) -> nn.Module:
    """The objective under DDP, or with the weights, gradients and optimizer state of every block sharded by FSDP2.

    FSDP2 gathers weights in float32 and leaves dtypes to autocast, so that the recurrence's parameters, which
    must not be rounded, need no exception.

    Args:
        blocks: the transformer blocks inside `objective`, each of which is sharded by itself.
    """
    if fsdp:
        mesh = dist.init_device_mesh(context.device.type, (context.world_size,))
        for block in blocks:
            fully_shard(block.get_submodule("ada_lin"), mesh=mesh)  # called for all blocks before the first one runs
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        return objective
    if context.world_size == 1:
        return objective
    ids = [context.device] if context.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Buffers are constants. The argument is deprecated, but its replacement is not in every torch from 2.8 on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Reduce gradients over all processes in the backward passes of this context, or only accumulate them locally."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not enabled else nullcontext():
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """The detached tensor; a sharded one is gathered, which is collective: every process calls it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
