"""Time limits: what fails or takes too long does not stop the rest."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from mvar_kernels.dispatch import error_message

T = TypeVar("T")
MIN_SECONDS = 5.0  # with less left nothing is started
NO_TIME = "TimeoutError: no time left"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so many seconds: a compilation may take longer than everything else."""
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


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of its message, at most 250 characters."""
    return error_message(error)[:250]


class Failures:
    """Name → why it was left out. Each is printed at once, after `where`."""

    def __init__(self, where: str, reasons: dict[str, str]) -> None:
        self.where, self.reasons = where, reasons

    def attempt(self, names: Sequence[str], seconds: float, call: Callable[[], T]) -> T | None:
        """call() within so many seconds; where it fails, None, and `names` are left out."""
        start = time.monotonic()
        try:
            with time_limit(seconds):
                return call()
        except Exception as error:
            reason = first_line(error)
            if time.monotonic() - start > seconds > MIN_SECONDS:  # a compiler turns it into an error of its own
                reason = f"TimeoutError: not done within {seconds:.0f} s"
            self.reasons.update(dict.fromkeys(names, reason))
            print(f"{self.where}: {', '.join(names)}: {reason}", flush=True)
            error.__traceback__ = None  # its frames hold memory, which may be what is missing
            return None
