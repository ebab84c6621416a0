"""fua: change how flush and Forced Unit Access (FUA) look to the client (nbdkit-fua-filter(1)).

A mode is a FilterDevice that answers can_fua for itself; the Layer around it keeps the answer's
promise (`complete.py`): NONE drops the offer, EMULATE puts a flush behind each write, NATIVE hands
the flag down. Two modes change requests as well: force sets the flag on every write, discard
clears it; in both a flush has nothing to do.
"""

from __future__ import annotations

from .. import parameters
from ..errors import OpenError
from ..filter import Filter, FilterDevice
from ..flags import Flag, Fua

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..complete import Layer
    from ..device import Buffer, Device
    from ..session import Session

MODES = ("none", "emulate", "native", "force", "pass", "discard")


class FuaFilter(Filter):
    """Modify flush and Forced Unit Access (FUA)."""

    longname = "fua filter"
    forkable = True
    fuamode = parameters.enum("What to make of flush and FUA", MODES, default="none")

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Raises OpenError where the layer below cannot keep what the mode promises."""
        below = next(session)
        if below.can_write():  # to a client that cannot write, nothing is promised
            if self.fuamode == "emulate" and not below.can_flush():
                raise OpenError(
                    "fuamode=emulate: there is no flush to emulate FUA with"
                    " (use none, or another plugin)"
                )
            if self.fuamode in ("native", "force") and below.can_fua() == Fua.NONE:
                raise OpenError(
                    f"fuamode={self.fuamode}: the plugin does not support FUA"
                    " (use none or emulate, or another plugin)"
                )
        return _DEVICES[self.fuamode](below)


class _None(FilterDevice):
    def can_fua(self) -> int:
        return Fua.NONE


class _Emulate(FilterDevice):
    def can_fua(self) -> int:
        return Fua.EMULATE


class _Native(FilterDevice):
    def can_fua(self) -> int:
        return Fua.NATIVE


class _NoFlush(_Native):
    def can_flush(self) -> bool:
        return True

    def flush(self, flags: int) -> None:
        """Force: nothing is left to flush. Discard: nothing is wanted."""


class _Force(_NoFlush):
    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        self.next.pwrite(buf, offset, flags | Flag.FUA)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset, flags | Flag.FUA)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset, flags | Flag.FUA)


class _Discard(_NoFlush):
    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        self.next.pwrite(buf, offset, flags & ~Flag.FUA)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset, flags & ~Flag.FUA)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset, flags & ~Flag.FUA)


_DEVICES: dict[str, type[FilterDevice]] = {
    "none": _None,
    "emulate": _Emulate,
    "native": _Native,
    "force": _Force,
    "pass": FilterDevice,
    "discard": _Discard,
}
