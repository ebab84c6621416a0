"""API version 2 of scripts: what each callback is called with, and what its answer means.

| callback | is called as |
| --- | --- |
| pread | ``pread(h, buf, offset, flags)`` fills `buf`, a writable memoryview; flags are 0 |
| pwrite | ``pwrite(h, buf, offset, flags)``, `buf` a read-only memoryview; flags: FUA |
| flush | ``flush(h, flags)``; flags are 0 |
| trim | ``trim(h, count, offset, flags)``; flags: FUA |
| zero | ``zero(h, count, offset, flags)``; flags: MAY_TRIM, FUA, FAST_ZERO |
| cache | ``cache(h, count, offset, flags)``; flags are 0 |
| extents | ``extents(h, count, offset, flags)`` returns (offset, length, type)s; flags: REQ_ONE |

What the others return is ignored. The draft's `_fua` callbacks do not exist in this version.
The flags are those of a native `Device`, so they are passed on as they are.

Where one of these is `async def`, all of them run on the event loop (`coroutines.py`).
"""

from __future__ import annotations

from ..device import Device, is_async
from .callbacks import QUESTIONS, as_extents, calling, cause, failed, forget, pending, questions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..device import Buffer
    from .callbacks import Functions

OPERATIONS = ("pread", "pwrite", "flush", "trim", "zero", "cache", "extents")
CALLBACKS = (*QUESTIONS, *OPERATIONS, "close")
"""The names of a connection's callbacks in this version, open aside."""


class Version2Device(Device):
    """The device of one connection; has as attributes the callbacks that the script has."""


def device(functions: Functions, handle: Any, where: str) -> Device:
    """A Device over a script's functions and what its `open` returned; `where` is the script."""
    opened = Version2Device()
    have = vars(opened)
    have.update(questions(functions, QUESTIONS, handle, where))
    there = [name for name in OPERATIONS if name in functions]
    binders: dict[str, Callable[..., Any]] = _BINDERS
    other: Callable[..., Any] = calling
    if any(is_async(functions[name]) for name in there):
        from . import coroutines

        opened.asynchronous = True
        binders, other = coroutines.BINDERS, coroutines.calling
    for name in there:
        have[name] = binders.get(name, other)(functions[name], handle)
    if "close" in functions:
        have["close"] = calling(functions["close"], handle)
    return opened


def _pread(call: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    def pread(count: int, offset: int, flags: int = 0) -> Buffer:
        if pending:
            forget()
        # New for each request, so it is sent without a copy. The script gets a view: a slice of
        # it writes through, and a value of another size is refused instead of resizing the data.
        buf = bytearray(count)
        try:
            call(handle, memoryview(buf), offset, flags)
        except BaseException as failure:
            raise failed(failure) from cause(failure)
        return buf

    return pread


def _pwrite(call: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    def pwrite(buf: Buffer, offset: int, flags: int = 0) -> None:
        if pending:
            forget()
        try:
            call(handle, memoryview(buf).toreadonly(), offset, flags)
        except BaseException as failure:
            raise failed(failure) from cause(failure)

    return pwrite


def _extents(call: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    def as_list(*arguments: Any) -> Any:
        answer = call(*arguments)
        # A generator runs the script's code: in here, where its exceptions are known for that.
        return list(answer) if hasattr(answer, "__iter__") else answer

    ask = calling(as_list, handle)

    def extents(count: int, offset: int, flags: int = 0) -> list[tuple[int, int, int]]:
        return as_extents(ask(count, offset, flags))

    return extents


_BINDERS = {"pread": _pread, "pwrite": _pwrite, "extents": _extents}
