"""NBD URIs: where a server is, and which export is meant (doc/uri.md beside the NBD protocol).

    nbd://HOST[:PORT]/EXPORT            TCP; the port is 10809 unless it is given
    nbd+unix:///EXPORT?socket=PATH      a Unix socket; PATH may be relative, or begin with %00
    nbds://[USER@]HOST[:PORT]/EXPORT    the same two with TLS, or not at all
    nbds+unix://[USER@]/EXPORT?socket=PATH

With TLS there may be more parameters, the same as libnbd's: ``tls-certificates=DIR``,
``tls-psk-file=FILE`` (its user is USER), ``tls-hostname=NAME`` and ``tls-verify-peer=BOOL``.

The export's name is all of the path after its first slash, percent-decoded: ``nbd://h//x`` is the
export ``/x``, and ``nbd://h`` the default export.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ..protocol.constants import DEFAULT_PORT


class UriError(ValueError):
    """A URI that does not say where to connect; the text is one line for the user."""


class Tls(NamedTuple):
    """How to use TLS.

    ``certificates`` is the folder with ca-cert.pem and the others, None for the default ones;
    ``psk_file`` has a pre-shared key of ``user`` (None: the login name) to use instead of
    certificates; ``hostname`` is whom the server's certificate must name, None for the host that
    is connected to; ``verify_peer`` is whether its certificate is verified at all.
    """

    certificates: str | None = None
    psk_file: str | None = None
    user: str | None = None
    hostname: str | None = None
    verify_peer: bool = True


class Uri(NamedTuple):
    """A parsed URI: ``socket`` is the Unix socket's path, or None for TCP to ``host, port``.

    ``tls`` is None for a connection in the clear.
    """

    export: str
    socket: str | None
    host: str = "localhost"
    port: int = DEFAULT_PORT
    tls: Tls | None = None

    def __str__(self) -> str:
        """Return the URI's text; parsing it gives the same URI again."""
        scheme, user = "nbd", ""
        options = [] if self.socket is None else [("socket", self.socket)]
        if self.tls is not None:
            scheme = "nbds"
            user = "" if self.tls.user is None else quote(self.tls.user, safe="") + "@"
            given = (
                ("tls-certificates", self.tls.certificates),
                ("tls-psk-file", self.tls.psk_file),
                ("tls-hostname", self.tls.hostname),
                ("tls-verify-peer", None if self.tls.verify_peer else "false"),
            )
            options += [(name, value) for name, value in given if value is not None]
        query = "&".join([f"{name}={quote(value)}" for name, value in options])
        tail = "/" + quote(self.export) + ("?" + query if query else "")
        if self.socket is not None:
            return f"{scheme}+unix://{user}{tail}"
        host = f"[{quote(self.host, safe=':')}]" if ":" in self.host else quote(self.host, safe="")
        return f"{scheme}://{user}{host}:{self.port}{tail}"


def parse_uri(text: str) -> Uri:
    """Return what ``text`` means; raises UriError, which names the trouble."""
    try:
        text.encode()  # Bytes of a command line that are no UTF-8 could not be told to a server.
    except UnicodeEncodeError:
        raise UriError(f"{text!a}: a URI is UTF-8") from None
    try:
        parts = urlsplit(text)
        export = unquote(parts.path.removeprefix("/"), errors="strict")
        options = parse_qsl(parts.query, keep_blank_values=True, errors="strict")
        host, port = unquote(parts.hostname or "localhost", errors="strict"), parts.port
        user = None if parts.username is None else unquote(parts.username, errors="strict")
    except ValueError as error:  # UnicodeDecodeError is one.
        raise UriError(f"{text}: {error}") from None
    if parts.scheme not in ("nbd", "nbd+unix", "nbds", "nbds+unix"):
        raise UriError(f"{text}: not an NBD URI, such as nbd://HOST/ or nbd+unix:///?socket=PATH")
    if parts.fragment:
        raise UriError(f"{text}: write # in an export's name as %23")
    socket = None
    unix = parts.scheme.endswith("+unix")
    secure = parts.scheme.startswith("nbds")
    tls_options = {}
    for name, value in options:
        if name == "socket" and unix:
            socket = value
        elif secure and name in _TLS_OPTIONS:
            tls_options[name] = value
        elif not name.startswith("x-") and (secure or not name.startswith("tls-")):
            # What nbds alone knows is no mistake in nbd, where it has no meaning.
            raise UriError(f"{text}: unknown parameter {name!r}")
    tls = _tls(text, tls_options, user) if secure else None
    if not unix:
        if parts.netloc.rpartition("@")[2].startswith("["):
            _check_ipv6(text, host)
        else:
            host = host.lower()  # What was percent-encoded is not in lower case yet.
            if ":" in host:
                raise UriError(f"{text}: write an IPv6 address in brackets")
        return Uri(export, None, host, DEFAULT_PORT if port is None else port, tls)
    if not socket:
        raise UriError(f"{text}: ?socket=PATH is missing")
    if parts.netloc.rpartition("@")[2] or (parts.netloc and not secure):
        raise UriError(f"{text}: a Unix socket has no host; write nbd+unix:///EXPORT?socket=PATH")
    return Uri(export, socket, tls=tls)


def _check_ipv6(text: str, host: str) -> None:
    """Raise UriError unless it is an address, perhaps with an interface (``fe80::1%eth0``)."""
    import ipaddress

    zone = host.partition("%")[2]
    try:
        ipaddress.IPv6Address(host)
        if quote(zone, safe="") != zone:
            raise ValueError
    except ValueError:
        raise UriError(f"{text}: {host!r} is no IPv6 address") from None


_TLS_OPTIONS = ("tls-certificates", "tls-psk-file", "tls-hostname", "tls-verify-peer", "tls-type")
_BOOLEANS = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True)
_BOOLEANS |= dict.fromkeys(("0", "false", "f", "no", "n", "off"), False)


def _tls(text: str, options: dict[str, str], user: str | None) -> Tls:
    """Return how a URI with the scheme nbds wants TLS used."""
    for name, value in options.items():
        if not value:
            raise UriError(f"{text}: {name} is empty")
    kind = options.get("tls-type", "psk" if "tls-psk-file" in options else "x509")
    if kind != ("psk" if "tls-psk-file" in options else "x509"):
        way_out = "it needs tls-psk-file=FILE" if kind == "psk" else "write x509 or psk"
        raise UriError(f"{text}: tls-type={kind} does not fit: {way_out}")
    verify = _BOOLEANS.get(options.get("tls-verify-peer", "true").lower())
    if verify is None:
        value = options["tls-verify-peer"]
        raise UriError(f"{text}: tls-verify-peer={value}: write true or false")
    return Tls(
        options.get("tls-certificates"),
        options.get("tls-psk-file"),
        user,
        options.get("tls-hostname"),
        verify,
    )
