"""Detection of fully_shard (FSDP2) without importing torch.distributed."""

from typing import Any

from torch import nn


def is_sharded(value: Any) -> bool:
    """Whether `value` is a DTensor."""
    return hasattr(value, "full_tensor")


def is_fsdp_module(layer: nn.Module) -> bool:
    """Whether fully_shard was called on this layer itself, so that calling it gathers its weights."""
    return any(kind.__name__ == "FSDPModule" for kind in type(layer).__mro__)
