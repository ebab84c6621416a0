"""AsyncLayer: the Layer of a device whose operations are coroutines; the rules in their async form.

What a device can do, and how each operation keeps FUA, is decided by the same code as for any other
device (`complete.py`). Here is only how it is then done: each closure that applies a rule there has
its twin here, which awaits. So every operation exists twice:

- `coroutine(name)` is the asynchronous one, to be awaited on the event loop;
- the attribute of a Layer (`layer.pread` …) is a function that runs it there and waits. It is for
  whoever is not asynchronous: filters that change the operation, serialized thread models.

`coroutines` finds what a whole chain leaves asynchronous: the operations that every filter leaves
alone are the device's own, straight away.
"""

from __future__ import annotations

import errno

from .complete import (
    MAX_EXTENTS,
    MAX_STATUS,
    ZERO_PIECE,
    Layer,
    WriteBinder,
    exactly,
    read_only,
    zero_bytes,
)
from .device import OPERATIONS, is_async, is_awaitable
from .extents import Extent, normalise
from .flags import CacheMode, Flag, Fua

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, Final

    from .device import Buffer, Device
    from .loop import EventLoop
    from .session import Session

    _Async = Callable[..., Coroutine[Any, Any, Any]]

ASKED: Final = ("pread", "pwrite", "flush", "trim", "zero", "cache", "extents", "block_status")
"""The operations of a Layer."""


def coroutines(layer: Layer) -> dict[str, _Async]:
    """The operations of the outermost layer that need no thread, by name.

    Those are a device's own, below filters that all leave them alone.
    """
    found = {}
    for name in ASKED:
        below: Layer = layer
        while below.next is not None and getattr(below, name) is getattr(below.next, name):
            below = below.next
        if isinstance(below, AsyncLayer):
            found[name] = below.coroutine(name)
    return found


class AsyncLayer(Layer):
    """A plugin's device with every gap filled, as `Layer`."""

    def __init__(self, device: Device, session: Session, where: str, loop: EventLoop) -> None:
        super().__init__(device, session, where, None, loop.wait)
        self.loop = loop
        self._coroutines: dict[str, _Async] = {}

    @property
    def asynchronous(self) -> bool:
        """It is."""
        return True

    def may_block(self) -> bool:
        """Whoever calls the functions of this layer waits for the loop."""
        return True

    def pwrite_group(self) -> None:
        """Nothing like it: writes are in flight together anyway."""
        return

    def own(self, name: str) -> Callable[..., Any] | None:
        """As in every layer; an operation comes as something to await."""
        method = super().own(name)
        if method is None or name not in OPERATIONS or is_async(method):
            return method
        return _async_form(method)

    def coroutine(self, name: str) -> _Async:
        """An operation, to be awaited on the event loop. pread's answer is not checked."""
        getattr(self, name)  # binds it
        return self._coroutines[name]

    def _waiting(self, name: str, operation: _Async) -> Callable[..., Any]:
        """Keep the operation; returns the function that runs it and waits."""
        self._coroutines[name] = operation
        wait = self.loop.wait
        return lambda *arguments: wait(operation(*arguments))

    def _bind_reads(self) -> None:
        pread = self.own("pread")
        if pread is None:
            super()._bind_reads()  # says what is wrong
            return
        waiting = self.unchecked_pread = self._waiting("pread", pread)

        def checked(count: int, offset: int, flags: int = 0) -> Buffer:
            return exactly(waiting(count, offset, flags), count)

        self.pread = checked

    def _bind_flush(self) -> Callable[[int], None]:
        return self._waiting("flush", self.own("flush") or _async_form(super()._bind_flush()))

    def _bind_cache(self) -> Callable[[int, int, int], None]:
        own = self.own("cache")
        mode = self.can_cache()
        if mode == CacheMode.NATIVE and own is not None:
            return self._waiting("cache", own)
        pread = self.coroutine("pread")

        async def cache(count: int, offset: int, flags: int = 0) -> None:
            if mode == CacheMode.EMULATE:
                while count > 0:
                    piece = min(count, ZERO_PIECE)
                    exactly(await pread(piece, offset, 0), piece)
                    offset += piece
                    count -= piece
                    if count:
                        self.session.check()

        return self._waiting("cache", cache)

    def _bind_extents(self) -> Callable[[int, int, int], list[Extent]]:
        own = super().own("extents")

        async def extents(count: int, offset: int, flags: int = 0) -> list[Extent]:
            if own is None or not self.can_extents():
                return [Extent(offset, count, 0)]
            answer = await _runs(own(count, offset, flags), offset + count)
            try:
                return normalise(answer, count, offset, 1 if flags & Flag.REQ_ONE else MAX_EXTENTS)
            except (ValueError, TypeError) as error:
                raise OSError(errno.EIO, f"extents: {error}") from None

        return self._waiting("extents", extents)

    def _bind_block_status(self) -> Callable[[str, int, int, int], list[Extent]]:
        own = super().own("block_status")

        async def block_status(
            context: str, count: int, offset: int, flags: int = 0
        ) -> list[Extent]:
            if own is None:
                raise OSError(errno.EIO, f"{self.where}: contexts, but no block_status")
            answer = await _runs(own(context, count, offset, flags), offset + count)
            limit = 1 if flags & Flag.REQ_ONE else MAX_EXTENTS
            try:
                return normalise(answer, count, offset, limit, MAX_STATUS)
            except (ValueError, TypeError) as error:
                raise OSError(errno.EIO, f"block_status of {context}: {error}") from None

        return self._waiting("block_status", block_status)

    def _bind_writes(self) -> None:
        if "can_fua" in self._answers:
            return
        super()._bind_writes()
        for name in ("pwrite", "trim", "zero"):
            operation = self.__dict__[name]
            if operation is read_only:  # stays what it is, so that filters leave it alone
                self._coroutines[name] = _async_form(operation)
            else:
                self.__dict__[name] = self._waiting(name, _async_form(operation))

    def _write_binder(self, mode: Any, carries: bool) -> WriteBinder:
        return _AsyncWriteBinder(self, mode, carries)


