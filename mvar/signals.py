"""Signals handled meanwhile, and left as they were at the end."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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


def tidying() -> AbstractContextManager[None]:
    """SIGTERM and SIGHUP, where they would end the process at once, end it by SystemExit(128 + number).

    For as long as there is something to tidy up, and no longer: Python waits with it for native code to return.
    """
    fatal = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    return handling(dict.fromkeys(fatal, lambda number, frame: sys.exit(128 + number)))
