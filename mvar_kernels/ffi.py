"""What kernel modules share at their edge: dtypes and streams by number, inputs as they read them, outputs to write."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The index of a dtype in the extensions' tables (csrc/common/dtype.h).
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Where = tuple[int, int]
Pointer = tuple[int, tuple[int, ...], int | torch.SymInt]


def dtype_and_stream(t: Tensor) -> Where:
    """How a call names the kernel's dtype and, on a GPU, the stream it runs on."""
    return DTYPES[t.dtype], torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def unsupported_dtype(t: Tensor, allowed: tuple[torch.dtype, ...]) -> str | None:
    """What a kernel for these dtypes has against `t`, or None."""
    if t.dtype in allowed:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (t.dtype, *allowed)]
    return f"dtype {names[0]} is not {', '.join(names[1:-1])} or {names[-1]}"


def last_dim_contiguous(t: Tensor) -> Tensor:
    """`t` with its last dimension contiguous: itself, or a copy where it must be."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def as_aligned(t: Tensor, alignment: int = 16) -> Tensor:
    """`t`, or a copy: its last dimension contiguous, its rows starting at multiples of `alignment` bytes."""
    per_access = alignment // t.itemsize
    fits = (
        last_dim_contiguous(t) is t
        and t.data_ptr() % alignment == 0
        and all(s % per_access == 0 for s in t.stride()[:-1])
    )
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def with_aligned_rows(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A forward or backward behind inputs, and gradients before them, that it can read 16 bytes at a time."""

    def call(*arguments: Any) -> Any:
        *grads, inputs = arguments
        ready = [[as_aligned(t) for t in given] for given in grads]
        return kernel(*ready, inputs._make(as_aligned(t) if isinstance(t, Tensor) else t for t in inputs))

    return call


def pointers(*tensors: Tensor | None) -> tuple[Pointer | None, ...]:
    """How a call names tensors (csrc/common/tensors.h): address, strides, bytes of the storage from the address on.

    Keep the tensors: an address does not hold them.
    """
    return tuple(
        [
            None
            if t is None
            else (t.data_ptr(), t.stride(), t.untyped_storage().nbytes() - t.storage_offset() * t.itemsize)
            for t in tensors
        ]
    )


def empty_contiguous(like: Tensor) -> Tensor:
    """Contiguous, as every output is. A microsecond cheaper than torch.empty with a shape and a dtype."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)