def _async_form(function: Callable[..., Any]) -> _Async:
    """A function as something to await, whatever it is."""
    if is_async(function):
        return function

    async def call(*arguments: Any) -> Any:
        answer = function(*arguments)
        return await answer if is_awaitable(answer) else answer

    return call


async def _runs(answer: Any, end: int) -> Any:
    """What extents or block_status returned, as something to iterate over.

    An asynchronous generator is asked until it has come to the end of the range.
    """
    if is_awaitable(answer):
        answer = await answer
    if not hasattr(answer, "__aiter__"):
        return answer
    found = []
    async for run in answer:
        found.append(run)
        if run[0] + run[1] >= end:
            break
    return found


async def write_zeros(
    pwrite: _Async,
    flush: _Async | None,
    count: int,
    offset: int,
    fua: int,
    each_piece: bool,
    session: Session,
) -> None:
    """As `complete.write_zeros`."""
    each = fua if each_piece else 0
    while count > 0:
        piece = min(count, ZERO_PIECE)
        await pwrite(zero_bytes(piece), offset, each)
        offset += piece
        count -= piece
        if count:
            session.check()
    if fua and not each and flush is not None:
        await flush(0)


class _AsyncWriteBinder(WriteBinder):
    """The same table of FUA; its closures await. There is no layer below."""

    def _pwrite(self, mode: int) -> Any:
        plain, form, flush = self.pwrite, self.pwrite_fua, self.flush
        base: Any = plain
        if form is not None:
            native = mode == Fua.NATIVE

            async def by_form(buf: Buffer, offset: int, flags: int = 0) -> None:
                await form(buf, offset, native and bool(flags & 2))

            base = by_form
        if mode != Fua.EMULATE or flush is None:
            return base
        awaited_flush: Any = flush

        async def emulated(buf: Buffer, offset: int, flags: int = 0) -> None:
            await base(buf, offset, flags & ~2)
            if flags & 2:
                await awaited_flush(0)

        return emulated

    def _trim(self, mode: int) -> Any:
        plain, form, flush = self.trim, self.trim_fua, self.flush
        base: Any = plain
        if form is not None:
            native = mode == Fua.NATIVE

            async def by_form(count: int, offset: int, flags: int = 0) -> None:
                await form(count, offset, native and bool(flags & 2))

            base = by_form
        if base is None or mode != Fua.EMULATE or flush is None:
            return base or super()._trim(mode)
        awaited_flush: Any = flush

        async def emulated(count: int, offset: int, flags: int = 0) -> None:
            await base(count, offset, flags & ~2)
            if flags & 2:
                await awaited_flush(0)

        return emulated

    def _zero(self, mode: int, pwrite_mode: int, pwrite: Any) -> Any:
        plain, form = self.zero, self.zero_fua
        flush: Any = self.flush
        session = self.layer.session
        each_piece = pwrite_mode == Fua.NATIVE

        async def by_pwrite(count: int, offset: int, flags: int = 0) -> None:
            if flags & Flag.FAST_ZERO:
                raise OSError(errno.EOPNOTSUPP, "zero would be no faster than writing")
            await write_zeros(pwrite, flush, count, offset, flags & 2, each_piece, session)

        native: Any = plain
        if form is not None:

            async def with_flag(count: int, offset: int, flags: int) -> None:
                await form(count, offset, bool(flags & Flag.MAY_TRIM), bool(flags & 2))

            native = with_flag
        elif plain is None:
            return by_pwrite

        async def zero(count: int, offset: int, flags: int = 0) -> None:
            fua = flags & 2
            if fua and mode == Fua.NONE:
                await by_pwrite(count, offset, flags)  # pwrite_fua is the only way to keep it
                return
            try:
                await native(count, offset, flags if mode == Fua.NATIVE else flags & ~2)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP) or flags & Flag.FAST_ZERO:
                    raise
                fell_back = True
            else:
                fell_back = False
            if fell_back:
                await by_pwrite(count, offset, flags)
            elif fua and mode == Fua.EMULATE:
                await flush(0)

        return zero
