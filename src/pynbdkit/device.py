"""Device: one open disk, as one client sees it. The one interface that everything implements.

A plugin opens a Device per connection. All offsets, counts and sizes are bytes. A Device says only
what it has: an operation or a capability question that a class does not override does not exist
for it, and the rules of plugin-contract.md fill the gap (see `complete.py`): FUA by flush, zero by
write, cache by read, extents by "all allocated".

Required: get_size and pread. Errors: raise OSError with an errno; the client gets the protocol's
error for it (EIO for any other exception), the log gets the callback, its offset and count.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    Buffer = Any  # bytes, bytearray, memoryview, mmap: whatever gives contiguous bytes


class Device:
    """Base class of devices: override what your disk has; leave the rest alone.

    The draft's FUA forms may be defined as well, each replacing the method without `_fua`
    (plugin-contract.md): ``pwrite_fua(buf, offset, fua)``, ``trim_fua(count, offset, fua)``,
    ``zero_fua(count, offset, may_trim, fua)``.
    """

    blocking: bool | None = None
    """Whether calls may wait (network, a cold disk, sleep): True runs them on the connection's
    threads, False promises that no call ever waits; None: they run where they were read, and the
    server moves them to threads when they turn out to wait."""

    carries_fua: bool = True
    """Whether pwrite, trim and zero can be handed the FUA flag; false for version 1 scripts."""

    def get_size(self) -> int:
        """The size of the disk in bytes (0 to 2**63 - 1). Required."""
        raise NotImplementedError

    def block_size(self) -> tuple[int, int, int]:
        """(minimum, preferred, maximum) block size in bytes; (0, 0, 0): no constraint."""
        raise NotImplementedError

    def export_description(self) -> str | None:
        """A text for humans about this export."""
        raise NotImplementedError

    def can_write(self) -> bool:
        """Default: pwrite exists."""
        raise NotImplementedError

    def can_flush(self) -> bool:
        """Default: flush exists."""
        raise NotImplementedError

    def can_trim(self) -> bool:
        """Default: trim exists."""
        raise NotImplementedError

    def can_zero(self) -> Any:
        """Default: zero exists. False makes the server write zeros with pwrite."""
        raise NotImplementedError

    def can_fast_zero(self) -> bool:
        """Whether zero honours FAST_ZERO. Default: no."""
        raise NotImplementedError

    def can_extents(self) -> bool:
        """Default: extents exists."""
        raise NotImplementedError

    def can_fua(self) -> int:
        """Fua.NONE, EMULATE or NATIVE. Default: EMULATE if can_flush, else NONE."""
        raise NotImplementedError

    def can_multi_conn(self) -> bool:
        """Whether a flush on one connection covers writes on another. Default: no."""
        raise NotImplementedError

    def can_cache(self) -> int:
        """CacheMode.NONE, EMULATE or NATIVE. Default: NATIVE if cache exists, else NONE."""
        raise NotImplementedError

    def is_rotational(self) -> bool:
        """Default: no."""
        raise NotImplementedError

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """Return exactly `count` bytes from `offset`: any contiguous buffer, sent without a copy.

        The buffer must not change until the reply is sent: return a new one each time, or a slice
        of the disk itself. Required. `flags` is 0.
        """
        raise NotImplementedError

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        """Write the whole of `buf` (a memoryview, valid during the call only). Flag: FUA."""
        raise NotImplementedError

    def pwrite_group(self, writes: Sequence[tuple[Buffer, int]]) -> bool:
        """Write several (buf, offset) with FUA at once: optional, for devices with native FUA.

        Return True when all of them are on stable storage. Return False, with nothing written,
        where a pwrite with FUA for each is better: then each is written by pwrite. If it raises,
        each is written again by pwrite, so that the client learns which of them failed.
        """
        raise NotImplementedError

    def flush(self, flags: int) -> None:
        """Return when every write that was answered before is on stable storage."""
        raise NotImplementedError

    def trim(self, count: int, offset: int, flags: int) -> None:
        """The client does not need this range any more. Flag: FUA."""
        raise NotImplementedError

    def zero(self, count: int, offset: int, flags: int) -> None:
        """Make the range read as zeros. Flags: MAY_TRIM, FUA, FAST_ZERO.

        Raise OSError(EOPNOTSUPP) to have the server write zeros instead.
        """
        raise NotImplementedError

    def cache(self, count: int, offset: int, flags: int) -> None:
        """Prefetch the range."""
        raise NotImplementedError

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """(offset, length, type) in order, without gaps, from `offset` on. Flag: REQ_ONE."""
        raise NotImplementedError

    def contexts(self) -> Iterable[str]:
        """Names ("namespace:leaf") of metadata contexts of its own, beside ``base:allocation``.

        A client that selects one gets its answers from `block_status`. Optional; the namespace
        ``base`` is the specification's (NBD protocol, "Metadata querying").
        """
        raise NotImplementedError

    def block_status(
        self, context: str, count: int, offset: int, flags: int
    ) -> Iterable[tuple[int, int, int]]:
        """What a context of `contexts` says of the range: (offset, length, status) as `extents`.

        The meaning of the status (up to 64 bits) is the context's own; more than 32 bits reach
        only clients with extended headers, others get EOVERFLOW. Flag: REQ_ONE.
        """
        raise NotImplementedError

    def close(self) -> None:
        """The client has gone. Called once, after the last request has ended."""
