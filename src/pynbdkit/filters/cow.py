"""cow: a writable copy on top of a disk that is never written (nbdkit-cow-filter(1)).

The layer below is opened read-only. What clients change is kept in an `Overlay` (`_overlay.py`) by
blocks, one overlay per export name, shared by all connections, and thrown away when the server
ends. Each block is in one of three states: as it is below, in the overlay, or trimmed (zeros, and
nowhere). A write to a part of a block that is not in the overlay brings the rest of it along.

flush and FUA do what they say of the overlay's file: what was written is on the disk, and a disk
that cannot take it is the client's error. (That it survives the server is what nobody is promised.)
"""

from __future__ import annotations

import errno
import os
import threading

from .. import log, parameters
from ..errors import ConfigError, OpenError
from ..extents import HOLE, ZERO
from ..filter import Filter, FilterDevice
from ..flags import CacheMode, Flag, Fua, ZeroMode
from ..parse import parse_bool
from ._overlay import ALLOCATED, NOT_ALLOCATED, TRIMMED, Overlay, Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Final

    from ..complete import Layer
    from ..device import Buffer, Device
    from ..session import Session

MIN_BLOCK: Final = 4096
MAX_BLOCK: Final = 1 << 31
EXTENTS_SPAN: Final = 1 << 42
"""The longest range, in bytes, that one answer to extents looks at."""
PIECE: Final = 1 << 20
"""Bytes that are copied at a time, where a block is larger."""
DEFAULT_FOLDER: Final = "/var/tmp"


def _on_read(_key: str, text: str) -> bool | str:
    return text if text.startswith("/") else parse_bool(text)


