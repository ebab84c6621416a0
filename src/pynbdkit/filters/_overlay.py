"""Overlay: what was changed over a disk that does not change, in a temporary file.

A `Store` is the file: unlinked as soon as it is made, shared by all overlays of a server. An
`Overlay` is one disk's changes: the state of each block (`_blockmap.py`) and the blocks' places in
the store. Places are handed out by the region, in the order in which regions are first written to,
so a disk may be larger than the largest file that the filesystem takes.

Parallel calls. Bytes are read and written without any lock. A change of a block's state is made
while its blocks are held (`hold`), because it goes with bytes that are not the client's own: the
rest of a block is copied up from the layer below, and must not cover what another client has
written there meanwhile. Holds wait for those that came before them and overlap; nobody holds two.
"""

from __future__ import annotations

import errno
import os
import threading

from ..fallocate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from ._blockmap import ALLOCATED, NOT_ALLOCATED, TRIMMED, BlockMap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Final

    from ..device import Buffer

__all__ = ["ALLOCATED", "NOT_ALLOCATED", "TRIMMED", "Overlay", "Store"]

_DSYNC: Final = getattr(os, "RWF_DSYNC", 0)
_REGION_BYTES_SHIFT: Final = 28
_REGION_BLOCKS_SHIFT: Final = 12
"""A region has at most 256 MiB and 4096 blocks (but 4 blocks at least)."""


