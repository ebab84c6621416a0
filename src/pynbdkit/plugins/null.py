"""null: a disk that forgets everything and reads as zeros (nbdkit-null-plugin(1))."""

from __future__ import annotations

from .. import parameters
from ..device import Device
from ..extents import HOLE, ZERO
from ..flags import Fua
from ..plugin import Plugin
from ._fixed import FixedDevice
from ._zeros import zeros

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..device import Buffer
    from ..session import Session


class NullPlugin(Plugin):
    """A disk that discards what is written and reads as zeros."""

    name = "null"
    longname = "nbdkit null plugin"
    description = "A disk that discards all writes and reads as zeros"
    blocking = False
    forkable = True

    size = parameters.size("Size of the disk", default=0, magic=True)

    def open(self, session: Session) -> Device:
        """A device without any state."""
        return NullDevice(self.size)


class NullDevice(FixedDevice):
    """Everything succeeds, nothing happens."""

    def can_fua(self) -> int:
        """Nothing is as stable as nothing."""
        return Fua.NATIVE

    def can_fast_zero(self) -> bool:
        """It is all zeros already."""
        return True

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """Zeros."""
        return zeros(count)

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        """Discard."""

    def flush(self, flags: int) -> None:
        """Nothing to do."""

    def trim(self, count: int, offset: int, flags: int) -> None:
        """Nothing to do."""

    def zero(self, count: int, offset: int, flags: int) -> None:
        """Nothing to do."""

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """One hole."""
        return [(offset, count, HOLE | ZERO)]
