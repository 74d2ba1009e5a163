"""Fixtures which check that tests leave process-wide settings unchanged.

A test that changes a setting fails, and the setting is restored for the next test. If a module's fixture changes a
setting, the first test that uses it fails.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from mvar_kernels import precision

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGPIPE)
"""Without SIGCHLD, as torch's first data loader installs a permanent handler for it."""
DEVICES = ("cpu", "cuda")
OTHERS = ("PYTEST_", "KMP_", "TORCHINDUCTOR_", "TRITON_")
"""Prefixes of environment variables that pytest, scikit-learn, torch.compile and Triton set on first use."""


class Setting(NamedTuple):
    read: Callable[[], Any]
    write: Callable[[Any], Any]


def _attribute(owner: Any, name: str) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}


def _set_environment(values: dict[str, str]) -> None:
    for name in _environment().keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _threads(value: int) -> None:
    if torch.get_num_threads() != value:  # setting it has a cost
        torch.set_num_threads(value)


SETTINGS: dict[str, Setting] = {
    "precision of float32 products": Setting(precision.settings, precision.restore),
    "torch.backends.cudnn.enabled": _attribute(torch.backends.cudnn, "enabled"),
    "torch.backends.cudnn.benchmark": _attribute(torch.backends.cudnn, "benchmark"),
    "torch.backends.cudnn.deterministic": _attribute(torch.backends.cudnn, "deterministic"),
    "torch.backends.mkldnn.enabled": _attribute(torch.backends.mkldnn, "enabled"),
    "deterministic algorithms": Setting(
        _deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])
    ),
    "fill_uninitialized_memory": _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    "threads": Setting(torch.get_num_threads, _threads),
    "default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "default device": Setting(torch.get_default_device, torch.set_default_device),
    "gradients": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "anomaly mode": Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    **{
        f"autocast on {device}": Setting(
            lambda device=device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            lambda value, device=device: (
                torch.set_autocast_enabled(device, value[0]),
                torch.set_autocast_dtype(device, value[1]),
            ),
        )
        for device in DEVICES
    },
    **{
        f"handler of {number.name}": Setting(
            lambda number=number: signal.getsignal(number), lambda value, number=number: signal.signal(number, value)
        )
        for number in SIGNALS
    },
    "environment": Setting(_environment, _set_environment),
    "working directory": Setting(os.getcwd, os.chdir),
    "umask": Setting(_umask, os.umask),
    "sys.path": Setting(lambda: list(sys.path), lambda value: sys.path.__setitem__(slice(None), value)),
    "start method of processes": Setting(
        # Starting the first process sets the default, which is not a change.
        lambda: multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0],
        lambda value: multiprocessing.set_start_method(value, force=True),
    ),
}


def snapshot() -> dict[str, Any]:
    """The current values of all settings."""
    return {name: setting.read() for name, setting in SETTINGS.items()}


def changes(before: dict[str, Any]) -> list[str]:
    """Descriptions of all changed settings, which are also restored."""
    found = []
    for name, setting in SETTINGS.items():
        now = setting.read()
        if now != before[name]:
            found.append(f"{name}: {_difference(before[name], now)}")
            setting.write(before[name])
    return found


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict):  # show only the changed variables
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        return ", ".join(f"{name} {before.get(name)!r} → {now.get(name)!r}" for name in names)
    return f"{before!r} → {now!r}"


@pytest.fixture(scope="session")
def settings_of_the_session() -> dict[str, Any]:
    return snapshot()


@pytest.fixture(autouse=True)
def unchanged_settings(settings_of_the_session: dict[str, Any]) -> Iterator[None]:
    """Fails a test that leaves a process-wide setting changed."""
    left = changes(settings_of_the_session)
    if left:
        pytest.fail(f"settings of the process that a fixture changed before: {'; '.join(left)}", pytrace=False)
    yield
    left = changes(settings_of_the_session)
    if left:
        pytest.fail(f"settings of the process that were left changed: {'; '.join(left)}", pytrace=False)
