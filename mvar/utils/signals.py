"""Context managers for signal handlers."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any


@contextmanager
def handling(handlers: Mapping[signal.Signals, Callable[[int, Any], Any]]) -> Iterator[None]:
    """Set signal handlers and restore the previous ones at the end.

    Signals that are ignored stay ignored (nohup, background jobs of a script). No effect outside the main thread, where
    Python does not allow signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    enabled = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    previous = {number: signal.signal(number, handler) for number, handler in enabled.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


_temporary_files: set[Path] = set()


@contextmanager
def removed_on_signals() -> Iterator[set[Path]]:
    """A set of files that SIGTERM and SIGHUP remove before they end the process.

    Handlers of the program itself are kept. The context should be short, because Python runs signal handlers only
    after native code returns.
    """
    fatal = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    with handling(dict.fromkeys(fatal, partial(_remove_and_exit, os.getpid()))):
        yield _temporary_files


def _remove_and_exit(owner: int, number: int, _: object) -> None:
    """Remove the files and end the process by the signal's default action.

    An exception instead could hang in cleanup that waits for other processes. Forked processes do not remove the files.
    """
    for path in list(_temporary_files) if os.getpid() == owner else ():
        with suppress(OSError):
            path.unlink()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
