"""Atomic writes: a temporary file is renamed, so that a file has either the complete old or the complete new content.

The target of a symbolic link is replaced, or created if it does not exist; the link is kept. Pipes, devices and open
descriptors (/dev/stdout, /dev/fd/3) are written to once the content is complete; block devices and sockets are
rejected. A replaced file keeps its permission bits and, if the process may set them, its owner and group; other hard
links to it keep the old content. A file without write permission is not replaced.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mvar.utils.signals import removed_on_signals

_DESCRIPTORS = re.compile(r"/proc/\d+(/task/\d+)?/fd")
_MAX_LINKS = 40  # Linux's limit
_FILE_ERRORS = (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENXIO, errno.EOVERFLOW)


def expanded(path: str | Path) -> Path:
    """`path` with a leading ~ or ~user expanded, since shells do not expand `--flag=~/x`.

    As in a shell, ~user of an unknown user is kept, and the text "./~" is a folder with this name.
    """
    result = Path(os.path.expanduser(path))
    return Path.cwd() / result if str(result).startswith("~") else result  # absolute, so that it is not expanded again


def is_environmental(error: BaseException) -> bool:
    """Whether a read error is not caused by the file itself: too many open files, out of memory, permissions, I/O.

    Errors that libraries raise for damaged content have no errno. Missing files and broken links count as file errors.
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in _FILE_ERRORS
    return isinstance(error, MemoryError)


def make_folder(path: str | Path) -> None:
    """Create a folder and its parents if they do not exist; for a link, the folder that it points to."""
    os.makedirs(os.path.realpath(expanded(path)), exist_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise OSError unless a file can be written to `path`, for checks before a long computation."""
    _create_temporary(expanded(path)).unlink()


def is_standard_output(path: str | Path) -> bool:
    """Whether `path` is the file or pipe that is this process's standard output."""
    with suppress(OSError):
        return os.path.samestat(os.stat(expanded(path)), os.fstat(1))
    return False


def _real(path: Path) -> Path:
    """Resolve the links of `path`, which may not exist. Entries of /proc/…/fd are not resolved."""
    for _ in range(_MAX_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if _is_descriptor(path) or not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _is_descriptor(real: Path) -> bool:
    return _DESCRIPTORS.fullmatch(str(real.parent)) is not None


def _is_stream(real: Path) -> bool:
    """Whether the path is written to instead of replaced. Raises OSError if neither is possible."""
    if _is_descriptor(real):
        if fcntl.fcntl(int(real.name), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")
        return True
    try:
        mode = real.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder is in its place")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.EINVAL, f"a {'block device' if stat.S_ISBLK(mode) else 'socket'} is in its place")
    if not os.access(real, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return not stat.S_ISREG(mode)


def _create_temporary(target: Path) -> Path:
    """Create an empty file in the folder of the resolved `target`; for a pipe or a device, in the system's folder for
    temporary files."""
    try:
        real = _real(target)
        if _is_stream(real):
            handle, name = tempfile.mkstemp(suffix=target.suffix)
            os.close(handle)
            return Path(name)
        real.parent.mkdir(parents=True, exist_ok=True)
        # A name has at most 255 bytes, a character up to four.
        temporary = real.parent / f".{real.name[:48]}.{secrets.token_hex(8)}{real.suffix[:8]}"
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        return temporary
    except FileExistsError as error:
        raise OSError(f"cannot write {target}: {error.filename} is not a folder") from error
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def temporary_file(path: str | Path) -> Iterator[Path]:
    """An empty temporary file in the folder of `path`, removed at the end and by SIGTERM and SIGHUP.

    Raises:
        OSError: the file cannot be created.
    """
    with removed_on_signals() as files:
        temporary = _create_temporary(expanded(path))
        files.add(temporary)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            files.discard(temporary)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to in the folder of `path`; it replaces `path` on success and is removed on an error.

    Raises:
        OSError: `path` cannot be written, or the disk is full.
    """
    target = expanded(path)
    with temporary_file(target) as temporary:
        real = _real(target)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            yield temporary
            _replace(temporary, real, mode)
        except OSError as error:
            if error.strerror is None or error.filename not in (None, str(temporary), str(real)):
                raise
            raise OSError(f"cannot write {target}: {error.strerror}") from error


def _replace(temporary: Path, real: Path, mode: int) -> None:
    """Replace `real` by the temporary file, or write its content to a stream. mode: permission bits of a new file."""
    if _is_stream(real):
        with _open_stream(real) as stream, temporary.open("rb") as content:
            shutil.copyfileobj(content, stream, 1 << 20)
        return
    with suppress(FileNotFoundError):
        before = real.stat()
        for owner in ((before.st_uid, -1), (-1, before.st_gid)):
            with suppress(PermissionError):
                os.chown(temporary, *owner)
        mode = stat.S_IMODE(before.st_mode)
    temporary.chmod(mode)  # safetensors replaces the temporary file by one that only its owner can read
    try:
        temporary.replace(real)
    except OSError as error:
        if error.errno != errno.EBUSY:  # a bind-mounted file, as in a container, cannot be replaced
            raise
        shutil.copyfile(temporary, real)


def _open_stream(real: Path) -> BinaryIO:
    if not _is_descriptor(real):
        return real.open("wb")
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # earlier output comes first
    # A duplicate of the descriptor: opening /proc/…/fd/N would truncate a regular file.
    return os.fdopen(os.dup(int(real.name)), "wb")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically. Raises OSError as :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
