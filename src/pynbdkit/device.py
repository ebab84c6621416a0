"""Device: one open disk, as one client sees it. The one interface that everything implements.

A plugin opens a Device per connection. All offsets, counts and sizes are bytes. A Device says only
what it has: an operation or a capability question that a class does not override does not exist
for it, and the rules of plugin-contract.md fill the gap (see `complete.py`): FUA by flush, zero by
write, cache by read, extents by "all allocated".

Each method may be `async def`. Where an operation is, all operations of that device run on the
server's event loop, many requests at a time and one thread for all connections: so they share
locks, sessions and pools without a thread's care, and one that is no coroutine has to be quick.
Questions and `close` are run on the loop, and waited for, each where it is `async def` itself.

Required: get_size and pread. Errors: raise OSError with an errno; the client gets the protocol's
error for it (EIO for any other exception), the log gets the callback, its offset and count.
"""

from __future__ import annotations

from .errors import LoadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
    from typing import Any, Final, TypeAlias

    Buffer = Any  # bytes, bytearray, memoryview, mmap: whatever gives contiguous bytes
    _Run: TypeAlias = tuple[int, int, int]
    _Runs: TypeAlias = Iterable[_Run] | Awaitable[Iterable[_Run]] | AsyncIterable[_Run]

OPERATIONS: Final = (
    "pread",
    "pwrite",
    "flush",
    "trim",
    "zero",
    "cache",
    "extents",
    "block_status",
    "pwrite_fua",
    "trim_fua",
    "zero_fua",
)
"""What requests call. (pwrite_group is none of them: it is beside pwrite, not in its place.)"""
CONFIGURATION: Final = ("load", "unload", "config", "config_complete", "dump_plugin")
"""Steps of a plugin's life that cannot be `async def`: before and after there is a server."""
COROUTINE: Final = 0x80 | 0x100 | 0x200
"""CO_COROUTINE, CO_ITERABLE_COROUTINE, CO_ASYNC_GENERATOR: flags of an async function's code."""


def is_async(function: Any) -> bool:
    """Whether a function is `async def` (a method, a partial or an object called like one, too).

    As inspect.iscoroutinefunction, which is in a module that costs too much to import.
    """
    while type(function).__module__ == "functools" and hasattr(function, "func"):  # a partial
        function = function.func
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        call = getattr(type(function), "__call__", None)  # noqa: B004 (it is the code that counts)
        code = getattr(call, "__code__", None)
    flags = getattr(code, "co_flags", 0)
    return isinstance(flags, int) and bool(flags & COROUTINE)


def is_awaitable(answer: object) -> bool:
    """Whether what a function returned is to be awaited: that of an `async def` is."""
    return hasattr(type(answer), "__await__")


def refuse_async(layer: object, names: Iterable[str], where: str) -> None:
    """Raise LoadError where one of these methods is `async def`: nobody would await it."""
    for name in names:
        if is_async(getattr(layer, name, None)):
            raise LoadError(f"{where}: {name} cannot be 'async def'")


