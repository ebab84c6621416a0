"""Disks for fuzzing: each says when it is asked for what it must never be asked for.

What a server may ask follows from plugin-contract.md: whole numbers within the size, nothing of no
length, only flags that were offered, whole blocks where there are blocks. A disk's exceptions do
not pass the server, so what is wrong is noted down; and so is any exception of the server's own.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fuzz_base import Finding

from pynbdkit import log
from pynbdkit.device import Device
from pynbdkit.errors import OpenError
from pynbdkit.flags import Flag

PAGE = 4096
wrong: list[str] = []
"""What should not have happened."""


class Planned(Exception):
    """What a disk fails with that knows no errno."""


def note(what: str) -> None:
    """Something is wrong."""
    wrong.append(what)


def nothing_wrong() -> None:
    """Raise Finding if something was noted; forget it."""
    if wrong:
        text = "; ".join(wrong[:3])
        wrong.clear()
        raise Finding(text)


@contextmanager
def no_surprises() -> Iterator[None]:
    """An exception that the server catches and logs must be one that a disk was to raise."""

    def exception(message: str, failure: BaseException) -> None:
        if not isinstance(failure, (OSError, OpenError, Planned)):
            note(f"{message}: {failure!r}")

    before = log.exception, log.error, log.warning
    log.exception = exception
    log.error = log.warning = lambda message: None
    try:
        yield
    finally:
        log.exception, log.error, log.warning = before
        wrong.clear()


class Strict(Device):
    """A disk in memory that can do everything."""

    blocking: bool | None = False
    native = True
    size = 10 * PAGE + 100
    block = (0, 0, 0)

    def __init__(self) -> None:
        self.content = bytearray(min(self.size, 1 << 16))
        self.fresh()

    def fresh(self) -> None:
        """Be as new."""
        self.content[:] = bytes(len(self.content))
        self.content[:PAGE] = bytes(range(256)) * (PAGE // 256)

    def sees(self, what: str, count: int, offset: int, flags: int, allowed: int) -> None:
        """A call has come."""
        minimum, _, maximum = self.block
        end = offset + count
        if not (type(count) is type(offset) is type(flags) is int):
            note(f"{what}: arguments that are no numbers")
        if not (0 <= offset < end <= self.size):
            note(f"{what} of {count} bytes at {offset}: the disk has {self.size}")
        if flags & ~allowed:
            note(f"{what} with flags {flags:#x}, of which {allowed:#x} are allowed")
        if minimum > 1 and (offset % minimum or (end % minimum and end != self.size)):
            note(f"{what} of {count} bytes at {offset}: not whole blocks of {minimum}")
        if maximum and what in ("pread", "pwrite") and count > maximum:
            note(f"{what} of {count} bytes, the maximum is {maximum}")

    def fails(self, what: str, count: int, offset: int) -> int:
        """The errno that a call is to fail with; 0: none."""
        return 0

    def _fail(self, what: str, count: int, offset: int) -> None:
        number = self.fails(what, count, offset)
        if number:
            raise OSError(number, "as planned") if number != errno.EDOM else Planned(what)

    def get_size(self) -> int:
        """The size."""
        return self.size

    def block_size(self) -> tuple[int, int, int]:
        """The constraints."""
        return self.block

    def can_fua(self) -> int:
        """Native."""
        return 2

    def can_fast_zero(self) -> bool:
        """Yes."""
        return True

    def pread(self, count: int, offset: int, flags: int) -> Any:
        """As a Device's."""
        self.sees("pread", count, offset, flags, 0)
        self._fail("pread", count, offset)
        return bytes(self.content[offset : offset + count])

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        """As a Device's."""
        self.sees("pwrite", len(buf), offset, flags, Flag.FUA)
        self._fail("pwrite", len(buf), offset)
        self.content[offset : offset + len(buf)] = buf

    def flush(self, flags: int) -> None:
        """As a Device's."""
        if flags:
            note(f"flush with flags {flags:#x}")
        self._fail("flush", 0, 0)

    def trim(self, count: int, offset: int, flags: int) -> None:
        """As a Device's; it zeroes, so that the outcome can be told."""
        self.sees("trim", count, offset, flags, Flag.FUA)
        self._fail("trim", count, offset)
        self.wipe(count, offset)

    def zero(self, count: int, offset: int, flags: int) -> None:
        """As a Device's."""
        self.sees("zero", count, offset, flags, Flag.FUA | Flag.MAY_TRIM | Flag.FAST_ZERO)
        self._fail("zero", count, offset)
        self.wipe(count, offset)

    def wipe(self, count: int, offset: int) -> None:
        """Zero a range."""
        self.content[offset : offset + count] = bytes(len(self.content[offset : offset + count]))

    def cache(self, count: int, offset: int, flags: int) -> None:
        """As a Device's."""
        self.sees("cache", count, offset, flags, 0)
        self._fail("cache", count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """As a Device's: pages in turn data and zeros."""
        self.sees("extents", count, offset, flags, Flag.REQ_ONE)
        self._fail("extents", count, offset)
        end = min(offset + count, offset + 64 * PAGE)
        while offset < end:
            stop = min((offset // PAGE + 1) * PAGE, end)
            yield offset, stop - offset, 3 if offset // PAGE % 2 else 0
            offset = stop

    def contexts(self) -> Iterable[str]:
        """As a Device's."""
        return ("test:page", "test:wide")

    def block_status(
        self, context: str, count: int, offset: int, flags: int
    ) -> Iterable[tuple[int, int, int]]:
        """As a Device's: the number of the page; in `wide` it takes 64 bits."""
        self.sees("block_status", count, offset, flags, Flag.REQ_ONE)
        self._fail("block_status", count, offset)
        status = offset // PAGE & 0xFFFF
        yield offset, count, status if context == "test:page" else status | 1 << 40


class ReadOnly(Device):
    """A disk that has the two methods that a disk must have."""

    blocking = False
    size = 1000

    def __init__(self) -> None:
        self._strict = Strict()
        self._strict.size = self.size
        self.content = self._strict.content

    def fresh(self) -> None:
        """Be as new."""

    def get_size(self) -> int:
        """The size."""
        return self.size

    def pread(self, count: int, offset: int, flags: int) -> Any:
        """As a Device's."""
        return self._strict.pread(count, offset, flags)


class Emulated(ReadOnly):
    """A disk that can write and flush, and leaves the rest to the rules."""

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        """As a Device's."""
        if flags:
            note(f"pwrite with flags {flags:#x}, FUA is emulated")
        self._strict.pwrite(buf, offset, flags)

    def flush(self, flags: int) -> None:
        """As a Device's."""
        self._strict.flush(flags)

    def fresh(self) -> None:
        """Be as new."""
        self._strict.fresh()


class Blocks(Strict):
    """A disk of blocks, whose last one is not whole."""

    block = (512, PAGE, 2 * PAGE)


class Group(Strict):
    """A disk that makes writes stable together, unless one of them goes to its last page."""

    def pwrite_group(self, writes: Any) -> bool:
        """As a Device's."""
        for buf, offset in writes:
            self.sees("pwrite_group", len(buf), offset, 0, 0)
        if any(offset >= 3 * PAGE for _, offset in writes):
            return False
        if any(offset >= 2 * PAGE for _, offset in writes):
            raise OSError(errno.EIO, "as planned")
        for buf, offset in writes:
            self.content[offset : offset + len(buf)] = buf
        return True


class Failing(Strict):
    """A disk that fails in its second page; each way to fail is the offset's."""

    def fails(self, what: str, count: int, offset: int) -> int:
        """As planned."""
        if what != "flush" and offset < 2 * PAGE and offset + count > PAGE:
            at = max(offset, PAGE) // 16 % 8
            return (
                *(errno.EIO, errno.ENOSPC, errno.EPERM, errno.ENOTDIR, errno.EDOM),
                *(errno.ENOMEM, errno.ESHUTDOWN, errno.EFBIG),
            )[at]
        return 0


class Odd(Strict):
    """A disk whose answers are wrong, in its second page."""

    def pread(self, count: int, offset: int, flags: int) -> Any:
        """As a Device's, or not."""
        data = super().pread(count, offset, flags)
        if PAGE <= offset < 2 * PAGE:
            odd: list[Any] = [data[1:], data + b"x", None, memoryview(data), bytearray(data), "x"]
            return odd[offset % 6]
        return data

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """As a Device's, or not."""
        if PAGE <= offset < 2 * PAGE:
            odd: list[Any] = [[], [(offset + 1, 5, 0)], None, [(offset, 0, 0)], [(0, 1, 2, 3)]]
            odd.append([(offset, 1, 0), (offset + 5, 1, 0)])
            return odd[offset % 6]  # type: ignore[no-any-return]
        return super().extents(count, offset, flags)


class Huge(Strict):
    """The largest disk that there can be; it keeps the first bytes of what is written."""

    size = (1 << 63) - 1
    block = (1, PAGE, 2 * PAGE)

    def fresh(self) -> None:
        """Be as new."""
        self.content[: 4 * PAGE] = bytes(4 * PAGE)
        self.content[:PAGE] = bytes(range(256)) * (PAGE // 256)

    def pread(self, count: int, offset: int, flags: int) -> Any:
        """As a Device's."""
        self.sees("pread", count, offset, flags, 0)
        data = bytes(self.content[offset : offset + count])
        return data + bytes(count - len(data))

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        """As a Device's."""
        self.sees("pwrite", len(buf), offset, flags, Flag.FUA)
        if offset + len(buf) <= len(self.content):
            self.content[offset : offset + len(buf)] = buf


KINDS: tuple[Callable[[], Any], ...] = (
    *(Strict, ReadOnly, Emulated, Blocks, Group, Failing, Odd, Huge),
)
