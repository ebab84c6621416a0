"""Messages to the operator: errors always, debug messages when verbose. One line each.

They go to stderr, to the system log, or nowhere (`--log`). The form is the peer's:
``pynbdkit: memory: error: …``; a thread that serves a connection has its plugin's name set.
"""

from __future__ import annotations

import sys
import threading

from .errors import PynbdkitError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

verbose = False
program = "pynbdkit"
flags: dict[str, int] = {}
"""Debug flags by name (-D NAME.FLAG=N)."""
find_name: Callable[[], str] | None = None
"""Finds what the running coroutine's messages are about (`loop.py` sets it)."""
_local = threading.local()
_lock = threading.Lock()
_seen: set[object] = set()
_HOME = __file__.removesuffix("log.py")


def _to_stderr(text: str) -> None:
    stream = sys.stderr
    if stream is not None:
        with _lock:
            try:
                stream.write(text + "\n")
                stream.flush()
            except (OSError, ValueError):
                pass  # nobody is left to tell


_sink: Callable[[str], None] = _to_stderr


def _to_syslog(text: str) -> None:
    import syslog

    syslog.syslog(syslog.LOG_ERR, text.removeprefix(f"{program}: "))


def use(destination: str) -> None:
    """Send messages to "stderr", "syslog" or "null"."""
    global _sink
    if destination == "syslog":
        import syslog

        syslog.openlog(program, syslog.LOG_PID)
        _sink = _to_syslog
    elif destination == "null":
        _sink = lambda text: None  # noqa: E731
    else:
        _sink = _to_stderr


def set_name(name: str) -> None:
    """What this thread's messages are about ("memory[3]"); "" for the server itself."""
    _local.name = name


def name() -> str:
    """What the messages of the running thread or coroutine are about; "": the server itself."""
    found: str = getattr(_local, "name", "")
    return found or (find_name() if find_name is not None else "")


def _prefix() -> str:
    found = name()
    return f"{program}: {found}: " if found else f"{program}: "


def error(message: str) -> None:
    """An error: always shown."""
    _sink(f"{_prefix()}error: {_one_line(message)}")


def warning(message: str) -> None:
    """Something that the operator should mend, though the server goes on."""
    _sink(f"{_prefix()}warning: {_one_line(message)}")


def debug(message: str) -> None:
    """A debug message: shown with --verbose, on stderr and nowhere else (nbdkit-service(1))."""
    if verbose:
        _to_stderr(f"{_prefix()}debug: {_one_line(message)}")


def _one_line(message: str) -> str:
    """A message may quote what a client sent: nothing in it may end the line or move the cursor."""
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def exception(message: str, failure: BaseException) -> None:
    """An error in a plugin's callback: one line, and the traceback the first time it happens.

    The same failure at the same place is shown once: a disk that fails every request must not
    fill the log.
    """
    error(f"{message}: {describe(failure)}")
    place = failure.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return
    file = place.tb_frame.f_code.co_filename
    ours = isinstance(failure, OSError) and _is_ours(file)
    if (ours or isinstance(failure, PynbdkitError)) and not verbose:
        return  # raised on purpose: the line says it all
    key = (type(failure), file, place.tb_lineno)
    if key in _seen and not verbose:
        return
    if len(_seen) < 1000:
        _seen.add(key)
    import traceback

    first = failure.__traceback__
    while not verbose and first and first.tb_next and _is_ours(first.tb_frame.f_code.co_filename):
        first = first.tb_next  # how we got to the plugin is no news
    for line in "".join(traceback.format_exception(type(failure), failure, first)).splitlines():
        _sink(f"{_prefix()}{line}")


def _is_ours(file: str) -> bool:
    return file.startswith(_HOME)


def describe(failure: BaseException) -> str:
    """An exception in a few words."""
    if isinstance(failure, OSError) and isinstance(failure.strerror, str) and failure.strerror:
        where = f": {failure.filename}" if failure.filename else ""
        return f"{failure.strerror}{where}"
    text = text_of(failure)
    if isinstance(failure, PynbdkitError) and text:
        return text
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__


def text_of(failure: BaseException) -> str:
    """str() of an exception; "" where that raises one itself (somebody's own class, not ours)."""
    try:
        return str(failure)
    except BaseException:
        return ""