def then(answer: Any, follow: Callable[[Any], Any]) -> Any:
    """follow(answer); where `answer` is to be awaited, something to await for that."""
    if not is_awaitable(answer):
        return follow(answer)

    async def awaited() -> Any:
        return follow(await answer)

    return awaited()


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

    asynchronous: bool = False
    """True where operations return something to await without being `async def` (a decorator's
    work): they run on the event loop all the same. `blocking` means nothing there."""

    def get_size(self) -> int | Awaitable[int]:
        """The size of the disk in bytes (0 to 2**63 - 1). Required."""
        raise NotImplementedError

    def block_size(self) -> tuple[int, int, int] | Awaitable[tuple[int, int, int]]:
        """(minimum, preferred, maximum) block size in bytes; (0, 0, 0): no constraint."""
        raise NotImplementedError

    def export_description(self) -> str | Awaitable[str | None] | None:
        """A text for humans about this export."""
        raise NotImplementedError

    def can_write(self) -> bool | Awaitable[bool]:
        """Default: pwrite exists."""
        raise NotImplementedError

    def can_flush(self) -> bool | Awaitable[bool]:
        """Default: flush exists."""
        raise NotImplementedError

    def can_trim(self) -> bool | Awaitable[bool]:
        """Default: trim exists."""
        raise NotImplementedError

    def can_zero(self) -> Any:
        """Default: zero exists. False makes the server write zeros with pwrite."""
        raise NotImplementedError

    def can_fast_zero(self) -> bool | Awaitable[bool]:
        """Whether zero honours FAST_ZERO. Default: no."""
        raise NotImplementedError

    def can_extents(self) -> bool | Awaitable[bool]:
        """Default: extents exists."""
        raise NotImplementedError

    def can_fua(self) -> int | Awaitable[int]:
        """Fua.NONE, EMULATE or NATIVE. Default: EMULATE if can_flush, else NONE."""
        raise NotImplementedError

    def can_multi_conn(self) -> bool | Awaitable[bool]:
        """Whether a flush on one connection covers writes on another. Default: no."""
        raise NotImplementedError

    def can_cache(self) -> int | Awaitable[int]:
        """CacheMode.NONE, EMULATE or NATIVE. Default: NATIVE if cache exists, else NONE."""
        raise NotImplementedError

    def is_rotational(self) -> bool | Awaitable[bool]:
        """Default: no."""
        raise NotImplementedError

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """Return exactly `count` bytes from `offset`: any contiguous buffer, sent without a copy.

        The buffer must not change until the reply is sent: return a new one each time, or a slice
        of the disk itself. Required. `flags` is 0.
        """
        raise NotImplementedError

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> Awaitable[None] | None:
        """Write the whole of `buf` (a memoryview, valid during the call only). Flag: FUA.

        A coroutine's is valid until it ends.
        """
        raise NotImplementedError

    def pwrite_group(self, writes: Sequence[tuple[Buffer, int]]) -> bool:
        """Write several (buf, offset) with FUA at once: optional, for devices with native FUA.

        Return True when all of them are on stable storage. Return False, with nothing written,
        where a pwrite with FUA for each is better: then each is written by pwrite. If it raises,
        each is written again by pwrite, so that the client learns which of them failed.
        """
        raise NotImplementedError

    def flush(self, flags: int) -> Awaitable[None] | None:
        """Return when every write that was answered before is on stable storage."""
        raise NotImplementedError

    def trim(self, count: int, offset: int, flags: int) -> Awaitable[None] | None:
        """The client does not need this range any more. Flag: FUA."""
        raise NotImplementedError

    def zero(self, count: int, offset: int, flags: int) -> Awaitable[None] | None:
        """Make the range read as zeros. Flags: MAY_TRIM, FUA, FAST_ZERO.

        Raise OSError(EOPNOTSUPP) to have the server write zeros instead.
        """
        raise NotImplementedError

    def cache(self, count: int, offset: int, flags: int) -> Awaitable[None] | None:
        """Prefetch the range."""
        raise NotImplementedError

    def extents(self, count: int, offset: int, flags: int) -> _Runs:
        """(offset, length, type) in order, without gaps, from `offset` on. Flag: REQ_ONE.

        May be a generator, an asynchronous one, too.
        """
        raise NotImplementedError

    def contexts(self) -> Iterable[str] | Awaitable[Iterable[str]]:
        """Names ("namespace:leaf") of metadata contexts of its own, beside ``base:allocation``.

        A client that selects one gets its answers from `block_status`. Optional; the namespace
        ``base`` is the specification's (NBD protocol, "Metadata querying").
        """
        raise NotImplementedError

    def block_status(self, context: str, count: int, offset: int, flags: int) -> _Runs:
        """What a context of `contexts` says of the range: (offset, length, status) as `extents`.

        The meaning of the status (up to 64 bits) is the context's own; more than 32 bits reach
        only clients with extended headers, others get EOVERFLOW. Flag: REQ_ONE.
        """
        raise NotImplementedError

    def close(self) -> Awaitable[None] | None:
        """The client has gone. Called once, after the last request has ended."""
