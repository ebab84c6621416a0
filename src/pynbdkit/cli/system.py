"""What only the system's C libraries can do: memory that stays (--swap), labels of sockets.

ctypes is imported for these two alone, when they are asked for.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

LOCKED_STACK: Final = 1 << 20
"""Bytes of a thread's stack where memory is locked. The usual eight megabytes are address space
that a thread hardly touches; locked, each thread would have them as memory of its own."""
_OTHER_FLAGS: Final = ("alpha", "ppc", "sparc")
"""Machines whose MCL_CURRENT and MCL_FUTURE are not 1 and 2."""
ROOM: Final = 256 << 20
"""Bytes that a server without privileges has to be allowed to lock, or it is not begun."""
_M_ARENA_MAX: Final = -8
LIBSELINUX: Final = "libselinux.so.1"


def has_selinux() -> bool:
    """Whether SELinux's library is installed."""
    import ctypes

    try:
        ctypes.CDLL(LIBSELINUX)
    except OSError:
        return False
    return True


def lock_memory(user: str | None = None) -> None:
    """Keep all of the process's memory in RAM, what it will get as well (mlockall(2)).

    A child does not inherit this, so it is for the process that serves; and privileges are needed,
    so it is for the time before they are dropped. `user`: whom the server will become. Raises
    ConfigError.
    """
    import ctypes
    import resource
    import threading

    limit = resource.RLIM_INFINITY
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    except (OSError, ValueError):  # we may not raise it: perhaps it is high enough
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    hint = "raise the limit: ulimit -l, LimitMEMLOCK="
    if user is not None and limit != resource.RLIM_INFINITY and limit < ROOM:
        # For root there is no limit; for the user even a thread's stack would soon be refused.
        raise ConfigError(f"--swap: {user} may lock {limit >> 10} KiB of memory only ({hint})")
    threading.stack_size(LOCKED_STACK)
    library = ctypes.CDLL(None, use_errno=True)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # else each thread reserves 64 MB, which count as locked
    mlockall = getattr(library, "mlockall", None)
    if mlockall is None:
        raise ConfigError("--swap: this system cannot lock memory (it has no mlockall)")
    flags = 0x2000 | 0x4000 if os.uname().machine.startswith(_OTHER_FLAGS) else 1 | 2
    if mlockall(flags) != 0:
        why = os.strerror(ctypes.get_errno())
        raise ConfigError(f"--swap: cannot lock memory: {why} (start as root, or {hint})")


@contextmanager
def socket_label(label: str) -> Iterator[None]:
    """Sockets that this thread makes meanwhile have this SELinux label. Raises ConfigError."""
    import ctypes

    try:
        library = ctypes.CDLL(LIBSELINUX, use_errno=True)
    except OSError:
        raise ConfigError(
            f"--selinux-label: {LIBSELINUX} is not installed (Debian: libselinux1)"
        ) from None
    if library.setsockcreatecon_raw(os.fsencode(label)) != 0:
        why = os.strerror(ctypes.get_errno())
        hint = "" if library.is_selinux_enabled() == 1 else " (SELinux is not enabled here)"
        raise ConfigError(f"--selinux-label={label}: {why}{hint}")
    try:
        yield
    finally:
        library.setsockcreatecon_raw(None)
