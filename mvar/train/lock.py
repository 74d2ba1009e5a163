"""One run a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mvar.files import make_folder
from mvar.processes import Processes

FILE = ".lock"


@contextmanager
def locked(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold the folder for these processes, of which the leading one has the lock; made if it is not there.

    The kernel lets go of it however the process ends. It is a record lock, which forked readers of pictures do not
    inherit: they can outlive a killed run by seconds. Where the file system has no locks there is none.

    Raises OSError in all processes, naming the folder and the process that has it.
    """
    handle, problem = _acquired(folder) if processes.leads else (None, None)
    try:
        if problem := processes.agreed(problem):
            raise OSError(problem)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _acquired(folder: Path) -> tuple[int | None, str | None]:
    """The open lock file, or why it is not to be had."""
    try:
        make_folder(folder)
        handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        return None, f"--out: cannot write into {folder}: {error.strerror}"
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(handle, 100).decode(errors="replace").strip() or "another process"
        return handle, f"--out: {folder} is in use by {holder}; wait for its end, or choose another folder"
    except OSError:
        return handle, None
    with suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    return handle, None
