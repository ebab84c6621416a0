"""The functions that a plugin in C imports from its server: `symbols.c`, with Python behind it.

`load()` finds the compiled library, makes its symbols visible to whatever is loaded later, and
hands it the functions below. It is built when the package is built; an installation without a
compiler lacks it, and can do all but load plugins in C.

What a callback does is decided by the thread that it is called in: `session.current()` is the
connection that this thread works for.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import struct
import sys
import threading

from .. import log, parse
from .. import session as sessions
from ..errors import LoadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

_VOID, _TEXT, _ADDRESS = None, ctypes.c_char_p, ctypes.c_void_p
_INT, _INT64, _UNSIGNED = ctypes.c_int, ctypes.c_int64, ctypes.c_uint
_HANDLE, _COUNT, _OFFSET, _FLAGS = _ADDRESS, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32

_PROTOTYPES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "pynbdkit_error": (_INT, [_INT]),
    "pynbdkit_ask": (_INT, [_ADDRESS, _HANDLE]),
    "pynbdkit_get_size": (_INT64, [_ADDRESS, _HANDLE]),
    "pynbdkit_open": (_ADDRESS, [_ADDRESS, _INT]),
    "pynbdkit_is_there": (_VOID, [_INT]),
    "pynbdkit_pread": (_INT, [_ADDRESS, _ADDRESS, _COUNT, _OFFSET]),
    "pynbdkit_pwrite": (_INT, [_ADDRESS, _ADDRESS, _COUNT, _OFFSET]),
    "pynbdkit_flush": (_INT, [_ADDRESS, _HANDLE, _FLAGS]),
    "pynbdkit_range": (_INT, [_ADDRESS, _HANDLE, _COUNT, _OFFSET, _FLAGS]),
    "pynbdkit_extents": (_INT, [_ADDRESS, _HANDLE, _COUNT, _OFFSET, _FLAGS, _ADDRESS]),
    "pynbdkit_block_size": (_INT, [_ADDRESS, _HANDLE, _ADDRESS, _ADDRESS, _ADDRESS]),
    "pynbdkit_extents_list": (_ADDRESS, [_ADDRESS]),
    "pynbdkit_exports_list": (_ADDRESS, [_ADDRESS]),
    "nbdkit_extents_new": (_ADDRESS, [_OFFSET, _OFFSET]),
    "nbdkit_extents_count": (ctypes.c_size_t, [_ADDRESS]),
    "nbdkit_extents_free": (_VOID, [_ADDRESS]),
    "nbdkit_exports_new": (_ADDRESS, []),
    "nbdkit_exports_count": (ctypes.c_size_t, [_ADDRESS]),
    "nbdkit_exports_free": (_VOID, [_ADDRESS]),
}
_SAME: Final = {  # the older forms take the same arguments as the newer ones
    "pynbdkit_pread_1": "pynbdkit_pread",
    "pynbdkit_pwrite_1": "pynbdkit_pwrite",
    "pynbdkit_flush_1": "pynbdkit_flush",
    "pynbdkit_trim_1": "pynbdkit_range",
    "pynbdkit_zero_1": "pynbdkit_range",
}
_KEPT: Final[list[Any]] = []
"""What C points to: it must never go."""
_kept_texts: Final[dict[bytes, bytes]] = {}
_lock = threading.Lock()
_local = threading.local()


class Library:
    """The loaded library: its functions as attributes, by their names in C."""

    def __init__(self, path: str) -> None:
        """Raises LoadError."""
        try:
            self._library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL | os.RTLD_NOW)
        except OSError as error:
            raise LoadError(f"plugins in C cannot be loaded: {error}") from None
        for name, (result, arguments) in _PROTOTYPES.items():
            self._declare(name, result, arguments)
        for name, like in _SAME.items():
            self._declare(name, *_PROTOTYPES[like])
        table = (_ADDRESS * len(_SERVER)).in_dll(self._library, "pynbdkit_server")
        for number, (failure, result, arguments, function) in enumerate(_SERVER):
            callback = ctypes.CFUNCTYPE(result, *arguments)(_guarded(function, failure))
            _KEPT.append(callback)
            table[number] = ctypes.cast(callback, _ADDRESS).value
        # A process that a plugin makes by fork(2) must not wait for Python; ours may call it.
        self.pynbdkit_is_there(1)
        os.register_at_fork(after_in_child=lambda: self.pynbdkit_is_there(1))
        atexit.register(self.pynbdkit_is_there, 0)  # a plugin's threads may outlive us

    def _declare(self, name: str, result: Any, arguments: list[Any]) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise LoadError(
                "plugins in C cannot be loaded: the part of pynbdkit that is written in C is of"
                f" another version, it has no {name}: install pynbdkit again"
            ) from None
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # for type checkers: the functions are set one by one

    def follow_log(self) -> None:
        """Take over whether debug messages are wanted."""
        ctypes.c_int.in_dll(self._library, "pynbdkit_verbose").value = int(log.verbose)

    def error_of_call(self, errno_is_preserved: int) -> int:
        """The errno of this thread's last call into a plugin, 0 if it has not said one."""
        return int(self.pynbdkit_error(errno_is_preserved))


