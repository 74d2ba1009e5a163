"""Limits of time, and what fails within them without taking the rest with it."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
MIN_SECONDS = 5.0  # left to begin anything with
NO_TIME = "TimeoutError: no time left"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds: a compilation may take longer than all the rest."""
    if seconds < MIN_SECONDS:
        raise TimeoutError("no time left")

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Failures:
    """Why what has a name was left out: name → reason. It is told at once, after `where`."""

    def __init__(self, where: str, reasons: dict[str, str]) -> None:
        self.where, self.reasons = where, reasons

    def attempt(self, names: Sequence[str], seconds: float, call: Callable[[], T]) -> T | None:
        """call() within so many seconds; where it fails, None, and these are left out."""
        start = time.monotonic()
        try:
            with limited(seconds):
                return call()
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:200]}"
            if time.monotonic() - start > seconds > MIN_SECONDS:  # a compiler makes another error of it
                reason = f"TimeoutError: not done within {seconds:.0f} s"
            self.reasons.update(dict.fromkeys(names, reason))
            print(f"{self.where}: {', '.join(names)}: {reason}", flush=True)
            error.__traceback__ = None  # whose frames hold memory, which may be just what is missing
            return None
