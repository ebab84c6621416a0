"""memory: a RAM disk, seen by all clients, gone when the server ends (nbdkit-memory-plugin(1)).

The sparse disk is one private anonymous mapping without a reservation, so the kernel is the page
table: a read is a slice of the mapping (no copy), trim gives the pages back. Which parts were ever
written is noted in one byte per `CHUNK`, for extents. A disk that is too large to be mapped is
kept in a `SparseArray`.

For several processes (--workers), disk and note are mappings that these share, made before they
are forked (`SharedDisk`): there, any of them may be killed at any moment.
"""

from __future__ import annotations

import errno
import mmap

from .. import parameters
from ..device import Device
from ..errors import ConfigError
from ..extents import HOLE, ZERO, Extent
from ..flags import CacheMode, Flag, Fua
from ..parse import parse_bool
from ..plugin import Plugin
from ._zeros import zeros

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Final

    from ..device import Buffer
    from ..session import Session
    from ..sparse import SparseArray

CHUNK_BITS: Final = 16
CHUNK: Final = 1 << CHUNK_BITS
PIECE: Final = 1 << 20
"""Bytes that are zeroed at a time."""
MAX_MAPPED: Final = 1 << 44
"""Larger disks are not mapped."""
LARGE_WRITE: Final = 2 * CHUNK
"""For a write of so many bytes the kernel is asked for all pages at once, where there are none."""
MADV_NOHUGEPAGE: Final = getattr(mmap, "MADV_NOHUGEPAGE", 15)
MADV_POPULATE_WRITE: Final = getattr(mmap, "MADV_POPULATE_WRITE", 23)
MAP_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)


def parse_allocator(text: str) -> tuple[str, bool]:
    """(name, mlock) of an allocator= text. Raises ValueError."""
    name, _, options = text.partition(",")
    locked = False
    if name == "mlock":
        name, locked = "malloc", True
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key != "mlock" or name != "malloc":
            raise ValueError(f"unknown allocator option {option!r} (malloc takes mlock=true)")
        locked = parse_bool(value or "true")
    if name == "zstd":
        raise ValueError("allocator zstd is not supported: use sparse or malloc")
    if name not in ("sparse", "malloc"):
        raise ValueError(f'unknown allocator "{name}" (sparse, malloc, or malloc,mlock=true)')
    return name, locked


class Memory(Plugin):
    """A RAM disk."""

    name = "memory"
    longname = "nbdkit memory plugin"
    description = "A disk in memory, discarded when the server ends"
    blocking = False
    forkable = True

    size = parameters.size("Size of the backing disk", required=True, magic=True, metavar="SIZE")
    allocator = parameters.text(
        "Backend allocation strategy", default="sparse", metavar="sparse|malloc[,mlock=true]"
    )

    def config_complete(self) -> None:
        """Check the allocator."""
        try:
            self._kind, self._locked = parse_allocator(self.allocator)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def get_ready(self) -> None:
        """Make the disk."""
        self._disk: MappedDisk | SparseArray
        if self.size > MAX_MAPPED:
            if self._kind != "sparse":
                raise ConfigError(f"size={self.size}: too large for allocator={self._kind}")
            if self.worker_count > 1:
                raise ConfigError(
                    f"size={self.size}: too large to be shared by several processes (at most 16T):"
                    " leave --workers out"
                )
            from ..sparse import SparseArray

            self._disk = SparseArray(self.size)
        else:
            disk = MappedDisk if self.worker_count == 1 else SharedDisk
            self._disk = disk(self.size, self._kind == "sparse", self._locked)

    def open(self, session: Session) -> Device:
        """Every connection sees the same disk."""
        if isinstance(self._disk, MappedDisk):
            return self._disk.device()
        return SparseDevice(self._disk)

    def dump_plugin(self) -> Iterable[tuple[str, str]]:
        """mlock as the peer prints it."""
        return [("mlock", "yes"), ("zstd", "no")]


