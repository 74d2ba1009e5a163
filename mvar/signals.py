"""Signals handled meanwhile, and left as they were at the end."""

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
    """Handle signals, but for those that the process was started to ignore (nohup, a script's background).

    Python lets the main thread alone do that: in another one nothing is done, and they are the program's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


_unfinished: set[Path] = set()


@contextmanager
def tidying() -> Iterator[set[Path]]:
    """Files to add to, which SIGTERM and SIGHUP remove before they end the process, where they would end it at once.

    For as long as there is something to tidy up, and no longer: Python waits with it for native code to return.
    """
    fatal = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    with handling(dict.fromkeys(fatal, partial(_end, os.getpid()))):
        yield _unfinished


def _end(owner: int, number: int, _: object) -> None:
    """As the signal itself, and not by an exception: on its way out it would wait for processes that do not answer.

    A process that was forked meanwhile leaves the files to their owner.
    """
    for path in list(_unfinished) if os.getpid() == owner else ():
        with suppress(OSError):
            path.unlink()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
