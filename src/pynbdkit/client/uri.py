"""NBD URIs: where a server is, and which export is meant (doc/uri.md beside the NBD protocol).

    nbd://HOST[:PORT]/EXPORT            TCP; the port is 10809 unless it is given
    nbd+unix:///EXPORT?socket=PATH      a Unix socket; PATH may be relative, or begin with %00

The export's name is all of the path after its first slash, percent-decoded: ``nbd://h//x`` is the
export ``/x``, and ``nbd://h`` the default export.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ..protocol.constants import DEFAULT_PORT


class UriError(ValueError):
    """A URI that does not say where to connect; the text is one line for the user."""


class Uri(NamedTuple):
    """A parsed URI: ``socket`` is the Unix socket's path, or None for TCP to ``host, port``."""

    export: str
    socket: str | None
    host: str = "localhost"
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        """Return the URI's text; parsing it gives the same URI again."""
        path = "/" + quote(self.export)
        if self.socket is not None:
            return f"nbd+unix://{path}?socket={quote(self.socket)}"
        host = f"[{quote(self.host, safe=':')}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}{path}"


def parse_uri(text: str) -> Uri:
    """Return what ``text`` means; raises UriError, which names the trouble."""
    try:
        parts = urlsplit(text)
        export = unquote(parts.path.removeprefix("/"), errors="strict")
        options = parse_qsl(parts.query, keep_blank_values=True, errors="strict")
        host, port = parts.hostname, parts.port
    except ValueError as error:  # UnicodeDecodeError is one.
        raise UriError(f"{text}: {error}") from None
    if parts.scheme in ("nbds", "nbds+unix"):
        raise UriError(f"{text}: this client has no TLS yet; use {parts.scheme.replace('s', '')}:")
    if parts.scheme not in ("nbd", "nbd+unix"):
        raise UriError(f"{text}: not an NBD URI, such as nbd://HOST/ or nbd+unix:///?socket=PATH")
    if parts.fragment:
        raise UriError(f"{text}: write # in an export's name as %23")
    socket = None
    for name, value in options:
        if name == "socket" and parts.scheme == "nbd+unix":
            socket = value
        elif not name.startswith(("x-", "tls-")):  # The latter matter to nbds alone.
            raise UriError(f"{text}: unknown parameter {name!r}")
    if parts.scheme == "nbd+unix":
        if not socket:
            raise UriError(f"{text}: ?socket=PATH is missing")
        if parts.netloc:
            raise UriError(
                f"{text}: a Unix socket has no host; write nbd+unix:///EXPORT?socket=PATH"
            )
        return Uri(export, socket)
    return Uri(export, None, unquote(host or "localhost"), DEFAULT_PORT if port is None else port)
