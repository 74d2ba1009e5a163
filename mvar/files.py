"""Files are written aside and renamed: however a process ends, a name holds the old content or the new one, whole.

A symbolic link stays a link: what it points to is replaced, or made where it does not exist. Pipes, devices and open
descriptors (/dev/stdout, /dev/fd/3) are written into, when all of the content is there; block devices and sockets are
refused. A file that is replaced keeps its permission bits and, where the process may give them, its owner and group;
another hard link to it keeps the old content, as a renamed file is a new one. One without write permission is refused.
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

from mvar.signals import tidying

_DESCRIPTORS = re.compile(r"/proc/\d+(/task/\d+)?/fd")
_MAX_LINKS = 40  # as Linux
_OF_THE_FILE = (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENXIO, errno.EOVERFLOW)


def expanded(path: str | Path) -> Path:
    """`path` with a leading ~ or ~user as a shell expands it, which leaves `--flag=~/x` alone.

    An unknown user's stays as it is, as in a shell; "./~" is a folder of that name, where it is given as text.
    """
    found = Path(os.path.expanduser(path))
    return Path.cwd() / found if str(found).startswith("~") else found  # absolute, so that it is not expanded again


def is_environmental(error: BaseException) -> bool:
    """Whether an error in reading a file says nothing of that file: too many open files, no memory, no permission, I/O.

    What a library raises on content that it cannot read has no error number; a name that leads nowhere is the file's.
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in _OF_THE_FILE
    return isinstance(error, MemoryError)


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it, where they are missing; of a link, the folder that it points to."""
    os.makedirs(os.path.realpath(expanded(path)), exist_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise OSError naming `path` unless a file can be written there: to be asked before the work, not after it."""
    _create_aside(expanded(path)).unlink()


def is_standard_output(path: str | Path) -> bool:
    """Whether what is written to `path` goes where this process prints: messages then do not belong there."""
    with suppress(OSError):
        return os.path.samestat(os.stat(expanded(path)), os.fstat(1))
    return False


def _real(path: Path) -> Path:
    """Where the links of `path` lead, whether or not there is a file; an entry of /proc/…/fd leads no further."""
    for _ in range(_MAX_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if _is_descriptor(path) or not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _is_descriptor(real: Path) -> bool:
    return _DESCRIPTORS.fullmatch(str(real.parent)) is not None


def _is_stream(real: Path) -> bool:
    """Whether it is written into rather than replaced. OSError where it is neither to be written nor replaced."""
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


def _create_aside(target: Path) -> Path:
    """An empty file beside what `target` leads to; for a pipe or a device, among the system's temporary files."""
    try:
        real = _real(target)
        if _is_stream(real):
            handle, name = tempfile.mkstemp(suffix=target.suffix)
            os.close(handle)
            return Path(name)
        real.parent.mkdir(parents=True, exist_ok=True)
        # A name has at most 255 bytes, of which a character can take four.
        aside = real.parent / f".{real.name[:48]}.{secrets.token_hex(8)}{real.suffix[:8]}"
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        return aside
    except FileExistsError as error:
        raise OSError(f"cannot write {target}: {error.filename} is no folder") from error
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """An empty file in the same folder, gone at the end, also where a signal ends the process (:func:`tidying`).

    Raises OSError naming `path` where it cannot be made.
    """
    with tidying() as unfinished:
        aside = _create_aside(expanded(path))
        unfinished.add(aside)
        try:
            yield aside
        finally:
            aside.unlink(missing_ok=True)
            unfinished.discard(aside)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, in the same folder; on success it takes the place of `path`, on an error it is gone.

    Raises OSError naming `path` where it cannot be written, or the disk is full.
    """
    target = expanded(path)
    with beside(target) as aside:
        real = _real(target)
        mode = stat.S_IMODE(aside.stat().st_mode)
        try:
            yield aside
            _put(aside, real, mode)
        except OSError as error:
            if error.strerror is None or error.filename not in (None, str(aside), str(real)):
                raise
            raise OSError(f"cannot write {target}: {error.strerror}") from error


def _put(aside: Path, real: Path, mode: int) -> None:
    """Give `real` the content of the file beside it, and where it is new this mode."""
    if _is_stream(real):
        with _opened(real) as stream, aside.open("rb") as content:
            shutil.copyfileobj(content, stream, 1 << 20)
        return
    with suppress(FileNotFoundError):
        before = real.stat()
        for owner in ((before.st_uid, -1), (-1, before.st_gid)):
            with suppress(PermissionError):
                os.chown(aside, *owner)
        mode = stat.S_IMODE(before.st_mode)
    aside.chmod(mode)  # safetensors puts a file in its place that is for its owner alone
    try:
        aside.replace(real)
    except OSError as error:
        if error.errno != errno.EBUSY:  # a file that is mounted by itself, as into a container, cannot be replaced
            raise
        shutil.copyfile(aside, real)


def _opened(real: Path) -> BinaryIO:
    if not _is_descriptor(real):
        return real.open("wb")
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # what was printed before comes before
    # The very descriptor: opened anew, a file behind it would be truncated, and written from its beginning.
    return os.fdopen(os.dup(int(real.name)), "wb")


def write_json(path: str | Path, content: Any) -> None:
    """Write content as JSON, whole. Raises OSError as :func:`replacing`."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
