"""Files are written aside and renamed: however a process ends, a name holds the old content or the new one, whole."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_writable(path: str | Path) -> None:
    """Raise OSError naming `path` unless a file can be written there: to be asked before the work, not after it."""
    _create_aside(Path(path)).unlink()


def _create_aside(target: Path) -> Path:
    try:
        if target.is_dir() or not target.name:
            raise IsADirectoryError(0, "a folder is in its place")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}") from error
    os.close(handle)
    return Path(name)


@contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """An empty file in the same folder, gone at the end. Raises OSError naming `path` where it cannot be made."""
    aside = _create_aside(Path(path))
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, in the same folder; on success it takes the place of `path`, on an error it is gone.

    Raises OSError naming `path` where its folder cannot be written to, or the disk is full.
    """
    target = Path(path)
    with beside(target) as aside:
        try:
            yield aside
        except OSError as error:
            if error.strerror is None or error.filename not in (None, str(aside)):
                raise
            raise OSError(f"cannot write {target}: {error.strerror}") from error
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)  # mkstemp's files are for their owner alone
        aside.replace(target)


def write_json(path: str | Path, content: Any) -> None:
    """Write content as JSON, whole. Raises OSError as :func:`replacing`."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")
