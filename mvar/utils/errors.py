"""Error messages on one line."""

from collections.abc import Iterable
from itertools import takewhile

_CPP_STACK = ("Exception raised from", "frame #", "C++ CapturedTraceback")


def message(error: BaseException) -> str:
    """The complete message of an error on one line, or the name of its type if it has none.

    All lines are joined, since the first one can be empty or end in a colon. Of an error that contains the traceback of
    another process only the last line is kept. torch's C++ stack trace is removed.
    """
    if isinstance(error, KeyError):
        return repr(error)  # str(error) is the key alone
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("Traceback (most recent call last)" in line for line in lines):
        lines = lines[-1:]
    return " ".join(_without_stack(lines)) or type(error).__name__


def _without_stack(lines: Iterable[str]) -> Iterable[str]:
    return takewhile(lambda line: not line.startswith(_CPP_STACK), lines)
