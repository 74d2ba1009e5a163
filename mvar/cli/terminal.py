"""Standard output and error streams that never raise, so that a failed print does not end a command."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


class NonRaisingStream:
    """Wrapper of a text stream whose write methods do not raise; other attributes are those of the stream.

    Characters outside the encoding are escaped. After a failed write (full disk, closed pipe) further output is
    discarded, as it is without a stream (closed descriptor).

    Attributes:
        error: the error of the failed write, or None.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        self._try(lambda stream: _write(stream, text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None or self._stream.closed or self.error is not None:
            return
        try:
            action(self._stream)
        except OSError as error:
            self.error = error
            # Redirect to /dev/null: flushing the stream's buffer at exit would raise again.
            with suppress(OSError), open(os.devnull, "wb") as devnull:
                os.dup2(devnull.fileno(), self._stream.fileno())


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeError:
        stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))


@contextmanager
def non_raising_output() -> Iterator[NonRaisingStream]:
    """Replace sys.stdout and sys.stderr by non-raising streams; yields the former and restores both at the end.

    Closed descriptors 0 to 2 are opened in this context, so that no file gets such a number and then the output of
    native code.
    """
    with ExitStack() as stack:
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:  # opened in the wrong direction, so that using the descriptor raises
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY if number else os.O_WRONLY))
        out, err = NonRaisingStream(sys.stdout), NonRaisingStream(sys.stderr)
        with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
            try:
                yield out
            finally:
                out.flush()
                err.flush()