class Store:
    """A temporary file in a folder. Raises OSError where it cannot be made."""

    def __init__(self, folder: str) -> None:
        self.fd = _temporary_file(folder)
        self._end = 0
        self._lock = threading.Lock()
        self._failed: int | None = None
        self._refused: set[int] = set()  # modes of fallocate that this filesystem has not

    def close(self) -> None:
        """Give the space back."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def place(self, count: int) -> int:
        """A place for `count` bytes; nothing is written, so it takes no space yet."""
        with self._lock:
            place = self._end
            self._end += count
            return place

    def write(self, parts: Sequence[Buffer], position: int, stable: bool) -> None:
        """Write buffers one behind the other; `stable`: return when they are on the disk."""
        try:
            if len(parts) == 1 and not stable:
                done = os.pwrite(self.fd, parts[0], position)
            else:
                done = os.pwritev(self.fd, parts, position, _DSYNC if stable else 0)
            if done < sum(map(len, parts)):
                rest = memoryview(b"".join(parts))
                while done < len(rest):
                    flags = _DSYNC if stable else 0
                    done += os.pwritev(self.fd, [rest[done:]], position + done, flags)
        except OSError as error:
            if stable and error.errno == errno.EIO:
                self._failed = error.errno
            raise
        if stable and not _DSYNC:
            self.sync()

    def read(self, count: int, position: int) -> bytes:
        """Exactly `count` bytes. Raises OSError."""
        data = os.pread(self.fd, count, position)
        while len(data) < count:
            more = os.pread(self.fd, count - len(data), position + len(data))
            if not more:
                raise OSError(errno.EIO, "the overlay's file has been cut off")
            data += more
        return data

    def allocate(self, mode: int, count: int, position: int) -> bool:
        """fallocate(2); False where the filesystem has no such mode."""
        if mode in self._refused:
            return False
        try:
            fallocate(self.fd, mode, position, count)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            self._refused.add(mode)
            return False
        return True

    def sync(self) -> None:
        """Return when all that was written is on the disk; after a failure it fails for good.

        The kernel reports a failed write-back once and then takes the pages for clean.
        """
        if self._failed is not None:
            raise OSError(self._failed, "an earlier flush of the overlay has failed")
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self._failed = error.errno
            raise


def _temporary_file(folder: str) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # Not every filesystem has O_TMPFILE; an old kernel takes it for the folder itself.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    import tempfile

    fd, path = tempfile.mkstemp(dir=folder, prefix="pynbdkit")
    os.unlink(path)
    return fd


class _Hold:
    """Blocks `first` to `last` are being changed."""

    __slots__ = ("first", "last")

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last


class Overlay:
    """The changes over one disk of `size` bytes, in blocks of ``1 << shift`` bytes.

    Ranges (`count` and `offset`, in bytes) of `read`, `write`, `punch` and `zero` lie within one
    region: `pieces` cuts a range accordingly.
    """

    def __init__(self, store: Store, size: int, shift: int) -> None:
        self.store = store
        self.size = size
        self.shift = shift
        self.users = 0
        blocks_shift = min(_REGION_BLOCKS_SHIFT, max(2, _REGION_BYTES_SHIFT - shift))
        self.map = BlockMap(blocks_shift)
        self._span_shift = blocks_shift + shift
        self._span_mask = (1 << self._span_shift) - 1
        self._held: list[_Hold] = []
        self._released = threading.Condition(threading.Lock())

    @property
    def empty(self) -> bool:
        """Whether nothing was ever changed."""
        return not self.map.regions

    def pieces(self, count: int, offset: int) -> Iterator[tuple[int, int]]:
        """(count, offset) of the parts of a range that lie in one region each."""
        while count > 0:
            part = min(count, self._span_mask + 1 - (offset & self._span_mask))
            yield part, offset
            offset += part
            count -= part

    def runs(self, count: int, offset: int) -> Iterator[tuple[int, int, int]]:
        """(state, count, offset) of the parts of a range that are in one state, in one region."""
        shift, end = self.shift, offset + count
        for state, first, last in self.map.runs(offset >> shift, ((end - 1) >> shift) + 1):
            start = max(first << shift, offset)
            yield state, min(last << shift, end) - start, start

    def is_allocated(self, count: int, offset: int) -> bool:
        """Whether all of a range is in the store, in one region."""
        shift = self.shift
        first, last = offset >> shift, (offset + count - 1) >> shift
        if first == last:
            return self.map.state(first) == ALLOCATED
        return next(self.map.runs(first, last + 1)) == (ALLOCATED, first, last + 1)

    # -- bytes -----------------------------------------------------------------------------------

    def read(self, count: int, offset: int) -> bytes:
        """Bytes of allocated blocks."""
        return self.store.read(count, self._position(offset))

    def write(self, parts: Sequence[Buffer], offset: int, stable: bool = False) -> None:
        """Write buffers one behind the other; no block changes its state."""
        self.store.write(parts, self._position(offset), stable)

    def zero(self, count: int, offset: int) -> bool:
        """Make the bytes zero, keeping or taking their space; False where that needs a write."""
        return self.store.allocate(ZERO_RANGE, count, self._position(offset))

    def punch(self, count: int, offset: int) -> bool:
        """Make the bytes zero and give their space back; False where that cannot be done."""
        try:
            return self.store.allocate(PUNCH_HOLE | KEEP_SIZE, count, self._position(offset))
        except OSError:
            return False

    def prefetch(self, count: int, offset: int) -> None:
        """Have bytes of allocated blocks read soon."""
        os.posix_fadvise(self.store.fd, self._position(offset), count, os.POSIX_FADV_WILLNEED)

    def _position(self, offset: int) -> int:
        region = self.map.regions.get(offset >> self._span_shift)
        if region is None or region.place is None:
            region = self.map.region(offset >> self.shift)
            with self._released:
                if region.place is None:
                    region.place = self.store.place(self._span_mask + 1)
        return region.place + (offset & self._span_mask)

    # -- states ----------------------------------------------------------------------------------

    def hold(self, first: int, last: int) -> _Hold:
        """Be the only one that changes the blocks `first` to `last`, until `release`."""
        mine = _Hold(first, last)
        with self._released:
            held = self._held
            held.append(mine)
            while not self._is_first(mine):
                self._released.wait()
        return mine

    def release(self, mine: _Hold) -> None:
        """Let the next one change the blocks."""
        with self._released:
            self._held.remove(mine)
            if self._held:
                self._released.notify_all()

    def _is_first(self, mine: _Hold) -> bool:
        for other in self._held:
            if other is mine:
                return True
            if other.first <= mine.last and mine.first <= other.last:
                return False
        raise AssertionError("a hold that was released")
