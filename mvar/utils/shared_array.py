"""One array that all processes of a run write to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from mvar.utils.distributed import DistContext
from mvar.utils.files import temporary_file


@contextmanager
def shared_array(target: Path | None, shape: tuple[int, ...], context: DistContext) -> Iterator[np.memmap | None]:
    """A uint8 array in a temporary file in the folder of `target`, memory-mapped by every process; None without target.

    A process must flush the array before the barrier after which another one reads it. Raises OSError if the file does
    not fit on the disk.
    """
    if target is None:
        yield None
        return
    context.barrier()  # before the file exists, since waiting for other processes would delay its removal on SIGTERM
    with temporary_file(target) if context.is_main_process else nullcontext(target) as path:
        if context.is_main_process:
            try:
                np.lib.format.open_memmap(path, "w+", np.uint8, shape)
                with path.open("r+b") as file:  # a write to unallocated pages of a full disk would be a SIGBUS
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                raise OSError(f"cannot write {target}: {error.strerror}") from error
        yield np.lib.format.open_memmap(context.broadcast(path), "r+")
