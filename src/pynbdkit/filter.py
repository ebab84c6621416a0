"""Filter: a layer around a plugin or another filter.

A Filter is configured once per process (it sees each key=value before the layers below it, and
takes what it declares). For each connection `open` wraps the next layer in a `FilterDevice`. A
FilterDevice overrides the operations that it changes; each one that it leaves alone costs nothing,
because it is bound straight to the layer that has it.

`self.next` is complete: every operation and question is there, whatever the plugin left out, and a
flag may be passed on where `next` says that it can (`self.next.can_fua()` …).
"""

from __future__ import annotations

from .device import Device
from .flags import ThreadModel
from .parameters import Configurable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .complete import Layer
    from .session import Session


class FilterDevice(Device):
    """A device around `next`: a method that is not overridden is the next layer's own.

    `close` must not close `next` (the server does, afterwards); `next` still works in it.
    """

    def __init__(self, next: Layer) -> None:
        self.next = next


class Filter(Configurable):
    """Base class of filters."""

    thread_model: int = ThreadModel.PARALLEL
    """The most that this filter stands; the strictest layer decides."""
    blocking: bool | None = False
    """Whether its own code may wait: True (delay), False (most filters: nothing is added)."""
    chain_thread_model: int = ThreadModel.PARALLEL
    """What all layers together came to; set by the server before `get_ready`."""
    forkable: bool = False
    """As `Plugin.forkable`: whether the filter does what it should in several processes that know
    nothing of each other's connections. Not if it counts or numbers them, say."""
    worker_count: int = 1
    """As `Plugin.worker_count`."""

    def load(self) -> None:
        """Called once, first."""

    def unload(self) -> None:
        """Called once, last."""

    def config(self, key: str, value: str) -> bool:
        """One key=value from the command line: True where it is this filter's, else it goes on."""
        return self.take_parameter(key, value)

    def config_complete(self) -> None:
        """All parameters are there: look at them together."""

    def get_ready(self) -> None:
        """Before the server forks into the background."""

    def after_fork(self) -> None:
        """In the process that serves."""

    def cleanup(self) -> None:
        """The server stops; no client is left."""

    def preconnect(self, readonly: bool) -> None:
        """A client has connected; raise to refuse it."""

    def around_preconnect(self, next: Callable[[], None], readonly: bool) -> None:
        """Ask this filter and the next layers; for filters that need to know what those said."""
        self.preconnect(readonly)
        next()

    def list_exports(
        self, next: Callable[[], Iterable[str | tuple[str, str]]], readonly: bool, is_tls: bool
    ) -> Iterable[str | tuple[str, str]]:
        """The next layer's exports, changed as the filter likes."""
        return next()

    def default_export(self, next: Callable[[], str], readonly: bool, is_tls: bool) -> str:
        """The next layer's default export, changed as the filter likes."""
        return next()

    def may_open(self, next: Callable[[Session], bool], session: Session) -> bool:
        """Whether this client may open the export `session.export_name` (see Plugin.may_open).

        A filter can be stricter than the next layer. One whose `open` opens another export asks
        `next` about that one; a yes without asking is for content of the filter's own, because the
        plugin is asked again before it opens.
        """
        return next(session)

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Open the next layer and wrap it; a session for it may be changed (`session.replace`).

        A filter that serves content of its own to this client returns a Device of its own, which
        is no FilterDevice, without opening the next layer.
        """
        return FilterDevice(next(session))
