"""Errors that cross a border: to the operator (one line) and to the client (an errno).

The protocol knows eight error numbers; `nbd_errno` says which of them stands for an errno
(plugin-contract.md, "Errors"; NBD protocol, "Error values").
"""

from __future__ import annotations

import errno as _errno


class PynbdkitError(Exception):
    """A mistake that the operator or a plugin's author can mend; its text is the whole message."""


class ConfigError(PynbdkitError):
    """A wrong, missing or unknown parameter or option."""


class LoadError(PynbdkitError):
    """A plugin or filter that cannot be found or loaded."""


class OpenError(PynbdkitError):
    """A device that must not be served as it is; the client's open fails, the server goes on."""


_NBD: dict[int, int] = {
    _errno.EPERM: 1,
    _errno.EROFS: 1,
    _errno.EIO: 5,
    _errno.ENOMEM: 12,
    _errno.EINVAL: 22,
    _errno.ENOSPC: 28,
    _errno.EFBIG: 28,
    _errno.EDQUOT: 28,
    _errno.EOVERFLOW: 75,
    _errno.ENOTSUP: 95,
    _errno.EOPNOTSUPP: 95,
    _errno.ESHUTDOWN: 108,
}


def nbd_errno(number: int | None) -> int:
    """The protocol's error number for an errno: EIO where nothing fits."""
    return _NBD.get(number or _errno.EIO, _errno.EIO)


def errno_of(failure: BaseException) -> int | None:
    """The errno that an exception stands for; None where it says nothing."""
    if isinstance(failure, MemoryError):
        return _errno.ENOMEM
    return failure.errno if isinstance(failure, OSError) else None
