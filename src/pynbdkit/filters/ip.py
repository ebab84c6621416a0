"""ip: let clients in, or not, by where they come from and who they are (nbdkit-ip-filter(1)).

A client that any rule of the allow list matches is let in; else one that any rule of the deny list
matches is not; else it is let in. All is decided when a client connects, before a byte of its own
is read, unless a rule is about the names in TLS certificates: those are known after the handshake,
so with such a rule every client is judged when it lists exports or opens one.

Where there are rules, doubt is a no: a source that cannot be named (pipes, an unknown family of
sockets) is let in by `all` alone, and who has shown no certificate is nobody that a rule could
allow.
"""

from __future__ import annotations

import errno
import socket
import sys

from .. import log
from ..errors import OpenError
from ..filter import Filter
from ..parameters import Parameter
from ..parse import parse_int
from ..session import current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from ..complete import Layer
    from ..device import Device
    from ..session import Session

FAMILIES = ("ipv4", "ipv6", "unix", "vsock")
MAX_ID = (1 << 32) - 1
SO_PEERSEC = 31
_MAPPED = bytes(10) + b"\xff\xff"
_REFUSED = "client not permitted to connect (allow and deny of the ip filter)"


class Source:
    """What is known of a client: `family` is one of FAMILIES, or "" where it cannot be told."""

    def __init__(self, session: Session | None) -> None:
        self.session = session
        self.family = ""
        self.address = b""
        """Of IPv4 and IPv6: in network order."""
        self.cid = self.port = -1
        """Of vsock."""
        if session is None:
            return
        peer = session.peer_name
        if isinstance(peer, (str, bytes)) or session.peer_uid is not None:
            self.family = "unix"
        elif isinstance(peer, tuple) and len(peer) >= 2:
            self._from_address(peer[0], peer[1])

    def _from_address(self, host: object, port: object) -> None:
        if isinstance(host, int) and isinstance(port, int):
            self.family, self.cid, self.port = "vsock", host, port
        elif isinstance(host, str):
            address = _packed(host.partition("%")[0])
            if address is not None:
                self.family, self.address = _FAMILY[len(address)], address

    def __str__(self) -> str:
        who = self.session
        if who is None or not self.family:
            return "unknown source"
        if self.family == "unix":
            return f"unix pid:{who.peer_pid} uid:{who.peer_uid} gid:{who.peer_gid}"
        return f"{self.family} {who.peer_name[0]}"


_FAMILY = {4: "ipv4", 16: "ipv6"}


