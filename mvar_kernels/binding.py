"""What kernel modules share at their edge: the C++ extension, inputs that they can read, outputs as they write them."""

from types import ModuleType

import torch
from torch import Tensor

from mvar_kernels.backends import native


def extension() -> ModuleType:
    """The C++ extension, where a kernel of it was chosen."""
    module = native()
    assert module is not None, "backends.unavailable('cpu') answers before a kernel is called"
    return module


def view(t: Tensor) -> Tensor:
    """`t` with its last dimension contiguous: itself, or a copy where it must be."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def empty(like: Tensor) -> Tensor:
    """Contiguous, as every output is. A microsecond cheaper than torch.empty with a shape and a dtype."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)
