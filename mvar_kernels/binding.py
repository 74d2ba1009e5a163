"""What every `native.py` needs to call the C++ extension."""

from types import ModuleType

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
