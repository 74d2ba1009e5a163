"""Checks of class labels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvar.models.config import unboxed


def class_rows(labels: Sequence[int] | Tensor, num_classes: int, device: torch.device) -> Tensor:
    """Class indices (B,) int64 on the device. Raises ValueError unless they are whole numbers in [0, num_classes)."""
    try:
        if isinstance(labels, list | tuple):  # torch rejects lists of some NumPy scalars
            labels = [unboxed(label) for label in labels]
        rows = torch.as_tensor(labels, device=labels.device if isinstance(labels, Tensor) else "cpu")
        valid = rows.dim() == 1 and len(rows) > 0 and not (rows.is_floating_point() or rows.is_complex())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        valid = False
    if not valid or rows.dtype == torch.bool:
        raise ValueError(f"labels: expected a non-empty 1-D sequence of whole numbers, got {labels!r}")
    rows = rows.to(torch.int64)  # torch has no aminmax of unsigned integers
    lowest, highest = torch.stack(rows.aminmax()).tolist()  # one synchronization for labels on a GPU
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"labels: expected classes from 0 to {num_classes - 1}, got {lowest} to {highest}")
    return rows.to(device, torch.int64, non_blocking=True)  # a blocking copy would wait for earlier work