class CowFilter(Filter):
    """Make a temporary writable copy on top of a disk."""

    longname = "cow filter"
    blocking = None  # the overlay's file is on a disk

    cow_block_size = parameters.size("Block size of the overlay", default=65536, metavar="N")
    cow_on_cache = parameters.boolean("Keep what cache requests read", default=False)
    cow_on_read = parameters.Parameter(
        "text",
        "Keep what is read; with a path: while that exists",
        _on_read,
        default=False,
        metavar="false|true|/PATH",
    )

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        self._store: Store | None = None
        self._overlays: dict[str, Overlay] = {}
        self._lock = threading.Lock()

    def config_complete(self) -> None:
        """Check the block size."""
        size = self.cow_block_size
        if not MIN_BLOCK <= size <= MAX_BLOCK or size & (size - 1):
            raise ConfigError(f"cow-block-size must be a power of 2 from 4K to 2G, not {size}")

    def get_ready(self) -> None:
        """Make the overlay's file, while a mistake can still be told."""
        folder = os.environ.get("TMPDIR") or DEFAULT_FOLDER
        try:
            self._store = Store(folder)
        except OSError as error:
            raise ConfigError(
                f"cow: cannot make a temporary file in {folder}: {error.strerror}"
                " (TMPDIR says where)"
            ) from None

    def unload(self) -> None:
        """Throw the changes away."""
        self._overlays.clear()
        if self._store is not None:
            self._store.close()

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Open the next layer read-only. Raises OpenError where its size is not what it was."""
        below = next(session.replace(readonly=True))
        return _CowDevice(below, self, session.export_name)

    def enter(self, name: str, size: int) -> Overlay:
        """The overlay of an export, for one more connection. Raises OpenError."""
        assert self._store is not None
        with self._lock:
            overlay = self._overlays.get(name)
            if overlay is None:
                shift = self.cow_block_size.bit_length() - 1
                overlay = self._overlays[name] = Overlay(self._store, size, shift)
            elif overlay.size != size:
                raise OpenError(
                    f"cow: the disk below had {overlay.size} bytes, now it has {size}:"
                    " what was written cannot be laid over it (start the server anew)"
                )
            overlay.users += 1
        return overlay

    def leave(self, name: str, overlay: Overlay) -> None:
        """A connection has ended; an overlay that nobody wrote to is forgotten."""
        with self._lock:
            overlay.users -= 1
            if not overlay.users and overlay.empty:
                del self._overlays[name]


class _CowDevice(FilterDevice):
    """One connection's view of an overlay and the disk below."""

    def __init__(self, next: Layer, filter: CowFilter, name: str) -> None:
        super().__init__(next)
        self._below = next.unchecked_pread  # as the server asks it: it checks what comes back
        self._most = next.block_size()[2] or 0xFFFFFFFF
        self._filter = filter
        self._name = name
        self._on_read: bool | str = filter.cow_on_read
        self._on_cache: bool = filter.cow_on_cache
        self._block: int = filter.cow_block_size
        self._shift = self._block.bit_length() - 1
        self._overlay = filter.enter(name, next.get_size())
        self._state = self._overlay.map.state
        self._size = self._overlay.size

    # -- questions -------------------------------------------------------------------------------

    def block_size(self) -> tuple[int, int, int]:
        """As below; where that has no wish: whole blocks are best."""
        below = self.next.block_size()
        return below if any(below) else (1, min(self._block, 32 << 20), 0xFFFFFFFF)

    def can_write(self) -> bool:
        return True

    def can_flush(self) -> bool:
        return True

    def can_trim(self) -> bool:
        return True

    def can_zero(self) -> int:
        return ZeroMode.NATIVE

    def can_fast_zero(self) -> bool:
        return True

    def can_extents(self) -> bool:
        return True

    def can_fua(self) -> int:
        return Fua.NATIVE

    def can_multi_conn(self) -> bool:
        """Yes: connections to one export share one overlay, and a flush covers all of it."""
        return True

    def can_cache(self) -> int:
        return CacheMode.NATIVE

    # -- reading ---------------------------------------------------------------------------------

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        overlay = self._overlay
        if self._on_read and (self._on_read is True or os.path.exists(self._on_read)):
            self._keep_if_possible(count, offset)
        first = offset >> self._shift
        if first == (offset + count - 1) >> self._shift:  # as nearly all are
            return self._read_run(self._state(first), count, offset)
        runs = list(overlay.runs(count, offset))
        if len(runs) == 1:
            return self._read_run(*runs[0])
        data = bytearray(count)
        view = memoryview(data)
        for state, length, start in runs:
            if state != TRIMMED:
                at = start - offset
                view[at : at + length] = (
                    self._old(length, start)
                    if state == NOT_ALLOCATED
                    else overlay.read(length, start)
                )
        return data

    def _read_run(self, state: int, count: int, offset: int) -> Buffer:
        if state == NOT_ALLOCATED:
            return self._below(count, offset, 0)
        if state == TRIMMED:
            return bytes(count)
        return self._overlay.read(count, offset)

    def _old(self, count: int, offset: int) -> Buffer:
        """What is below, in requests that the layer there allows; checked."""
        if count <= self._most:
            return self.next.pread(count, offset, 0)
        data = bytearray(count)
        view = memoryview(data)
        for at in range(0, count, self._most):
            length = min(self._most, count - at)
            view[at : at + length] = self.next.pread(length, offset + at, 0)
        return data

    def extents(self, count: int, offset: int, flags: int) -> Iterator[tuple[int, int, int]]:
        # A range of 64 bits has very many regions: an answer may end early.
        for state, length, start in self._overlay.runs(min(count, EXTENTS_SPAN), offset):
            if state == ALLOCATED:
                yield start, length, 0
            elif state == TRIMMED:
                yield start, length, HOLE | ZERO
            else:
                end = start + length
                while start < end:  # the layer below may answer for less than was asked
                    for extent in self.next.extents(end - start, start, flags):
                        yield extent
                        start = extent.offset + extent.length

    def cache(self, count: int, offset: int, flags: int) -> None:
        if self._on_cache:
            self._keep(count, offset)
            return
        for state, length, start in self._overlay.runs(count, offset):
            if state == ALLOCATED:
                self._overlay.prefetch(length, start)
            elif state == NOT_ALLOCATED and self.next.can_cache():
                self.next.cache(length, start, flags)
            if start + length < offset + count:
                self.next.session.check()

    # -- writing ---------------------------------------------------------------------------------

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        overlay = self._overlay
        count = len(buf)
        if not count:
            return
        stable = bool(flags & Flag.FUA)
        if overlay.is_allocated(count, offset):
            overlay.write([buf], offset, stable)
            return
        view = memoryview(buf)
        for length, start in overlay.pieces(count, offset):
            self._write(view[start - offset : start - offset + length], start, stable)

    def _write(self, buf: Buffer, offset: int, stable: bool) -> None:
        """Write within a region; what is missing of the first and the last block comes along.

        Where it fails, the blocks stay in the state in which they were.
        """
        overlay, shift = self._overlay, self._shift
        end = offset + len(buf)
        first, last = offset >> shift, (end - 1) >> shift
        hold = overlay.hold(first, last)
        try:
            parts, start = [buf], offset
            begin = first << shift
            if begin < offset and self._state(first) != ALLOCATED:
                parts[:0] = self._rest(offset - begin, begin)
                start = offset - sum(map(len, parts[:-1]))
            finish = min((last + 1) << shift, self._size)
            if end < finish and self._state(last) != ALLOCATED:
                parts += self._rest(finish - end, end)
            overlay.write(parts, start, stable)
            overlay.map.mark(first, last + 1, ALLOCATED)
        finally:
            overlay.release(hold)

    def _rest(self, count: int, offset: int) -> list[Buffer]:
        """A part of a block as it is now; where it is long, it is put into the store at once."""
        trimmed = self._state(offset >> self._shift) == TRIMMED
        if count <= PIECE:
            return [bytes(count) if trimmed else self._old(count, offset)]
        for at in range(offset, offset + count, PIECE):
            length = min(PIECE, offset + count - at)
            self._overlay.write([bytes(length) if trimmed else self._old(length, at)], at)
        return []

    def flush(self, flags: int) -> None:
        self._overlay.store.sync()

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.zero(count, offset, flags & Flag.FUA | Flag.MAY_TRIM)

    def zero(self, count: int, offset: int, flags: int) -> None:
        """Whole blocks change their state, or get zeros without a write; the ends are written."""
        may_trim = bool(flags & Flag.MAY_TRIM)
        shift, end = self._shift, offset + count
        first = (offset + self._block - 1) >> shift
        last = (end + self._block - 1 if end == self._size else end) >> shift
        start, stop = min(first << shift, end), min(last << shift, end)  # the whole blocks
        if flags & Flag.FAST_ZERO and start >= stop:
            raise OSError(errno.EOPNOTSUPP, "no whole block: zero would be no faster than a write")
        if start < stop:
            for length, at in self._overlay.pieces(stop - start, start):
                self._zero_blocks(length, at, may_trim, bool(flags & Flag.FAST_ZERO))
                if at + length < stop:  # an exabyte has very many regions
                    self.next.session.check()
            self._zero_part(start - offset, offset, may_trim)
            self._zero_part(end - stop, stop, may_trim)
        else:
            self._zero_part(start - offset, offset, may_trim)
            self._zero_part(end - start, start, may_trim)
        if flags & Flag.FUA:
            self.flush(0)

    def _zero_blocks(self, count: int, offset: int, may_trim: bool, fast: bool) -> None:
        """Whole blocks, within a region."""
        overlay, shift = self._overlay, self._shift
        first, last = offset >> shift, (offset + count - 1) >> shift
        hold = overlay.hold(first, last)
        try:
            if may_trim:
                stored = any(run[0] == ALLOCATED for run in overlay.map.runs(first, last + 1))
                overlay.map.mark(first, last + 1, TRIMMED)
                if stored:
                    overlay.punch(count, offset)
                return
            if not overlay.zero(count, offset):
                if fast:
                    raise OSError(errno.EOPNOTSUPP, "the overlay's filesystem has no fast zero")
                for at in range(offset, offset + count, PIECE):
                    overlay.write([bytes(min(PIECE, offset + count - at))], at)
            overlay.map.mark(first, last + 1, ALLOCATED)
        finally:
            overlay.release(hold)

    def _zero_part(self, count: int, offset: int, may_trim: bool) -> None:
        """A part of one block."""
        if count and may_trim:
            state = self._state(offset >> self._shift)
            if state == TRIMMED or (state == ALLOCATED and self._overlay.punch(count, offset)):
                return
        for at in range(offset, offset + count, PIECE):
            self.pwrite(memoryview(bytes(min(PIECE, offset + count - at))), at, 0)

    # -- keeping what was read -------------------------------------------------------------------

    def _keep_if_possible(self, count: int, offset: int) -> None:
        """A read does not fail because it cannot be kept."""
        try:
            self._keep(count, offset)
        except OSError as error:
            log.debug(f"cow-on-read: offset {offset}, count {count}: {log.describe(error)}")

    def _keep(self, count: int, offset: int) -> None:
        """Bring the blocks of a range that are only below into the store."""
        for length, start in self._overlay.pieces(count, offset):
            self._keep_piece(length, start)
            if start + length < offset + count:
                self.next.session.check()

    def _keep_piece(self, count: int, offset: int) -> None:
        """`_keep` for a range within one region."""
        overlay, shift = self._overlay, self._shift
        for state, length, start in list(overlay.runs(count, offset)):
            if state != NOT_ALLOCATED:
                continue
            first, last = start >> shift, (start + length - 1) >> shift
            hold = overlay.hold(first, last)
            try:
                for now, begin, end in list(overlay.map.runs(first, last + 1)):
                    if now == NOT_ALLOCATED:
                        for at in range(begin << shift, min(end << shift, self._size), PIECE):
                            part = min(PIECE, min(end << shift, self._size) - at)
                            overlay.write([self._old(part, at)], at)
                        overlay.map.mark(begin, end, ALLOCATED)
            finally:
                overlay.release(hold)

    def close(self) -> None:
        self._filter.leave(self._name, self._overlay)
