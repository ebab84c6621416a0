"""Power: a machine whose power can fail at any moment of its past.

A filesystem is mounted from a device that is ours: an NBD export (nbdfuse makes it a file, a loop
device a disk) which keeps the whole history of writes and flushes. Like a real disk with a cache
it owes nothing before a flush: when power fails, everything that a finished flush covers is there,
and of the rest any part, in any combination, down to single sectors. `Device.after` builds such a
disk for any moment; the kernel mounts it, recovers its journal, and there is the file as it would
be found.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ledger import SECTOR

import pynbdkit

if TYPE_CHECKING:
    from pynbdkit.device import Buffer

LOSSES = ("all", "none", "half", "tail", "sectors")
"""What of the writes that no flush covers is lost: see `Device.after`."""


@dataclass(slots=True)
class Write:
    """A write to the device, as it came; times are nanoseconds."""

    begun: int
    ended: int
    offset: int
    data: bytes


class Device(pynbdkit.Device):
    """A disk that remembers. All connections share one."""

    blocking = False

    def __init__(self, size: int) -> None:
        self._data = bytearray(size)
        self._lock = threading.Lock()
        self.writes: list[Write] = []
        self.flushes: list[tuple[int, int]] = []
        """(begun, ended)"""
        self._start = b""

    # -- the disk --------------------------------------------------------------------------------

    def get_size(self) -> int:
        """As made."""
        return len(self._data)

    def can_multi_conn(self) -> bool:
        """There is one history."""
        return True

    def can_fua(self) -> int:
        """By flush, as the disks of old."""
        return int(pynbdkit.Fua.EMULATE)

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """What was written last."""
        with self._lock:
            return bytes(self._data[offset : offset + count])

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        """Write, and remember it."""
        data = bytes(buf)
        with self._lock:
            begun = time.monotonic_ns()
            self._data[offset : offset + len(data)] = data
            self.writes.append(Write(begun, time.monotonic_ns(), offset, data))

    def flush(self, flags: int) -> None:
        """Remember it."""
        with self._lock:
            begun = time.monotonic_ns()
            self.flushes.append((begun, time.monotonic_ns()))

    def zero(self, count: int, offset: int, flags: int) -> None:
        """A write of zeros."""
        self.pwrite(bytes(count), offset, 0)

    # -- its past --------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget the past: all that is on the disk now is stable."""
        with self._lock:
            self._start = bytes(self._data)
            self.writes.clear()
            self.flushes.clear()

    def after(self, moment: int, loss: str, rng: random.Random) -> bytearray:
        """The disk if power had failed at that moment.

        loss: of what no flush covers, everything is lost ("all"), nothing ("none"), every second
        write or so ("half"), the last ones, the first of them in part ("tail"), or sectors here
        and there of each write ("sectors").
        """
        covered = max((begun for begun, ended in self.flushes if ended <= moment), default=0)
        disk = bytearray(self._start)
        loose = []
        for write in self.writes:
            if write.ended <= covered:
                disk[write.offset : write.offset + len(write.data)] = write.data
            elif write.begun <= moment:
                loose.append(write)
        tail = rng.randrange(len(loose) + 1)
        for number, write in enumerate(loose):
            keep = range(0, len(write.data), SECTOR)
            if loss == "all" or (loss == "half" and rng.random() < 0.5):
                continue
            if loss == "tail" and number >= tail:
                if number > tail:
                    continue
                keep = keep[: rng.randrange(len(keep) + 1)]
            for start in keep:
                if loss != "sectors" or rng.random() < 0.5:
                    piece = write.data[start : start + SECTOR]
                    disk[write.offset + start : write.offset + start + len(piece)] = piece
        return disk
