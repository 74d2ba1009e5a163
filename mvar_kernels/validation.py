"""Argument checks at the door of every op: which argument, what was expected, what came."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and states are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _names(dims: str) -> tuple[tuple[str, int | None], ...]:
    """The dimensions of "B 2 C", each with its size where that is fixed."""
    return tuple((dim, int(dim) if dim.isdigit() else None) for dim in dims.split())


def tensor(
    op: str,
    name: str,
    value: Tensor,
    dims: str,
    sizes: dict[str, int],
    like: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Check a tensor's type, rank, sizes, dtype and device.

    `dims` names the dimensions ("B L C", or a number for a fixed size); sizes already in `sizes`
    must agree and new ones are entered. `like`: another tensor whose dtype and device must be
    shared.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a Tensor ({dims.replace(' ', ', ')}), got {type(value).__name__}")
    names, shape, known_before = _names(dims), value.shape, len(sizes)
    right = len(shape) == len(names)
    for (dim, fixed), size in zip(names, shape, strict=False):
        right = right and size == (sizes.setdefault(dim, size) if fixed is None else fixed)
    if not right:
        for dim in list(sizes)[known_before:]:
            del sizes[dim]
        known = ", ".join(d if d not in sizes else f"{d}={sizes[d]}" for d, _ in names)
        raise ValueError(f"{op}: {name}: expected shape ({known}), got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name}: expected dtype {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name}: expected device {like.device} as the first input, got {value.device}")


def same_dtype(op: str, first: str, **tensors: Tensor) -> None:
    """Check that all tensors share the dtype of the one named `first`."""
    for name, value in tensors.items():
        if value.dtype != tensors[first].dtype:
            got, want = (str(t.dtype).removeprefix("torch.") for t in (value, tensors[first]))
            raise TypeError(f"{op}: {name}: expected dtype {want} as {first}, got {got}")


def number(value: object) -> int | float | None:
    """The Python number that `value` is, or None.

    NumPy's numbers are numbers, and so are arrays and tensors of one number without dimensions; booleans are none.
    """
    if not isinstance(value, int | float) and getattr(value, "ndim", None) == 0:
        value = value.item()  # type: ignore[attr-defined]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def integer(value: object) -> int | None:
    """The Python integer that `value` is, as :func:`number` takes it, or None."""
    known = number(value)
    return known if isinstance(known, int) else None


def groups(op: str, name: str, count: object, heads: int) -> int:
    """Check a number of groups, which must divide the heads."""
    known = integer(count)
    if known is None or known < 1 or heads % known:
        raise ValueError(f"{op}: {name}: expected groups that divide H={heads}, got {count!r}")
    return known


def positive(op: str, name: str, value: object) -> float:
    """Check that an argument is a finite number above 0."""
    known = number(value)
    if known is None or not 0 < known < math.inf:
        raise ValueError(f"{op}: {name}: expected a number above 0, got {value!r}")
    return float(known)


def scale_lengths(op: str, scales: object, length: int) -> tuple[int, ...]:
    """Check tokens per scale: positive integers, in any sequence, array or tensor, that add up to `length`."""
    numbers = scales.tolist() if hasattr(scales, "tolist") else scales
    known = tuple(integer(n) for n in numbers) if isinstance(numbers, Sequence) else ()
    lengths = tuple(n for n in known if n is not None)
    if not lengths or len(lengths) < len(known) or min(lengths) < 1:
        raise ValueError(f"{op}: scales: expected positive integers, got {scales!r}")
    if sum(lengths) != length:
        raise ValueError(f"{op}: scales: expected to add up to L={length}, got {lengths} with sum {sum(lengths)}")
    return lengths


def directions(op: str, both: bool, scales: Sequence[int] | None, length: int) -> tuple[int, ...]:
    """The scales a scan needs: those given when bidirectional, one for the sequence otherwise."""
    if not both:
        return (length,)
    if scales is None:
        raise ValueError(f"{op}: scales: expected tokens per scale, as A has two directions; got None")
    return scale_lengths(op, scales, length)