_library: Library | None = None


def load(file: str) -> Library:
    """The library, loaded once. Raises LoadError, which says for which `file` it was wanted."""
    global _library
    with _lock:
        if _library is None:
            path = find()
            if path is None:
                raise LoadError(
                    f"{file}: a plugin in C needs the part of pynbdkit that is written in C, which"
                    " was not built: install a C compiler, then pynbdkit again"
                )
            _library = Library(path)
        _library.follow_log()
        return _library


def find() -> str | None:
    """The path of the compiled library; None where it was not built."""
    from importlib.machinery import EXTENSION_SUFFIXES

    folder = os.path.dirname(os.path.abspath(__file__))
    for suffix in EXTENSION_SUFFIXES:
        path = os.path.join(folder, "_symbols" + suffix)
        if os.path.exists(path):
            return path
    return None


# -- what plugins call ---------------------------------------------------------------------------


def _guarded(function: Callable[..., Any], failure: Any) -> Callable[..., Any]:
    """C knows no exceptions: a ValueError is the caller's mistake, all else is ours."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ValueError as error:
            log.error(str(error))
        except BaseException as error:
            log.exception(function.__name__.strip("_"), error)
        return failure

    return call


def _text(value: bytes | None) -> str:
    if value is None:
        raise ValueError("a plugin gave no string (NULL) where one is needed")
    return os.fsdecode(value)


def _error(text: bytes) -> None:
    log.error(text.decode(errors="replace"))


def _debug(text: bytes) -> None:
    log.debug(text.decode(errors="replace"))


def _parse_size(text: bytes) -> int:
    return parse.parse_size(_text(text))


def _parse_bool(text: bytes) -> int:
    return int(parse.parse_bool(_text(text)))


def _parse_integer(what: bytes, text: bytes, bits: int, is_signed: int, result: int) -> int:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    words = _text(text)
    if not is_signed and words.lstrip().startswith("-"):
        raise ValueError(f"{_text(what)}: {words!r} is negative")  # even zero must not be so
    value = parse.parse_int(_text(what), words, low, high)
    data = value.to_bytes(bits // 8, sys.byteorder, signed=bool(is_signed))
    ctypes.memmove(result, data, len(data))
    return 0


def _parse_probability(what: bytes, text: bytes, result: int) -> int:
    value = parse.parse_probability(_text(what), _text(text))
    ctypes.c_double.from_address(result).value = value
    return 0


def _parse_delay(what: bytes, text: bytes, seconds: int, nanoseconds: int) -> int:
    value = round(parse.parse_delay(_text(what), _text(text)) * 1e9)
    whole, rest = divmod(value, 1_000_000_000)
    ctypes.c_uint.from_address(seconds).value = whole
    ctypes.c_uint.from_address(nanoseconds).value = rest
    return 0


def _read_password(value: bytes) -> int | None:
    return _for_now(parse.read_password(_text(value)))


def _intern(address: int, length: int) -> int | None:
    """A copy of a string, for as long as the connection lasts that this thread works for.

    Outside of any, for as long as the process does. Each is kept once (nbdkit-plugin(3), "STRING
    LIFETIME").
    """
    session = sessions.current()
    kept = _kept_texts if session is None else session.kept
    data = ctypes.string_at(address, length)
    return _address(kept.setdefault(data, data))


def _address(data: bytes) -> int | None:
    """Where the bytes are; a NUL is behind them."""
    return ctypes.cast(ctypes.c_char_p(data), _ADDRESS).value


def _for_now(text: str) -> int | None:
    """A text that lasts until this thread's next: C makes a copy at once."""
    _local.text = os.fsencode(text)
    return _address(_local.text)


def _connection() -> sessions.Session:
    session = sessions.current()
    if session is None:
        raise ValueError("there is no client in this thread to ask about")
    return session


def _text_of_client(which: int) -> int | None:
    session = _connection()
    if which == 0:
        name = os.fsencode(session.export_name)
        return _address(session.kept.setdefault(name, name))
    if which == 1:
        return _for_now(session.peer_tls_dn)
    if which == 2:
        return _for_now(session.peer_tls_issuer_dn)
    label = session.peer_security_context
    if label is None:
        raise ValueError("this client has no security label")
    return _for_now(label)


def _number_of_client(which: int) -> int:
    session = _connection()
    if which == 0:
        return int(session.is_tls)
    number = (None, session.peer_pid, session.peer_uid, session.peer_gid)[which]
    if number is None:
        raise ValueError("a client's process and user are known on Unix sockets only")
    return number


def _peer_name(address: int, length: int) -> int:
    """As getpeername(2): `length` is the room, and then what was needed."""
    session = _connection()
    if session.peer_name is None and session.peer_pid is None:
        raise ValueError("this client has no address: it is on two pipes")
    data = sockaddr(session.peer_name)
    size = ctypes.c_uint32.from_address(length)
    ctypes.memmove(address, data, min(size.value, len(data)))
    size.value = len(data)
    return 0


def sockaddr(name: Any) -> bytes:
    """A socket's address as C has it (sockaddr_in(5), sockaddr_in6, sockaddr_un, sockaddr_vm)."""
    if isinstance(name, tuple) and len(name) == 4:
        host, port, flow, scope = name
        packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        head = struct.pack("=H", socket.AF_INET6) + struct.pack(">HI", port, flow)
        return head + packed + struct.pack("=I", scope)
    if isinstance(name, tuple) and isinstance(name[0], str):
        packed = socket.inet_pton(socket.AF_INET, name[0])
        return struct.pack("=H", socket.AF_INET) + struct.pack(">H", name[1]) + packed + bytes(8)
    if isinstance(name, tuple):
        return struct.pack("=HHIIBxxx", socket.AF_VSOCK, 0, name[1], name[0], 0)
    path = os.fsencode(name) + b"\0" if name else b""
    return struct.pack("=H", socket.AF_UNIX) + path


def _nanosleep(seconds: int, nanoseconds: int) -> int:
    try:
        sessions.sleep(seconds + nanoseconds / 1e9)
    except OSError as error:
        log.debug(str(error))
        return -1
    return 0


def _stdio_safe() -> int:
    return int(not sessions.stdio_is_taken)


def _disconnect(force: int) -> int:
    _connection().disconnect(bool(force))
    return 0


_SERVER: Final[tuple[tuple[Any, Any, list[Any], Callable[..., Any]], ...]] = (
    (None, _VOID, [_TEXT], _error),
    (None, _VOID, [_TEXT], _debug),
    (-1, _INT64, [_TEXT], _parse_size),
    (-1, _INT, [_TEXT], _parse_bool),
    (-1, _INT, [_TEXT, _TEXT, _INT, _INT, _ADDRESS], _parse_integer),
    (-1, _INT, [_TEXT, _TEXT, _ADDRESS], _parse_probability),
    (-1, _INT, [_TEXT, _TEXT, _ADDRESS, _ADDRESS], _parse_delay),
    (None, _ADDRESS, [_TEXT], _read_password),
    (None, _ADDRESS, [_INT], _text_of_client),
    (-1, _INT64, [_INT], _number_of_client),
    (-1, _INT, [_ADDRESS, _ADDRESS], _peer_name),
    (-1, _INT, [_UNSIGNED, _UNSIGNED], _nanosleep),
    (0, _INT, [], _stdio_safe),
    (None, _VOID, [], sessions.shutdown),
    (-1, _INT, [_INT], _disconnect),
    (None, _ADDRESS, [_ADDRESS, ctypes.c_size_t], _intern),
)
"""In the order of `pynbdkit_server` in symbols.c: what is returned on failure, the types of the
result and the arguments, the function."""
