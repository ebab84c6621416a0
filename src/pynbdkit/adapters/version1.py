"""API version 1 of scripts: the compatibility promise.

A script that says nothing of its version is version 1, and will be served for good. Nothing is
asked of its author. This file is the whole difference from version 2:

| callback | is called as |
| --- | --- |
| pread | ``pread(h, count, offset)`` returns a bytes-like object of at least `count` bytes |
| pwrite | ``pwrite(h, buf, offset)``, `buf` a read-only memoryview |
| flush | ``flush(h)`` |
| trim | ``trim(h, count, offset)`` |
| zero | ``zero(h, count, offset, may_trim)`` |
| pwrite_fua | ``pwrite_fua(h, buf, offset, fua)`` |
| trim_fua | ``trim_fua(h, count, offset, fua)`` |
| zero_fua | ``zero_fua(h, count, offset, may_trim, fua)`` |

`may_trim` and `fua` are booleans. The last three are the forms of the proposal that introduced FUA:
each replaces the callback without `_fua`, is called with `fua` true when the client set the flag,
and counts as native FUA for its own operation alone. cache and extents, and the questions that
belong to them, do not exist in this version: such functions are the script's own.

The callbacks without `_fua` cannot be told of FUA, which is what `carries_fua = False` says: the
rules of `complete.Layer` then keep it by a flush, or do not offer it.
"""

from __future__ import annotations

from ..complete import exactly
from ..device import Device
from ..flags import Flag
from .callbacks import QUESTIONS, calling, cause, failed, forget, pending, questions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..device import Buffer
    from .callbacks import Functions

    _Callback = Callable[..., Any]

OPERATIONS = ("pread", "pwrite", "flush", "trim", "zero", "pwrite_fua", "trim_fua", "zero_fua")
_QUESTIONS = tuple(name for name in QUESTIONS if name not in ("can_cache", "can_extents"))
CALLBACKS = (*_QUESTIONS, *OPERATIONS, "close")
"""The names of a connection's callbacks in this version, open aside."""


class Version1Device(Device):
    """The device of one connection; has as attributes the callbacks that the script has."""

    carries_fua = False


def device(functions: Functions, handle: Any, where: str) -> Device:
    """A Device over a script's functions and what its `open` returned; `where` is the script."""
    opened = Version1Device()
    have = vars(opened)
    have.update(questions(functions, _QUESTIONS, handle, where))
    for name in (*OPERATIONS, "close"):
        if name in functions:
            have[name] = _BINDERS.get(name, calling)(functions[name], handle)
    return opened


def _pread(call: _Callback, handle: Any) -> _Callback:
    def pread(count: int, offset: int, flags: int = 0) -> Buffer:
        if pending:
            forget()
        try:
            data = call(handle, count, offset)
        except BaseException as failure:
            raise failed(failure) from cause(failure)
        if type(data) is bytes:
            return data  # whether it is long enough is looked at above, as for every plugin
        # A script may return the same bytearray each time, or a view of its disk: copied at
        # once, because replies are sent together when several reads have been done.
        return bytes(exactly(data, count))

    return pread


def _pwrite(call: _Callback, handle: Any) -> _Callback:
    def pwrite(buf: Buffer, offset: int, flags: int = 0) -> None:
        if pending:
            forget()
        try:
            call(handle, memoryview(buf).toreadonly(), offset)
        except BaseException as failure:
            raise failed(failure) from cause(failure)

    return pwrite


def _flush(call: _Callback, handle: Any) -> _Callback:
    flush = calling(call, handle)
    return lambda flags=0: flush()


def _trim(call: _Callback, handle: Any) -> _Callback:
    trim = calling(call, handle)
    return lambda count, offset, flags=0: trim(count, offset)


def _zero(call: _Callback, handle: Any) -> _Callback:
    zero = calling(call, handle)
    return lambda count, offset, flags=0: zero(count, offset, flags & Flag.MAY_TRIM != 0)


def _pwrite_fua(call: _Callback, handle: Any) -> _Callback:
    pwrite_fua = calling(call, handle)
    return lambda buf, offset, fua: pwrite_fua(memoryview(buf).toreadonly(), offset, fua)


_BINDERS = {
    "pread": _pread,
    "pwrite": _pwrite,
    "flush": _flush,
    "trim": _trim,
    "zero": _zero,
    "pwrite_fua": _pwrite_fua,
}
"""What has to be called otherwise than a Device's method; trim_fua, zero_fua and close need not."""
