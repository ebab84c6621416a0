"""zero: a disk of no bytes at all, read-only (nbdkit-zero-plugin(1))."""

from __future__ import annotations

import errno

from ..device import Device
from ..errors import ConfigError
from ..plugin import Plugin
from ._fixed import FixedDevice

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
    forkable = True

    def config(self, key: str, value: str) -> None:
        """There is nothing to say about it. Raises ConfigError."""
        raise ConfigError(
            "zero: this plugin does not need command line configuration"
            " (a disk that reads as zeros is: null SIZE)"
        )

    def open(self, session: Session) -> Device:
        """A device without any state."""
        return ZeroDevice(0)


class ZeroDevice(FixedDevice):
    """Nothing to read, and no way to write."""

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """Out of bounds, whatever it is; only a read of no bytes has an answer."""
        if count:
            raise OSError(errno.EIO, "read of a disk that has no bytes")
        return b""
