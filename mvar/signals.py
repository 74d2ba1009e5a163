"""Signals handled meanwhile, and left as they were at the end."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
