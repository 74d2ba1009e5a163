"""Tests of `DistContext`, the environment variables it reads, and signal handlers in any thread."""

import signal
import socket
import threading

import pytest
import torch.distributed as dist

from mvar.train.trainer import Trainer
from mvar.utils.distributed import TORCHRUN, DistContext, context_from_environment, init_distributed
from mvar.utils.signals import handling


@pytest.fixture(autouse=True)
def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MASTER_ADDR": "10.0.0.1"},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "1"},
        {"RANK": "3", "LOCAL_RANK": "3"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_incomplete_environment_creates_no_process_group(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with init_distributed() as context:
        assert context == DistContext(0, 1) == context_from_environment() and not dist.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set, and WORLD_SIZE is 2: start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR is not set, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "10.0.0.1"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected a number from 0 to below WORLD_SIZE, 2, got 2"),
        # Without this check, the process group would wait half an hour for rank 0.
        (
            {"WORLD_SIZE": "1", "RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "RANK: expected a number from 0 to below WORLD_SIZE, 1, got 3",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number, got 'two'"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "MASTER_PORT: expected a whole number, got 'x'",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65536"},
            "MASTER_PORT: expected a port, below 65536, got '65536'",
        ),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK: expected a whole number, got ''"),
    ],
)
def test_invalid_environment_variables(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), init_distributed():
        pass


def test_existing_process_group_is_used_and_kept() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with init_distributed() as context:
            assert context == DistContext(0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), handling({signal.SIGTERM: lambda *_: None}):
        assert signal.getsignal(signal.SIGTERM) is not before
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as set by nohup
    try:
        with handling({signal.SIGHUP: lambda *_: None}):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_run_outside_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run outside the main thread installs no signal handlers, which Python allows in the main thread only."""
    contexts: list[object] = []

    class Run:
        told_to_stop = None

    def work() -> None:
        try:
            with init_distributed() as context, Trainer._stop_on_signals(Run()):  # type: ignore[arg-type]
                contexts.append(context)
        except BaseException as error:
            contexts.append(error)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert contexts == [DistContext(0, 1)] and not dist.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is before
