"""tls-fallback: a note for clients without TLS, the disk for the others.

For `--tls=on` (nbdkit-tls-fallback-filter(1)): a client that does not speak TLS finds, under every
name, one small read-only export with a text that says so. It is answered here: no layer below hears
of it, and neither names nor descriptions of the real exports reach it.
"""

from __future__ import annotations

from .. import parameters
from ..device import Device
from ..errors import ConfigError
from ..filter import Filter
from ..flags import ThreadModel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..complete import Layer
    from ..session import Session

MESSAGE = (
    "This NBD server requires TLS authentication before it will serve useful data.\n"  # as nbdkit's
)
SECTOR = 512


class TlsFallbackFilter(Filter):
    """Serve clients without TLS a note instead of the disk."""

    longname = "tls-fallback filter"
    forkable = True
    tlsreadme = parameters.text("What clients without TLS read", default=MESSAGE, metavar="MESSAGE")

    def get_ready(self) -> None:
        """Raises ConfigError where one client without TLS could keep all others waiting."""
        if self.chain_thread_model == ThreadModel.SERIALIZE_CONNECTIONS:
            raise ConfigError(
                "tls-fallback: the plugin or a filter serves one client at a time"
                " (serialize_connections): a client without TLS would keep all others out"
                " (use --tls=require)"
            )

    def list_exports(
        self, next: Callable[[], Iterable[str | tuple[str, str]]], readonly: bool, is_tls: bool
    ) -> Iterable[str | tuple[str, str]]:
        """The next layer's, with TLS; else the note's."""
        return next() if is_tls else [""]

    def default_export(self, next: Callable[[], str], readonly: bool, is_tls: bool) -> str:
        """The next layer's, with TLS; else the note's."""
        return next() if is_tls else ""

    def may_open(self, next: Callable[[Session], bool], session: Session) -> bool:
        """Everybody may read the note."""
        return next(session) if session.is_tls else True

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """The next layer's device, with TLS; else the note."""
        return super().open(next, session) if session.is_tls else _Note(self.tlsreadme)


class _Note(Device):
    """A text, with NUL bytes up to whole sectors, one at least."""

    def __init__(self, text: str) -> None:
        data = text.encode("utf-8", "surrogateescape")
        size = max(-(-len(data) // SECTOR), 1) * SECTOR
        self._data = data.ljust(size, b"\0")

    def get_size(self) -> int:
        return len(self._data)

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return self._data[offset : offset + count]
