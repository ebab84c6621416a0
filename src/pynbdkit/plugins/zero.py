"""zero: a disk of no bytes at all, read-only (nbdkit-zero-plugin(1))."""

from __future__ import annotations

import errno

from ..device import Device
from ..errors import ConfigError
from ..flags import CacheMode
from ..plugin import Plugin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..device import Buffer
    from ..session import Session


class ZeroPlugin(Plugin):
    """A disk whose length is zero."""

    name = "zero"
    longname = "nbdkit zero-length plugin"
    description = "A disk of zero bytes, to test the corners of clients"
    blocking = False

    def config(self, key: str, value: str) -> None:
        """There is nothing to say about it. Raises ConfigError."""
        raise ConfigError(
            "zero: this plugin does not need command line configuration"
            " (a disk that reads as zeros is: null SIZE)"
        )

    def open(self, session: Session) -> Device:
        """A device without any state."""
        return ZeroDevice()


class ZeroDevice(Device):
    """Nothing to read, and no way to write."""

    def get_size(self) -> int:
        """No bytes."""
        return 0

    def can_multi_conn(self) -> bool:
        """All connections see the same nothing."""
        return True

    def can_cache(self) -> int:
        """There is nothing to prefetch."""
        return CacheMode.NATIVE

    def cache(self, count: int, offset: int, flags: int) -> None:
        """Nothing to do."""

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """Out of bounds, whatever it is; only a read of no bytes has an answer."""
        if count:
            raise OSError(errno.EIO, "read of a disk that has no bytes")
        return b""