class MappedDisk:
    """`size` bytes of anonymous memory and a note of what was written."""

    sharing = mmap.MAP_PRIVATE

    def __init__(self, size: int, sparse: bool, locked: bool) -> None:
        """`sparse`: memory is reserved only as it is written; `locked`: it is never swapped out."""
        self.size = size
        self.sparse = sparse
        flags = self.sharing | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if sparse else 0)
        try:
            self.map = mmap.mmap(-1, max(size, 1), flags=flags)
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(f"size={size}: cannot allocate the disk: {error}") from None
        self.view = memoryview(self.map)
        self._populates = sparse
        if sparse:  # a small write is to take a small page, also where the system gives large ones
            self._advise(MADV_NOHUGEPAGE, 0, size)
        self.written = self._note((size + CHUNK - 1) >> CHUNK_BITS)
        if locked:
            _mlock(self.map, size)

    def _note(self, chunks: int) -> bytearray | mmap.mmap:
        return bytearray(chunks)

    def device(self) -> MemoryDevice:
        """A connection's view of it."""
        return MemoryDevice(self)

    def clear(self, count: int, offset: int) -> None:
        """Zero a range: whole chunks are given back, the rest is written."""
        end = offset + count
        first = (offset + CHUNK - 1) & ~(CHUNK - 1)
        last = end if end == self.size else end & ~(CHUNK - 1)
        if not self.sparse or last <= first:
            self._fill(offset, end)
            return
        self._fill(offset, first)
        self._fill(last, end)
        self._give_back(first, last)

    def _give_back(self, first: int, last: int) -> None:
        # The note goes first: a write that comes in between marks its chunk again.
        self._forget(first, last)
        self._drop(mmap.MADV_DONTNEED, first, last)

    def _drop(self, advice: int, first: int, last: int) -> None:
        try:
            self.map.madvise(advice, first, last - first)
        except OSError:  # memory that is locked (--swap) cannot be given back
            self._zero(first, last)

    def _forget(self, first: int, last: int) -> None:
        chunks = ((last + CHUNK - 1) >> CHUNK_BITS) - (first >> CHUNK_BITS)
        self.written[first >> CHUNK_BITS : (first >> CHUNK_BITS) + chunks] = bytes(chunks)

    def _fill(self, start: int, end: int) -> None:
        while start < end:
            piece = min(end - start, PIECE)
            if (
                not self.sparse
                or self.written.find(
                    b"\1", start >> CHUNK_BITS, ((start + piece - 1) >> CHUNK_BITS) + 1
                )
                >= 0
            ):
                self._zero(start, start + piece)
            start += piece

    def _zero(self, start: int, end: int) -> None:
        for at in range(start, end, PIECE):
            piece = min(end - at, PIECE)
            self.view[at : at + piece] = bytes(piece)

    def populate(self, count: int, offset: int) -> None:
        """Have the pages of a range: all at once costs half of a fault for each (madvise(2))."""
        if self._populates:
            start = offset & -mmap.PAGESIZE
            self._populates = self._advise(MADV_POPULATE_WRITE, start, offset + count - start)

    def _advise(self, advice: int, start: int, count: int) -> bool:
        """Whether the kernel takes this advice; all is as well without."""
        try:
            if count:
                self.map.madvise(advice, start, count)
        except OSError as error:
            return error.errno != errno.EINVAL
        return True

    def mark(self, count: int, offset: int) -> None:
        """Note that a range is allocated."""
        first = offset >> CHUNK_BITS
        last = (offset + count - 1) >> CHUNK_BITS
        self.written[first : last + 1] = b"\1" * (last + 1 - first)


class SharedDisk(MappedDisk):
    """A disk that several processes serve.

    What is not noted as written is zeros, always: else zeroing a part of it would leave it as it
    is. So a process that is killed between two steps must leave a chunk noted for nothing, never
    one with data that is not noted.
    """

    sharing = mmap.MAP_SHARED

    def _note(self, chunks: int) -> mmap.mmap:
        return mmap.mmap(-1, max(chunks, 1), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)

    def device(self) -> MemoryDevice:
        """A connection's view of it."""
        return SharedMemoryDevice(self)

    def _give_back(self, first: int, last: int) -> None:
        self._drop(mmap.MADV_REMOVE, first, last)
        self._forget(first, last)
        self._drop(mmap.MADV_REMOVE, first, last)  # what was written, and noted, in between


