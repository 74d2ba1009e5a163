"""A lock file that allows one run per folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mvar.utils.distributed import DistContext
from mvar.utils.files import make_folder

FILE = ".lock"


@contextmanager
def locked(folder: Path, context: DistContext) -> Iterator[None]:
    """Lock a folder for the processes of a run, and create it if it does not exist. Collective: every process calls it.

    The main process holds a record lock (fcntl), which the kernel releases when the process ends. Forked worker
    processes do not inherit it; they can outlive a killed run by seconds. File systems without locks are not locked.

    Raises:
        OSError: (in all processes) another process holds the lock, or the folder cannot be written.
    """
    handle, problem = _acquire(folder) if context.is_main_process else (None, None)
    try:
        if problem := context.broadcast(problem):
            raise OSError(problem)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _acquire(folder: Path) -> tuple[int | None, str | None]:
    """The descriptor of the lock file, and an error message if the lock could not be acquired."""
    try:
        make_folder(folder)
        handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        return None, f"--out: cannot write into {folder}: {error.strerror}"
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(handle, 100).decode(errors="replace").strip() or "another process"
        return handle, f"--out: {folder} is in use by {holder}; wait until it ends, or choose another folder"
    except OSError:
        return handle, None
    with suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    return handle, None
