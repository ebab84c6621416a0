"""nozero: hide, emulate or curb writing of zeros (nbdkit-nozero-filter(1)).

zeromode says what becomes of a zero request: not offered, written as zeros with pwrite, handed down
without MAY_TRIM, or handed down as it is. fastzeromode says what becomes of the FAST_ZERO flag:
hidden, offered and always refused, offered and ignored, or left to the layer below.
"""

from __future__ import annotations

import errno

from .. import parameters
from ..complete import write_zeros
from ..errors import OpenError
from ..filter import Filter, FilterDevice
from ..flags import Flag, Fua, ZeroMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..complete import Layer
    from ..device import Device
    from ..session import Session

ZERO_MODES = ("none", "emulate", "notrim", "plugin")
FAST_ZERO_MODES = ("default", "none", "slow", "ignore")


class NoZeroFilter(Filter):
    """Disable or curb efficient zeroing."""

    longname = "nozero filter"
    forkable = True
    zeromode = parameters.enum("What to make of zero requests", ZERO_MODES, default="none")
    fastzeromode = parameters.enum(
        "What to make of fast zero requests", FAST_ZERO_MODES, default="default"
    )

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Raises OpenError where zeromode wants a zero that the layer below does not have."""
        below = next(session)
        if self.zeromode == "none":
            return _NoZero(below)
        if self.zeromode != "emulate" and below.can_write() and below.can_zero() != ZeroMode.NATIVE:
            raise OpenError(
                f"zeromode={self.zeromode}: the plugin has no zero of its own (use emulate or none)"
            )
        return _Curbed(below, self.zeromode, self.fastzeromode)


class _NoZero(FilterDevice):
    def can_zero(self) -> int:
        return ZeroMode.NONE


class _Curbed(FilterDevice):
    def __init__(self, next: Layer, zeromode: str, fastzeromode: str) -> None:
        super().__init__(next)
        self._emulate = zeromode == "emulate"
        self._keep = ~Flag.MAY_TRIM if zeromode == "notrim" else ~0
        if fastzeromode == "default" and self._emulate:
            fastzeromode = "slow"
        self._fast = fastzeromode
        if fastzeromode == "ignore":
            self._keep &= ~Flag.FAST_ZERO

    def can_zero(self) -> int:
        return ZeroMode.NATIVE

    def can_fast_zero(self) -> bool:
        if self._fast == "default":
            return self.next.can_fast_zero()
        return self._fast != "none"

    def zero(self, count: int, offset: int, flags: int) -> None:
        if flags & Flag.FAST_ZERO and self._fast == "slow":
            raise OSError(errno.EOPNOTSUPP, "nozero refuses fast zeroes")
        flags &= self._keep
        if self._emulate:
            next = self.next
            native = next.can_fua() == Fua.NATIVE
            write_zeros(next.pwrite, next.flush, count, offset, flags & Flag.FUA, native)
        else:
            self.next.zero(count, offset, flags)
