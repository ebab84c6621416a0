"""TLS: the server's credentials, and the contexts made from them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl


class Credentials:
    """Certificates or pre-shared keys of a server."""

    def context(self) -> ssl.SSLContext:
        """The context for a new connection."""
        raise NotImplementedError
