"""fallocate(2), which the `os` module has not: by way of ctypes, loaded when first needed."""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

KEEP_SIZE: Final = 1
PUNCH_HOLE: Final = 2
ZERO_RANGE: Final = 16
"""Modes of fallocate(2)."""

_loaded: list[Callable[[int, int, int, int], int]] = []


def _load() -> Callable[[int, int, int, int], int]:
    """libc's fallocate with 64-bit offsets, as a function that returns an errno (0: done)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    # Where off_t has 32 bits, fallocate64 is the one that takes 64; elsewhere they are the same.
    found = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if found is None:
        return lambda fd, mode, offset, count: errno.EOPNOTSUPP
    found.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    found.restype = ctypes.c_int
    return lambda fd, mode, offset, count: (
        0 if found(fd, mode, offset, count) == 0 else ctypes.get_errno()
    )


def fallocate(fd: int, mode: int, offset: int, count: int) -> None:
    """fallocate(2): `mode` is a sum of the constants above, 0 allocates.

    Raises OSError with the errno of the call; EOPNOTSUPP where the system has no such call.
    """
    if not _loaded:
        _loaded.append(_load())
    while (number := _loaded[0](fd, mode, offset, count)) == errno.EINTR:
        pass
    if number:
        raise OSError(number, os.strerror(number))
