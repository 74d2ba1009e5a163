"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported: its kernels then run on the CPU


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every torch.empty with NaN (or the largest whole number), so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)
