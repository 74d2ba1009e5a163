"""Memory that the process holds without using it: pages of memory-mapped files, and freed blocks."""

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


class MappedPages:
    """The pages of a file that tensors are views of.

    Pages that were read count as memory of the process until the system needs it for something else.

    Args:
        file: the file that was mapped. Without it in /proc/self/maps there is nothing to release.
        tensors: views of the mapping, which nobody writes to. Others, with memory of their own, are not touched.
    """

    def __init__(self, file: Path, tensors: Iterable[Tensor]) -> None:
        addresses = [t.data_ptr() for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
        self._ranges = [
            (start, end) for start, end in _ranges(file) if any(start <= address < end for address in addresses)
        ]

    def release(self) -> None:
        """Give the pages back; the next access reads them again."""
        for start, end in self._ranges:
            # Where the system refuses, the pages only stay in memory.
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def return_freed_memory() -> None:
    """Let glibc's malloc return freed blocks to the system, which it otherwise keeps to reuse them."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def _ranges(file: Path) -> list[tuple[int, int]]:
    """Address ranges of this process that map the file."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").split("\n")
    except OSError:  # not Linux
        return []
    name = str(file.resolve()).replace("\n", r"\012")  # as the kernel writes it
    fields = [line.split(maxsplit=5) for line in lines]  # address, permissions, offset, device, inode, path
    found = [entry[0].split("-") for entry in fields if len(entry) == 6 and entry[5] == name]
    return [(int(start, 16), int(end, 16)) for start, end in found]