class RamDevice(Device):
    """What the devices of both kinds of disk have in common."""

    def __init__(self, size: int) -> None:
        self._size = size

    def get_size(self) -> int:
        """As configured."""
        return self._size

    def can_multi_conn(self) -> bool:
        """All connections see the same memory."""
        return True

    def can_fast_zero(self) -> bool:
        """Zeroing gives memory back: faster than writing."""
        return True

    def can_fua(self) -> int:
        """Memory is as stable as it gets."""
        return Fua.NATIVE

    def can_cache(self) -> int:
        """It is in memory: there is nothing to prefetch."""
        return CacheMode.NATIVE

    def flush(self, flags: int) -> None:
        """Nothing to do."""


class MemoryDevice(RamDevice):
    """A connection's view of a mapped disk."""

    def __init__(self, disk: MappedDisk) -> None:
        super().__init__(disk.size)
        self._disk = disk
        self._view = disk.view
        self._written = disk.written

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """The memory itself, without a copy."""
        return self._view[offset : offset + count]

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        """Write, and note it for extents."""
        count = len(buf)
        first = offset >> CHUNK_BITS
        last = (offset + count - 1) >> CHUNK_BITS
        if count >= LARGE_WRITE and not self._written[first]:
            self._disk.populate(count, offset)
        self._view[offset : offset + count] = buf
        if first == last:
            self._written[first] = 1
        else:
            self._written[first : last + 1] = b"\1" * (last + 1 - first)

    def trim(self, count: int, offset: int, flags: int) -> None:
        """Give memory back."""
        self._disk.clear(count, offset)

    def zero(self, count: int, offset: int, flags: int) -> None:
        """Zero, giving memory back where it may."""
        self._disk.clear(count, offset)
        if not flags & Flag.MAY_TRIM:
            self._disk.mark(count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """Data where something was written, else holes."""
        if not self._disk.sparse:
            yield Extent(offset, count, 0)
            return
        written = self._written
        end = offset + count
        last = ((end - 1) >> CHUNK_BITS) + 1
        while offset < end:
            chunk = offset >> CHUNK_BITS
            if written[chunk]:
                stop, kind = written.find(b"\0", chunk, last), 0
            else:
                stop, kind = written.find(b"\1", chunk, last), HOLE | ZERO
            until = end if stop < 0 else stop << CHUNK_BITS
            yield Extent(offset, until - offset, kind)
            offset = until


class SharedMemoryDevice(MemoryDevice):
    """A connection's view of a disk that several processes serve."""

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """The memory itself, without a copy, where there is any.

        To look at shared memory that nobody has written to would give it pages, which a private
        mapping needs for writing alone.
        """
        if self._disk.sparse:
            written = self._written
            first, last = offset >> CHUNK_BITS, (offset + count - 1) >> CHUNK_BITS
            if first == last:
                if not written[first]:
                    return zeros(count)
            elif written.find(b"\0", first, last + 1) >= 0:
                return self._gather(count, offset)
        return self._view[offset : offset + count]

    def _gather(self, count: int, offset: int) -> Buffer:
        result = bytearray(count)
        for start, length, kind in self.extents(count, offset, 0):
            if kind == 0:
                result[start - offset : start - offset + length] = self._view[
                    start : start + length
                ]
        return result

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        """Write, noted before as well: this process may be killed meanwhile."""
        count = len(buf)
        if count:
            self._disk.mark(count, offset)
            self._view[offset : offset + count] = buf
            self._disk.mark(count, offset)


class SparseDevice(RamDevice):
    """A connection's view of a disk that is too large to be mapped."""

    def __init__(self, disk: SparseArray) -> None:
        super().__init__(disk.size)
        self._disk = disk

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """The memory itself, without a copy."""
        return self._disk.read(count, offset)

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        """Write, and note it for extents."""
        self._disk.write(buf, offset)

    def trim(self, count: int, offset: int, flags: int) -> None:
        """Give memory back."""
        self._disk.zero(count, offset)

    def zero(self, count: int, offset: int, flags: int) -> None:
        """Zero, giving memory back where it may."""
        self._disk.zero(count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """Data where something was written, else holes."""
        return self._disk.extents(count, offset)


def _mlock(memory: Any, size: int) -> None:
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    array = (ctypes.c_char * max(size, 1)).from_buffer(memory)
    if libc.mlock(ctypes.byref(array), ctypes.c_size_t(size)) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(
            f"allocator=malloc,mlock=true: mlock of {size} bytes: {reason} (raise ulimit -l)"
        )
