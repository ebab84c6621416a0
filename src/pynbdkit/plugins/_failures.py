"""Failures: syncs that have failed, known to every process that serves the files (--workers).

The kernel tells one who asks, and each open descriptor once. A process that opens a file when all
that has been told would take lost data for stable. So what has failed is written down in memory
that the processes share: records at the end of a file without a name, which the kernel appends one
after another, and a byte that says whether there is any.
"""

from __future__ import annotations

import mmap
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_RECORD: Final = struct.Struct("=qQ112s")
"""A file (as `StableFiles` knows it) and what its sync said. Its size divides that of a page, so
that no reader sees a part of one."""


class Failures:
    """To be made before the processes are forked. Raises OSError."""

    def __init__(self) -> None:
        from fcntl import F_SETFL, fcntl

        self._fd = os.memfd_create("failures", os.MFD_CLOEXEC)
        fcntl(self._fd, F_SETFL, os.O_APPEND)
        self._any = mmap.mmap(-1, mmap.PAGESIZE)

    def add(self, key: tuple[int, int], text: str) -> None:
        """Tell all processes that a sync of this file has failed."""
        os.write(self._fd, _RECORD.pack(*key, text.encode(errors="replace")))
        self._any[0] = 1

    def find(self, key: tuple[int, int]) -> str:
        """What the first sync that failed said; "" where none has."""
        if self._any[0]:
            size = os.fstat(self._fd).st_size // _RECORD.size * _RECORD.size
            for first, second, text in _RECORD.iter_unpack(os.pread(self._fd, size, 0)):
                if (first, second) == key:
                    found: str = text.rstrip(b"\0").decode(errors="replace")
                    return found or "an error"
        return ""
