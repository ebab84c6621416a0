"""full: a disk that has no space left; reads as zeros (nbdkit-full-plugin(1))."""

from __future__ import annotations

import errno

from .. import parameters
from ..device import Device
from ..extents import HOLE, ZERO
from ..plugin import Plugin
from ._fixed import FixedDevice
from ._zeros import zeros

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..device import Buffer
    from ..session import Session


class FullPlugin(Plugin):
    """A disk that is always full."""

    name = "full"
    longname = "nbdkit full plugin"
    description = "A disk that is always full: writes fail with ENOSPC"
    blocking = False
    forkable = True

    size = parameters.size("Size of the disk", required=True, magic=True)

    def open(self, session: Session) -> Device:
        """A device without any state."""
        return FullDevice(self.size)


class FullDevice(FixedDevice):
    """Reads are zeros, and whatever would need space fails (zero by way of pwrite)."""

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """Zeros."""
        return zeros(count)

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        """Fail with ENOSPC."""
        raise OSError(errno.ENOSPC, "No space left on device")

    def trim(self, count: int, offset: int, flags: int) -> None:
        """Fail with ENOSPC."""
        raise OSError(errno.ENOSPC, "No space left on device")

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """One hole."""
        return [(offset, count, HOLE | ZERO)]
