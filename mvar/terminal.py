"""Standard output and error of a command, whatever they are connected to: nothing that is printed ends the work."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


class Tolerant:
    """A text stream that takes every character and raises nothing; all else is the stream's own.

    What its encoding lacks is escaped. After an error in writing, as on a full disk or where a pipe's reader has gone,
    what is printed is dropped, and `lost` is that error; without a stream (a closed descriptor) it is dropped, too.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        self._tried(lambda stream: _write(stream, text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._tried(lambda stream: stream.flush())

    def _tried(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None or self._stream.closed or self.lost is not None:
            return
        try:
            action(self._stream)
        except OSError as error:
            self.lost = error
            # What is left in the stream's buffer would raise again when the interpreter ends: it goes nowhere instead.
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeError:
        stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))


@contextmanager
def tolerant_output() -> Iterator[Tolerant]:
    """sys.stdout, which is given, and sys.stderr as `Tolerant` streams; as they were at the end.

    Descriptors 0 to 2 that are closed are held meanwhile, so that no file is opened under such a number and then gets
    what native code prints.
    """
    with ExitStack() as held:
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:  # in the wrong direction: who uses it is told
                held.callback(os.close, os.open(os.devnull, os.O_RDONLY if number else os.O_WRONLY))
        out, err = Tolerant(sys.stdout), Tolerant(sys.stderr)
        with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
            try:
                yield out
            finally:
                out.flush()
                err.flush()
