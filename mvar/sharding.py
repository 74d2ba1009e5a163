"""What fully_shard (FSDP2) made of weights and layers, told without importing torch.distributed."""

from typing import Any

from torch import nn


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(value, "full_tensor")


def gathers_itself(layer: nn.Module) -> bool:
    """Whether fully_shard was called with this very layer, which then gathers its weights when it is called."""
    return any(kind.__name__ == "FSDPModule" for kind in type(layer).__mro__)