def _packed(text: str) -> bytes | None:
    """An address in network order; one of IPv4 within IPv6 (::ffff:A.B.C.D) is one of IPv4."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            address = socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return address[12:] if address.startswith(_MAPPED) else address
    return None


class Rule:
    """One entry of a list: its text, and whether it matches a source."""

    def __init__(self, text: str, matches: Callable[[Source], bool], *, late: bool = False) -> None:
        """`late`: it is about names that are known after the TLS handshake only."""
        self.text = text
        self.matches = matches
        self.late = late


def parse_rules(key: str, text: str) -> list[Rule]:
    """The rules of one allow= or deny=. Raises ValueError in one line.

    The names in certificates have commas of their own: a text that begins with one is one rule.
    """
    if text.lower().startswith(("dn:", "issuer-dn:")):
        return [_rule(key, text)]
    entries = text.split(",")
    if not entries[-1]:
        entries.pop()  # "", or a comma at the end
    if "" in entries:
        raise ValueError(f"{key}={text}: empty entry in the list of rules")
    return [_rule(key, entry) for entry in entries]


def _rule(key: str, text: str) -> Rule:
    lower = text.lower()
    if lower in ("all", "any"):
        return Rule(text, lambda source: True)
    family = lower[3:]
    if lower.startswith(("all", "any")) and family in FAMILIES:
        return Rule(text, lambda source: source.family == family)
    kind, colon, value = text.partition(":")
    if colon and kind.lower() in _KINDS:
        return _KINDS[kind.lower()](key, text, value)
    return Rule(text, _network(key, text))


def _network(key: str, text: str) -> Callable[[Source], bool]:
    host, slash, length = text.partition("/")
    address = _packed(host)
    if address is None:
        raise ValueError(
            f"{key}: {text!r} is not a rule (all, allipv4, allipv6, allunix, allvsock, ADDRESS,"
            " ADDRESS/NN, pid:, uid:, gid:, vsock-cid:, vsock-port:, security:, dn:, issuer-dn:)"
        )
    bits = 8 * len(address)
    mapped = 96 if ":" in host and bits == 32 else 0
    prefix = parse_int(f"{key}={text}", length, mapped, bits + mapped) - mapped if slash else bits
    shift = bits - prefix
    wanted = int.from_bytes(address, "big") >> shift

    def matches(source: Source) -> bool:
        own = source.address
        return len(own) == len(address) and int.from_bytes(own, "big") >> shift == wanted

    return matches


def _number(of: Callable[[Source], int | None], low: int, high: int) -> Callable[..., Rule]:
    def make(key: str, text: str, value: str) -> Rule:
        number = parse_int(f"{key}={text}", value, low, high)
        return Rule(text, lambda source: of(source) == number)

    return make


def _of_session(name: str) -> Callable[[Source], Any]:
    return lambda source: getattr(source.session, name, None)


def _security(key: str, text: str, value: str) -> Rule:
    if not value:
        raise ValueError(f"{key}={text}: the label is missing")
    if not has_security_labels():
        raise ValueError(
            f"{key}={text}: this system does not tell the security label of a client"
            " (that takes SELinux or Smack)"
        )
    label = _of_session("peer_security_context")
    return Rule(text, lambda source: label(source) == value)


def has_security_labels() -> bool:
    """Whether the other end of a Unix socket has a security label on this system."""
    if not sys.platform.startswith("linux"):
        return False
    ends = socket.socketpair(socket.AF_UNIX)
    try:
        return bool(ends[0].getsockopt(socket.SOL_SOCKET, SO_PEERSEC, 256))
    except OSError as error:
        return error.errno == errno.ERANGE  # there is one, only longer
    finally:
        for end in ends:
            end.close()


def _certificate_name(name: str) -> Callable[..., Rule]:
    of = _of_session(name)

    def make(key: str, text: str, value: str) -> Rule:
        matches = _wildcard(key, text, value)

        def rule(source: Source) -> bool:
            shown: str = of(source) or ""
            return bool(shown or key == "deny") and matches(shown)

        return Rule(text, rule, late=True)

    return make


def _wildcard(key: str, text: str, pattern: str) -> Callable[[str], bool]:
    """A matcher of whole texts, as fnmatch(3) does it: ``* ? [...] \\c``."""
    import fnmatch
    import re

    if "[:" in pattern or "[=" in pattern or "[." in pattern:
        raise ValueError(f"{key}={text}: character classes such as [[:alpha:]] are not supported")
    plain = []
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            quoted = next(characters, "")
            if not quoted:
                raise ValueError(f"{key}={text}: nothing follows the backslash at the end")
            plain.append(f"[{quoted}]" if quoted in "*?[" else quoted)
        else:
            plain.append(character)
    expression = fnmatch.translate("".join(plain).replace("[^", "[!"))
    return lambda name, match=re.compile(expression).match: match(name) is not None  # type: ignore[misc]


_KINDS: dict[str, Callable[[str, str, str], Rule]] = {
    "pid": _number(_of_session("peer_pid"), 1, (1 << 31) - 1),
    "uid": _number(_of_session("peer_uid"), 0, MAX_ID),
    "gid": _number(_of_session("peer_gid"), 0, MAX_ID),
    "vsock-cid": _number(lambda source: source.cid, 0, MAX_ID),
    "vsock-port": _number(lambda source: source.port, 0, MAX_ID),
    "security": _security,
    "dn": _certificate_name("peer_tls_dn"),
    "issuer-dn": _certificate_name("peer_tls_issuer_dn"),
}


class IpFilter(Filter):
    """Filter clients by address, process, user, group or certificate."""

    longname = "ip filter"
    forkable = True
    allow = Parameter(
        "rules", "Who is let in, first of all", parse_rules, multiple=True, metavar="RULE[,RULE...]"
    )
    deny = Parameter(
        "rules", "Who of the others is not", parse_rules, multiple=True, metavar="RULE[,RULE...]"
    )

    @property
    def late(self) -> bool:
        """Whether clients are judged after the handshake, because of a certificate's names."""
        return any(rule.late for rules in (*self.allow, *self.deny) for rule in rules)

    def permits(self, session: Session | None) -> bool:
        """The decision; None is a client of which nothing is known."""
        allow = [rule for rules in self.allow for rule in rules]
        deny = [rule for rules in self.deny for rule in rules]
        if not allow and not deny:
            return True
        source = Source(session)
        rule = next((rule for rule in allow if rule.matches(source)), None)
        permitted = rule is not None
        if rule is None:
            rule = next((rule for rule in deny if rule.matches(source)), None)
            permitted = rule is None and bool(source.family)
        if log.flags.get("ip.rules"):
            why = f"rule {rule.text}" if rule is not None else "no rule matches"
            log.debug(f"ip: {source}: {'allowed' if permitted else 'denied'}: {why}")
        return permitted

    def preconnect(self, readonly: bool) -> None:
        """Raises OpenError for a client that is not let in."""
        if not self.late and not self.permits(current()):
            raise OpenError(_REFUSED)

    def list_exports(
        self, next: Callable[[], Iterable[str | tuple[str, str]]], readonly: bool, is_tls: bool
    ) -> Iterable[str | tuple[str, str]]:
        """Raises OpenError for a client that is not let in."""
        if self.late and not self.permits(current()):
            raise OpenError(_REFUSED)
        return next()

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Raises PermissionError for a client that is not let in."""
        if self.late and not self.permits(session):
            raise PermissionError(errno.EPERM, _REFUSED)
        return super().open(next, session)
