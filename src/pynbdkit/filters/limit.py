"""limit: refuse clients over a number (nbdkit-limit-filter(1)).

A client counts from the time that it opens an export until that is closed; one that only lists
exports, or dawdles in the handshake, takes no place. So a client is turned away as early as it can
be, when it connects, and asked again when it opens: many may be in the handshake at once.
"""

from __future__ import annotations

import threading

from .. import parameters
from ..errors import OpenError
from ..filter import Filter, FilterDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..complete import Layer
    from ..device import Device
    from ..session import Session


class LimitFilter(Filter):
    """Limit how many clients can be connected at a time."""

    longname = "limit filter"
    limit = parameters.integer(
        "How many clients at a time (0: no limit)", low=0, high=0xFFFFFFFF, default=1
    )

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        self._clients = 0
        self._lock = threading.Lock()

    def preconnect(self, readonly: bool) -> None:
        """Raises OpenError where the places are taken."""
        with self._lock:
            self._refuse_if_full()

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Take a place, then open the next layer. Raises OpenError where the places are taken."""
        with self._lock:
            self._refuse_if_full()
            self._clients += 1
        try:
            return _Counted(next(session), self._leave)
        except BaseException:
            self._leave()
            raise

    def _refuse_if_full(self) -> None:
        if self.limit and self._clients >= self.limit:
            raise OpenError(
                f"too many clients: {self._clients} connected, limit={self.limit}; this one is"
                " refused"
            )

    def _leave(self) -> None:
        with self._lock:
            self._clients -= 1


class _Counted(FilterDevice):
    def __init__(self, next: Layer, leave: Callable[[], None]) -> None:
        super().__init__(next)
        self._leave = leave

    def close(self) -> None:
        self._leave()
