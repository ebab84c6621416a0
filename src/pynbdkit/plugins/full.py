"""full: a disk that has no space left; reads as zeros (nbdkit-full-plugin(1))."""

from __future__ import annotations

import errno

from .. import parameters
from ..device import Device
from ..extents import HOLE, ZERO
from ..flags import CacheMode
from ..plugin import Plugin
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

    size = parameters.size("Size of the disk", required=True, magic=True)

    def open(self, session: Session) -> Device:
        """A device without any state."""
        return FullDevice(self.size)


class FullDevice(Device):
    """Reads are zeros, and whatever would need space fails (zero by way of pwrite)."""

    def __init__(self, size: int) -> None:
        self._size = size

    def get_size(self) -> int:
        """As configured."""
        return self._size

    def can_multi_conn(self) -> bool:
        """All connections see the same zeros."""
        return True

    def can_cache(self) -> int:
        """There is nothing to prefetch."""
        return CacheMode.NATIVE

    def cache(self, count: int, offset: int, flags: int) -> None:
        """Nothing to do."""

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
