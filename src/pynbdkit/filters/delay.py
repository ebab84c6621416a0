"""delay: make requests slow (nbdkit-delay-filter(1)).

Only the operations that have a delay are overridden, so the others cost nothing. A delay ends
early, with ESHUTDOWN, when the server stops or the client has gone: it never holds up either.
"""

from __future__ import annotations

import errno

from .. import parameters
from ..filter import Filter, FilterDevice
from ..flags import Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..complete import Layer
    from ..device import Device
    from ..session import Session

_METAVAR = "NN[ms]"


class DelayFilter(Filter):
    """Delay requests, opening and closing."""

    longname = "delay filter"
    forkable = True
    blocking = True

    delay_read = parameters.delay("How long a read waits", default=0.0, metavar=_METAVAR)
    delay_write = parameters.delay("How long a write waits", default=0.0, metavar=_METAVAR)
    delay_zero = parameters.delay("How long a zero waits", default=0.0, metavar=_METAVAR)
    delay_trim = parameters.delay("How long a trim waits", default=0.0, metavar=_METAVAR)
    delay_extents = parameters.delay("How long block status waits", default=0.0, metavar=_METAVAR)
    delay_cache = parameters.delay("How long a cache request waits", default=0.0, metavar=_METAVAR)
    delay_open = parameters.delay("How long opening waits", default=0.0, metavar=_METAVAR)
    delay_close = parameters.delay("How long closing waits", default=0.0, metavar=_METAVAR)
    rdelay = parameters.delay("The same as delay-read", metavar=_METAVAR, sets=("delay_read",))
    wdelay = parameters.delay(
        "Sets delay-write, delay-zero and delay-trim",
        metavar=_METAVAR,
        sets=("delay_write", "delay_zero", "delay_trim"),
    )
    delay_fast_zero = parameters.boolean(
        "Whether a fast zero waits; if not, it fails at once where zero is slow", default=True
    )

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Wait, then open the next layer."""
        if self.delay_open:
            session.sleep(self.delay_open)
        return DelayDevice(next(session), session, self)


class DelayDevice(FilterDevice):
    """The next layer, later."""

    def __init__(self, next: Layer, session: Session, delays: DelayFilter) -> None:
        super().__init__(next)
        self._sleep = session.sleep
        self._close_delay: float = delays.delay_close
        for name, seconds in (
            ("pread", delays.delay_read),
            ("pwrite", delays.delay_write),
            ("trim", delays.delay_trim),
            ("zero", delays.delay_zero),
            ("extents", delays.delay_extents),
            ("block_status", delays.delay_extents),
            ("cache", delays.delay_cache),
        ):
            if seconds:
                at_once = 0 if delays.delay_fast_zero else Flag.FAST_ZERO
                setattr(self, name, self._later(name, seconds, at_once))

    def _later(self, name: str, seconds: float, at_once: int) -> Callable[..., Any]:
        """The next layer's operation after a delay; one with the flag `at_once` fails instead."""
        sleep, operation = self._sleep, getattr(self.next, name)

        def later(*arguments: Any) -> Any:
            if arguments[-1] & at_once:  # the last one is always the flags
                raise OSError(errno.EOPNOTSUPP, f"{name} is slow (delay-fast-zero=false)")
            sleep(seconds)
            return operation(*arguments)

        return later

    def close(self) -> None:
        """Wait; the server closes the next layer afterwards."""
        if self._close_delay:
            try:
                self._sleep(self._close_delay)
            except OSError:
                pass  # the client has gone without a word, or the server stops
