"""The module that scripts get by ``import nbdkit``.

It has everything of nbdkit-python-plugin(3), and the functions that newer versions of it have. The
functions that speak of the client find its connection by the running thread or coroutine, so they
work in the callbacks from `preconnect` to `close`, in the thread that was called. A text that
cannot be parsed raises ValueError, an argument of a wrong type TypeError, a question without an
answer RuntimeError.
"""

from __future__ import annotations

import errno as _errno
from operator import index as _index

from .. import extents as _extents
from .. import log as _log
from .. import parse as _parse
from .. import session as _session
from ..flags import CacheMode as _CacheMode
from ..flags import Flag as _Flag
from ..flags import Fua as _Fua
from ..flags import ThreadModel as _ThreadModel
from .callbacks import set_error as _set_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

THREAD_MODEL_SERIALIZE_CONNECTIONS = _ThreadModel.SERIALIZE_CONNECTIONS
THREAD_MODEL_SERIALIZE_ALL_REQUESTS = _ThreadModel.SERIALIZE_ALL_REQUESTS
THREAD_MODEL_SERIALIZE_REQUESTS = _ThreadModel.SERIALIZE_REQUESTS
THREAD_MODEL_PARALLEL = _ThreadModel.PARALLEL

FLAG_MAY_TRIM = _Flag.MAY_TRIM
FLAG_FUA = _Flag.FUA
FLAG_REQ_ONE = _Flag.REQ_ONE
FLAG_FAST_ZERO = _Flag.FAST_ZERO

FUA_NONE = _Fua.NONE
FUA_EMULATE = _Fua.EMULATE
FUA_NATIVE = _Fua.NATIVE

CACHE_NONE = _CacheMode.NONE
CACHE_EMULATE = _CacheMode.EMULATE
CACHE_NATIVE = _CacheMode.NATIVE

EXTENT_HOLE = _extents.HOLE
EXTENT_ZERO = _extents.ZERO


def set_error(err: int) -> None:
    """Say which errno the exception stands for that this callback is about to raise."""
    _set_error(_index(err))


def debug(msg: str) -> None:
    """Write a line to the log, with --verbose alone."""
    _log.debug(_text(msg))


# -- the connection --------------------------------------------------------------------------------


def _connection() -> _session.Session:
    session = _session.current()
    if session is None:
        raise RuntimeError("no connection in this thread")
    return session


def export_name() -> str:
    """The export name that the client asked for. It may be anything: do not trust it."""
    return _connection().export_name


def is_tls() -> bool:
    """Whether the connection is encrypted."""
    return _connection().is_tls


def peer_name() -> Any:
    """The client's address: a tuple for TCP, a text for a Unix socket."""
    return _connection().peer_name


def _credential(number: int | None) -> int:
    if number is None:
        raise RuntimeError("known for clients on a Unix socket only")
    return number


def peer_pid() -> int:
    """The client's process, on a Unix socket."""
    return _credential(_connection().peer_pid)


def peer_uid() -> int:
    """The client's user, on a Unix socket."""
    return _credential(_connection().peer_uid)


def peer_gid() -> int:
    """The client's group, on a Unix socket."""
    return _credential(_connection().peer_gid)


def peer_tls_dn() -> str:
    """The name in the client's certificate (RFC 4514); "" where none was verified."""
    return _connection().peer_tls_dn


def peer_tls_issuer_dn() -> str:
    """The name of who signed the client's certificate; "" where none was verified."""
    return _connection().peer_tls_issuer_dn


def shutdown() -> None:
    """Ask the server to stop: it finishes what is running first. Works in any thread."""
    _session.shutdown()


def disconnect(force: bool) -> None:
    """End this connection: at once if `force`, else when the running requests are answered."""
    _connection().disconnect(bool(force))


def nanosleep(sec: int, nsec: int) -> None:
    """Sleep, but no longer than the server runs and the client is there (then OSError)."""
    seconds = _index(sec) + _index(nsec) / 1e9
    if seconds < 0:
        raise ValueError(f"cannot sleep for {sec} s and {nsec} ns")
    try:
        _session.sleep(seconds)
    except OSError as error:
        set_error(error.errno or _errno.ESHUTDOWN)
        raise


# -- parsing parameters ----------------------------------------------------------------------------


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a str, not {type(value).__name__}")
    return value


def parse_size(str: str) -> int:
    """A size in bytes from a text such as "100M"."""
    return _parse.parse_size(_text(str))


def parse_bool(str: str) -> bool:
    """A boolean from a text such as "yes" or "off"."""
    return _parse.parse_bool(_text(str))


def parse_probability(what: str, str: str) -> float:
    """A probability from a text such as "10%", "1:10" or "0.1"; `what` is for the error."""
    return _parse.parse_probability(what, _text(str))


def parse_delay(what: str, str: str) -> tuple[int, int]:
    """A time from a text such as "3" or "100ms", as (seconds, nanoseconds) for `nanosleep`."""
    return divmod(round(_parse.parse_delay(what, _text(str)) * 1e9), 1_000_000_000)


def read_password(value: str) -> str:
    """A password: the text itself, "-" (asked), "+FILE" or "-FD"."""
    return _parse.read_password(_text(value))


def _integer(low: int, high: int) -> Callable[[str, str], int]:
    def parse_integer(what: str, str: str) -> int:
        """An integer (decimal, 0x… or 0…) within its type's range; `what` is for the error."""
        return _parse.parse_int(what, _text(str), low, high)

    return parse_integer


def _signed(bits: int) -> Callable[[str, str], int]:
    return _integer(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _unsigned(bits: int) -> Callable[[str, str], int]:
    return _integer(0, (1 << bits) - 1)


parse_int = _signed(32)
parse_unsigned = _unsigned(32)
parse_int8_t = _signed(8)
parse_int16_t = _signed(16)
parse_int32_t = _signed(32)
parse_int64_t = _signed(64)
parse_uint8_t = _unsigned(8)
parse_uint16_t = _unsigned(16)
parse_uint32_t = _unsigned(32)
parse_uint64_t = _unsigned(64)
