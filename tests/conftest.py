"""Environment and fixtures for all tests."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

# One thread per pytest-xdist worker and per subprocess of a test; torch reads this on import.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by torch's deterministic algorithms on a GPU

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before Triton is imported, so that its kernels run on the CPU

from tests.helpers.global_state import settings_of_the_session, unchanged_settings  # noqa: E402

if not torch.cuda.is_available():
    from tests.helpers.interpreter import speed_up_interpreter

    speed_up_interpreter()

__all__ = ["settings_of_the_session", "unchanged_settings"]

# A script's background jobs ignore SIGINT, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark interpreted Triton kernels, which take seconds, as slow, except in the contract test's reduced cases."""
    for item in items:
        interpreted = "-triton-" in item.name or "[triton]" in item.name
        if interpreted and item.path.stem != "test_contract":
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every torch.empty with NaN (or the largest integer) to detect unwritten outputs."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def mixer_inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The projection, and dt if passed separately, of each call of mamba2_mixer."""
    import mvar_kernels as mk  # as below

    mixer, given = mk.mamba2_mixer, []

    def noted(projected: torch.Tensor, *params: Any, dt: torch.Tensor | None, **options: Any) -> Any:
        given.append((projected, dt))
        return mixer(projected, *params, dt=dt, **options)

    monkeypatch.setattr(mk, "mamba2_mixer", noted)
    return given


@pytest.fixture
def use_instruction_set() -> Iterator[Callable[[str], None]]:
    """Select the C++ kernels' instruction set by name; skips the test if the processor lacks it."""
    from mvar_kernels.dispatch import native  # imported here, as it may import Triton

    extension = native()
    assert extension is not None
    before = extension.instruction_set()

    def use(name: str) -> None:
        try:
            extension.use_instruction_set(name)
        except ValueError as error:
            pytest.skip(str(error))

    yield use
    extension.use_instruction_set(before)
