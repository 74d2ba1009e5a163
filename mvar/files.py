"""Files are written aside and renamed: whatever happens, a name holds the old content or the new one, whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, in the same folder; on success it takes the place of `path`, on an error it is gone.

    Raises OSError naming `path` where its folder cannot be written to.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside_name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}") from error
    os.close(handle)
    aside = Path(aside_name)
    try:
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)  # mkstemp's files are for their owner alone
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
