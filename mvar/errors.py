"""What an error says, on one line."""

from collections.abc import Iterable
from itertools import takewhile

_NATIVE_STACK = ("Exception raised from", "frame #", "C++ CapturedTraceback")


def message(error: BaseException) -> str:
    """All that an error says on one line, or the name of its type where it says nothing.

    Not its first line alone, which can be empty, or end in a colon. Of an error with another process's traceback it is
    the last line, which is the error there; the stack of torch's C++ is left out.
    """
    if isinstance(error, KeyError):
        return repr(error)  # whose text is the key alone
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("Traceback (most recent call last)" in line for line in lines):
        lines = lines[-1:]
    return " ".join(_without_stack(lines)) or type(error).__name__


def _without_stack(lines: Iterable[str]) -> Iterable[str]:
    return takewhile(lambda line: not line.startswith(_NATIVE_STACK), lines)
