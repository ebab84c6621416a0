"""noextents: say that everything is allocated (nbdkit-noextents-filter(1)).

The device answers can_extents with no, and leaves the rest to the rule for that answer
(`complete.py`): one extent of data, without asking the layers below.
"""

from __future__ import annotations

from ..filter import Filter, FilterDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..complete import Layer
    from ..device import Device
    from ..session import Session


class NoExtentsFilter(Filter):
    """Hide holes: the disk looks fully allocated."""

    longname = "noextents filter"
    forkable = True

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """The next layer without its extents."""
        return _NoExtents(next(session))


class _NoExtents(FilterDevice):
    def can_extents(self) -> bool:
        return False
