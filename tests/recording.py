"""A disk in a bytearray that remembers what it was called with, for tests of filters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pynbdkit import Device, Plugin, Session

Event = tuple[Any, ...]


class RecordingDisk(Device):
    """Has every operation; each call is an event: its name and numbers."""

    def __init__(self, data: bytearray, events: list[Event]) -> None:
        self.data = data
        self.events = events

    def get_size(self) -> int:
        return len(self.data)

    def can_fast_zero(self) -> bool:
        return True

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        self.events.append(("pread", count, offset, flags))
        return bytes(self.data[offset : offset + count])

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        self.events.append(("pwrite", len(buf), offset, flags))
        self.data[offset : offset + len(buf)] = buf

    def flush(self, flags: int) -> None:
        self.events.append(("flush", flags))

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.events.append(("trim", count, offset, flags))
        self.data[offset : offset + count] = bytes(count)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.events.append(("zero", count, offset, flags))
        self.data[offset : offset + count] = bytes(count)

    def cache(self, count: int, offset: int, flags: int) -> None:
        self.events.append(("cache", count, offset, flags))

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """The disk's even pages of 4 KiB are data, the odd ones holes."""
        self.events.append(("extents", count, offset, flags))
        at = offset
        while at < offset + count:
            end = (at // 4096 + 1) * 4096
            yield at, end - at, 3 * (at // 4096 % 2)
            at = end

    def close(self) -> None:
        self.events.append(("close",))


class WriteOnly(RecordingDisk):
    """Only what is required, and pwrite."""

    trim: Any = Device.trim
    zero: Any = Device.zero
    flush: Any = Device.flush
    cache: Any = Device.cache
    extents: Any = Device.extents
    can_fast_zero: Any = Device.can_fast_zero


class Recording(Plugin):
    """A plugin of one recording disk for all; `events` are those of all connections."""

    name = "recording"
    blocking: bool | None = False

    def __init__(self, size: int = 1 << 20, kind: type[RecordingDisk] = RecordingDisk) -> None:
        super().__init__()
        self.data = bytearray(size)
        self.events: list[Event] = []
        self.kind = kind

    def open(self, session: Session) -> Device:
        return self.kind(self.data, self.events)

    def take(self) -> list[Event]:
        """The events since the last time."""
        events = self.events[:]
        self.events.clear()
        return events
