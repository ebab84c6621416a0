"""Calling a script's functions: what both API versions share.

The rules are nbdkit-python-plugin(3)'s ("Exceptions") and the contract's ("Errors"): a callback
that raises has failed. The client gets the errno that the script gave to `nbdkit.set_error` in this
call, EIO where it gave none (whatever the exception is, so that an OSError of some library never
passes for the disk's answer). The log gets the exception, with the script's own traceback.

A callback is called from a closure that binds the connection's handle. What `set_error` was told
waits in `pending`, by thread; that it is nearly always empty makes looking cheap. Callbacks that
are `async def` have their own forms, in `coroutines.py`.
"""

from __future__ import annotations

import errno
from _thread import get_ident
from operator import index

from .. import log
from ..device import is_async, then

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    Functions = Mapping[str, Callable[..., Any]]

pending: dict[int, int] = {}
"""What `nbdkit.set_error` was told, by thread, until the callback that runs there ends."""

find_told: Callable[[], list[int] | None] = lambda: None  # noqa: E731
"""Finds where a running coroutine's set_error puts it (`coroutines.py` sets this)."""


def set_error(number: int) -> None:
    """The errno of the exception that the running callback is about to raise."""
    told = find_told()
    if told is not None:
        told.append(number)
    else:
        pending[get_ident()] = number


def forget() -> None:
    """A new call begins: what an earlier one gave to set_error does not count."""
    pending.pop(get_ident(), None)


def as_extents(answer: Any) -> list[tuple[int, int, int]]:
    """What a script's extents returned, as tuples of integers. Raises OSError(EIO)."""
    try:
        return [(index(start), index(length), index(kind)) for start, length, kind in answer]
    except (TypeError, ValueError):
        raise OSError(
            errno.EIO, f"extents returned {answer!r:.100}, not a list of (offset, length, type)"
        ) from None


def failed(failure: BaseException, told: int | None = None) -> BaseException:
    """What to raise for an exception that a callback raised: ``raise failed(x) from cause(x)``.

    `told`: what a coroutine gave to set_error (0: nothing); None: it is not one. The traceback
    begins with the script's frames. An exception that says nothing of an errno, and means EIO by
    itself, is returned as it is.
    """
    number = pending.pop(get_ident(), 0) if told is None else told
    traceback = failure.__traceback__
    script_frames = traceback.tb_next if traceback is not None else None
    if isinstance(failure, KeyboardInterrupt):
        return failure
    means_eio = isinstance(failure, Exception) and not isinstance(failure, (OSError, MemoryError))
    if number or not means_eio:
        why = f" (set_error: {errno.errorcode.get(number, number)})" if number else ""
        error = OSError(number or errno.EIO, f"{_words(failure)}{why}")
        return error.with_traceback(script_frames)
    return failure.with_traceback(script_frames)


def _words(failure: BaseException) -> str:
    """An exception as the last line of its traceback has it."""
    text = log.text_of(failure)
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__


def cause(failure: BaseException) -> BaseException | None:
    """The exception that led to this one, as a traceback shows it."""
    if failure.__cause__ is not None or failure.__suppress_context__:
        return failure.__cause__
    return failure.__context__


def calling(call: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    """A closure that calls a callback with the connection's handle and what it is given itself."""
    if is_async(call):
        from . import coroutines

        return coroutines.calling(call, handle)

    def called(*arguments: Any) -> Any:
        if pending:
            forget()
        try:
            return call(handle, *arguments)
        except BaseException as failure:
            raise failed(failure) from cause(failure)

    return called


TRUTHS = (
    "can_write",
    "can_flush",
    "can_trim",
    "can_zero",
    "can_fast_zero",
    "can_extents",
    "can_multi_conn",
    "is_rotational",
)
QUESTIONS = ("get_size", "block_size", "export_description", "can_fua", "can_cache", *TRUTHS)


def questions(
    functions: Functions, names: Iterable[str], handle: Any, where: str
) -> dict[str, Any]:
    """Closures for those of the capability questions `names` that the script has, by name."""
    bound = {}
    for name in names:
        if name in functions:
            ask = calling(functions[name], handle)
            check = _truth if name in TRUTHS else _CHECKS.get(name)
            bound[name] = _checked(ask, check, f"{where}: {name}") if check else ask
    return bound


def _checked(
    ask: Callable[[], Any], check: Callable[[Any, str], Any], where: str
) -> Callable[[], Any]:
    return lambda: then(ask(), lambda answer: check(answer, where))


def _truth(answer: Any, where: str) -> bool:
    """True and False, 1 and 0. Anything else is a mistake, and means no (as in the peer)."""
    if isinstance(answer, int) and answer in (0, 1):
        return answer == 1
    log.warning(f"{where} returned {answer!r}, which is neither True nor False: taken as False")
    return False


def _size(answer: Any, where: str) -> Any:
    """Other kinds of integers (numpy's) are integers, too; the layer above refuses the rest."""
    if type(answer) is not bool and hasattr(answer, "__index__"):
        return answer.__index__()
    return answer


def _text(answer: Any, where: str) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    log.warning(f"{where} returned {answer!r}, which is not a text: left out")
    return None


_CHECKS: dict[str, Callable[[Any, str], Any]] = {"get_size": _size, "export_description": _text}
