"""exitlast: stop the server when the last client has gone (nbdkit-exitlast-filter(1)).

A client counts while it has an export open. One that connects and goes without opening any (a
probe, a list of exports) neither keeps the server alive nor stops it.
"""

from __future__ import annotations

import threading

from .. import log
from ..filter import Filter, FilterDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..complete import Layer
    from ..device import Device
    from ..session import Session


class ExitLastFilter(Filter):
    """Exit when no client is connected any more."""

    longname = "exitlast filter"

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        self._clients = 0
        self._lock = threading.Lock()

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Open the next layer, and count the client when that has worked."""
        device = _Counted(next(session), self, session)
        with self._lock:
            self._clients += 1
        return device

    def leave(self, session: Session) -> None:
        """A client has gone; after the last one, the server stops."""
        with self._lock:
            self._clients -= 1
            last = self._clients == 0
        if last:
            log.debug("exitlast: the last client has gone: stopping")
            session.shutdown()


class _Counted(FilterDevice):
    def __init__(self, next: Layer, filter: ExitLastFilter, session: Session) -> None:
        super().__init__(next)
        self._filter = filter
        self._session = session

    def close(self) -> None:
        self._filter.leave(self._session)
