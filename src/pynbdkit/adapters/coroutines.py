"""Scripts of version 2 whose functions are `async def`: the async forms of `callbacks`, `version2`.

All operations of such a script run on the event loop, also those that are plain functions. What
`nbdkit.set_error` is told belongs to one call, however many of them are in flight: it waits in the
call's own context, not by thread.
"""

from __future__ import annotations

from contextvars import ContextVar

from ..device import is_awaitable
from . import callbacks
from .callbacks import as_extents, cause, failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..device import Buffer

_told: ContextVar[list[int] | None] = ContextVar("set_error", default=None)
callbacks.find_told = _told.get


def calling(call: Callable[..., Any], *bound: Any) -> Callable[..., Any]:
    """As `callbacks.calling`; what comes out is to be awaited."""

    async def called(*arguments: Any) -> Any:
        told: list[int] = []
        _told.set(told)
        try:
            answer = call(*bound, *arguments)
            if is_awaitable(answer):
                answer = await answer
            return answer
        except BaseException as failure:
            raise failed(failure, told[-1] if told else 0) from cause(failure)
        finally:
            _told.set(None)

    return called


def pread(call: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    """The script fills a buffer, which is sent."""
    fill = calling(call, handle)

    async def pread(count: int, offset: int, flags: int = 0) -> Buffer:
        buf = bytearray(count)
        await fill(memoryview(buf), offset, flags)
        return buf

    return pread


def pwrite(call: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    """The script gets a view that it cannot write to."""
    write = calling(call, handle)

    async def pwrite(buf: Buffer, offset: int, flags: int = 0) -> None:
        await write(memoryview(buf).toreadonly(), offset, flags)

    return pwrite


def extents(call: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    """The script answers with a list, or is a generator of either kind."""

    async def as_list(count: int, offset: int, flags: int) -> Any:
        answer = call(handle, count, offset, flags)
        if is_awaitable(answer):
            answer = await answer
        if not hasattr(answer, "__aiter__"):
            return list(answer) if hasattr(answer, "__iter__") else answer
        found = []
        async for run in answer:
            found.append(run)
            if run[0] + run[1] >= offset + count:
                break
        return found

    ask = calling(as_list)

    async def extents(count: int, offset: int, flags: int = 0) -> list[tuple[int, int, int]]:
        return as_extents(await ask(count, offset, flags))

    return extents


BINDERS = {"pread": pread, "pwrite": pwrite, "extents": extents}
