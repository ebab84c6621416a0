"""The ip filter: who is let in, from where, and when that is decided.

`DECISIONS` is written down from nbdkit-ip-filter(1); a newer nbdkit has to agree with it. (The
nbdkit 1.32 of Debian 12 understands no address at all, not even those in its manual page.)
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import identities
import pynbdkit
import support
from identities import Authority
from pynbdkit import ConfigError, OpenError, Session
from pynbdkit import session as sessions
from pynbdkit.chain import Chain
from pynbdkit.filters import ip
from pynbdkit.filters.ip import IpFilter
from pynbdkit.server import connection
from recording import Recording

UID, GID, PID = os.getuid(), os.getgid(), os.getpid()
WAYS = ("127.0.0.1", "::1", "unix")

DECISIONS = {
    # rules: the ways by which a client gets in
    "": WAYS,
    "allow= deny=": WAYS,
    "deny=all": (),
    "deny=any allow=all": WAYS,
    "allow=127.0.0.1,::1 deny=all": ("127.0.0.1", "::1"),
    "deny=8.0.0.0/8": WAYS,
    "deny=127.0.0.0/8": ("::1", "unix"),
    "deny=127.255.1.2/8": ("::1", "unix"),
    "deny=1.2.3.4/0": ("::1", "unix"),
    "deny=127.0.0.2/31": WAYS,
    "deny=127.0.0.2/30": ("::1", "unix"),
    "deny=::/0": ("127.0.0.1", "unix"),
    "deny=::1": ("127.0.0.1", "unix"),
    "deny=0:0::0:1/128": ("127.0.0.1", "unix"),
    "deny=::2/127": WAYS,
    "deny=fe80::/10": WAYS,
    "allow=anyipv6 deny=all": ("::1",),
    "allow=AllIPv4 deny=ANY": ("127.0.0.1",),
    "allow=anyunix, deny=all": ("unix",),
    "deny=allvsock": WAYS,
    "allow=vsock-cid:1 allow=vsock-port:10809 deny=all": (),
    f"allow=uid:{UID} deny=all": ("unix",),
    f"allow=uid:{UID + 1} deny=all": (),
    f"allow=UID:0x{UID:x} deny=all": ("unix",),
    f"deny=gid:{GID}": ("127.0.0.1", "::1"),
    f"allow=pid:{PID} deny=all": ("unix",),
    f"allow=pid:{PID + 1} deny=all": (),
    f"deny=gid:{GID + 1} deny=uid:{UID + 1},allipv6": ("127.0.0.1", "unix"),
    "deny=all allow=127.0.0.1": ("127.0.0.1",),
    "deny=anyipv4,anyipv6 allow=::1": ("::1", "unix"),
    # Names in certificates: these clients have shown none.
    "allow=dn:CN=x,anyunix deny=all": (),
    "allow=anyunix,dn:CN=x deny=all": ("unix",),
    "deny=dn:CN=x": WAYS,
    "deny=issuer-dn:*": (),
}

WRONG = {
    "1.2.3": "allow: '1.2.3' is not a rule",
    "01.2.3.4": "allow: '01.2.3.4' is not a rule",
    "localhost": "allow: 'localhost' is not a rule",
    "[::1]": r"allow: '\[::1\]' is not a rule",
    "any:": "allow: 'any:' is not a rule",
    "fe80::1%lo": "allow: 'fe80::1%lo' is not a rule",
    ",any": "allow=,any: empty entry",
    "any,,all": "allow=any,,all: empty entry",
    "1.2.3.4/33": r"allow=1.2.3.4/33: '33' is out of range \(0 to 32\)",
    "::1/129": r"out of range \(0 to 128\)",
    "1.2.3.4/-1": "out of range",
    "1.2.3.4/": "could not parse number: ''",
    "1.2.3.4/255.0.0.0": "could not parse number",
    "uid:root": "allow=uid:root: could not parse number: 'root'",
    "uid:": "could not parse number",
    "uid:-1": "out of range",
    "pid:0": "out of range",
    "vsock-port:x": "could not parse number",
}


def can_bind(host: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    if request.param != "unix" and not can_bind(request.param):
        support.lacking(f"no {request.param} here: give the loopback interface that address")
    return str(request.param)


def serve(way: str, *filters: IpFilter, plugin: Any = None) -> pynbdkit.RunningServer:
    tcp = None if way == "unix" else (way, 0)
    return pynbdkit.serve(plugin or Recording(), filters=filters, tcp=tcp)


def configured(words: Sequence[str]) -> IpFilter:
    filter = IpFilter()
    for word in words:
        key, _, value = word.partition("=")
        assert filter.config(key, value)
    return filter


def gets_in(nbd: Any, uri: str) -> bool:
    client = nbd.NBD()
    try:
        client.connect_uri(uri)
    except nbd.Error:
        return False
    client.shutdown()
    return True


def test_decisions(nbd: Any, way: str) -> None:
    for rules, ways in DECISIONS.items():
        with serve(way, configured(rules.split())) as server:
            assert gets_in(nbd, server.uri) == (way in ways), rules


def connected(way: str) -> tuple[socket.socket, socket.socket]:
    """A client's socket, and the server's end of it."""
    if way == "unix":
        return socket.socketpair()
    family = socket.AF_INET6 if ":" in way else socket.AF_INET
    with socket.create_server((way, 0), family=family) as listener:
        client = socket.create_connection(listener.getsockname()[:2])
        return client, listener.accept()[0]


GO = b"\0\0\0\3" + b"IHAVEOPT" + b"\0\0\0\7" + b"\0\0\0\6" + bytes(6)


def newer_decides(way: str, words: Sequence[str]) -> bool:
    """Whether nbdkit lets a client in that asks for the default export."""
    client, end = connected(way)
    with client, end:
        command = [support.next_peer("nbdkit"), "-s", "--filter=ip", "null", *words]
        process = subprocess.Popen(
            command, stdin=end.fileno(), stdout=end.fileno(), stderr=subprocess.DEVNULL
        )
        end.close()
        client.settimeout(30)
        answer = b""
        try:
            client.sendall(GO)
            client.shutdown(socket.SHUT_WR)
            while chunk := client.recv(4096):
                answer += chunk
        except TimeoutError:
            raise
        except OSError:  # it has closed already, what was sent unread
            pass
        process.wait(30)
    return answer[18 + 12 :][:4] == b"\0\0\0\3"  # the first reply's type: REP_INFO


def test_nbdkit_agrees(way: str) -> None:
    """But for two bugs of nbdkit 1.42: a comma after a number is a part of it, and /0 is as /32."""
    for rules, ways in DECISIONS.items():
        if f"uid:{UID + 1}," not in rules and "4/0" not in rules:
            assert newer_decides(way, rules.split()) == (way in ways), rules


@pytest.mark.parametrize("value", WRONG)
def test_wrong_rules(value: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[value]):
        IpFilter().config("allow", value)


@pytest.mark.parametrize("value", WRONG)
def test_nbdkit_refuses_the_same(value: str) -> None:
    command = (support.next_peer("nbdkit"), "-s", "--filter=ip", "null", f"allow={value}")
    assert support.run(*command, check=False).returncode == 1


def test_one_line_for_a_wrong_rule() -> None:
    done = support.pynbdkit("--filter=ip", "null", "deny=somewhere")
    assert done.returncode == 1
    assert done.stderr.startswith("pynbdkit: error: deny: 'somewhere' is not a rule")
    assert done.stderr.count("\n") == 1


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


def mapped(address: Any) -> Any:
    """Of IPv4 within IPv6, which is another test's."""
    return getattr(address, "ipv4_mapped", None)


@given(address=addresses, other=addresses, data=st.data())
def test_networks(address: Any, other: Any, data: st.DataObject) -> None:
    """A network has the addresses that Python's own module says it has."""
    prefix = data.draw(st.integers(0, address.max_prefixlen))
    flips = data.draw(st.integers(0, (1 << address.max_prefixlen) - 1))
    near = type(address)(int(address) ^ flips >> data.draw(st.integers(0, prefix)))
    assume(not any(mapped(a) for a in (address, near, other)))
    network = ipaddress.ip_network(f"{address}/{prefix}", strict=False)
    filter = configured([f"allow={address}/{prefix}", "deny=all"])
    for client in (near, other):
        name = (str(client), 1) if client.version == 4 else (str(client), 1, 0, 0)
        assert filter.permits(Session(peer_name=name)) == (client in network)


@pytest.mark.parametrize("rule", ["10.1.2.3", "::ffff:10.1.2.3", "::ffff:10.0.0.0/104", "allipv4"])
@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:10.1.2.3"])
def test_ipv4_within_ipv6_is_ipv4(rule: str, peer: str) -> None:
    """As clients have it on a socket for both: a rule about IPv4 is not got round that way."""
    session = Session(peer_name=(peer, 1, 0, 0) if ":" in peer else (peer, 1))
    assert not configured([f"deny={rule}"]).permits(session)
    assert configured(["deny=allipv6"]).permits(session)
    assert configured(["deny=10.1.2.4,::ffff:10.1.2.4"]).permits(session)


def test_a_scope_is_not_looked_at() -> None:
    session = Session(peer_name=("fe80::1%lo", 1, 0, 1))
    assert not configured(["deny=fe80::1"]).permits(session)
    assert configured(["deny=fe80::2"]).permits(session)


def test_who_is_at_the_other_end_of_a_unix_socket() -> None:
    session = Session(credentials=(11, 22, 33))
    for rule in ("pid:11", "uid:22", "gid:33"):
        kind = rule[:4]
        assert not configured([f"deny={rule}"]).permits(session)
        for number in {11, 22, 33} - {int(rule[4:])}:
            assert configured([f"deny={kind}{number}"]).permits(session)


def test_vsock() -> None:
    session = Session(peer_name=(3, 1024))
    for rule in ("allvsock", "anyvsock", "vsock-cid:3", "vsock-port:1024", "all"):
        assert not configured([f"deny={rule}"]).permits(session)
    for rule in ("vsock-cid:1024", "vsock-port:3", "anyipv4", "anyipv6", "anyunix", "0.0.0.3"):
        assert configured([f"deny={rule}"]).permits(session)


@pytest.mark.parametrize("source", [Session(), Session(peer_name=()), None])
def test_a_source_without_a_name_is_let_in_by_all_alone(source: Session | None) -> None:
    assert configured([]).permits(source)
    assert configured(["allow=all", "deny=all"]).permits(source)
    assert not configured(["deny=uid:1"]).permits(source)
    assert not configured(["allow=allipv4,allipv6,allunix,allvsock"]).permits(source)


@pytest.mark.parametrize(
    ("arguments", "served"),
    [([], True), (["allow=all"], True), (["deny=127.0.0.1"], False), (["deny=anyunix"], False)],
)
def test_pipes(arguments: list[str], served: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pynbdkit", "-s", "--filter=ip", "null", *arguments],
        input=b"",
        capture_output=True,
        timeout=60,
    )
    assert (done.stdout[:8] == b"NBDMAGIC") == served
    assert (b"client not permitted" in done.stderr) != served


def test_refused_before_the_first_byte(
    nbd: Any, capfd: pytest.CaptureFixture[str], connect: Callable[..., Any]
) -> None:
    """No greeting, one line in the log, no layer asked; the next client is served."""
    plugin = Recording()
    filter = configured([f"allow=uid:{UID + 1}", "deny=all"])
    with serve("unix", filter, plugin=plugin) as server:
        with socket.socket(socket.AF_UNIX) as client:
            assert server.socket is not None
            client.connect(server.socket)
            assert client.recv(1) == b""
        assert plugin.events == []
        filter.allow.append(ip.parse_rules("allow", f"uid:{UID}"))
        assert connect(server).pread(512, 0) == bytes(512)
    log = capfd.readouterr().err
    assert log.count("\n") == 1
    assert "error: preconnect: client not permitted to connect" in log


def test_debug_flag(nbd: Any, serve: Callable[..., support.ServerProcess]) -> None:
    server = serve(
        "-v", "-D", "ip.rules=1", "--filter=ip", "null", "allow=pid:1", "deny=uid:999999"
    )
    assert gets_in(nbd, server.uri)
    assert f"ip: unix pid:{PID} uid:{UID} gid:{GID}: allowed: no rule matches" in server.log()


# -- the names in certificates -----------------------------------------------------------------

DN = r"C=US,ST=New York,O=Big\, Co,CN=alice"


def known_as(dn: str, issuer: str = "CN=CA") -> Session:
    session = Session(is_tls=True, peer_name=("192.0.2.1", 1))
    session.peer_tls_dn, session.peer_tls_issuer_dn = dn, issuer if dn else ""
    return session


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (DN.replace("\\", "\\\\"), True),
        (DN, False),
        ("*", True),
        ("*,CN=alice", True),
        ("*,CN=Alice", False),
        ("CN=alice", False),
        ("*,CN=alic", False),
        ("*,CN=?lice", True),
        ("*,CN=[a-c]lice", True),
        ("*,CN=[!a-c]lice", False),
        ("*,CN=[^a-c]lice", False),
        ("*,CN=[^b]lice", True),
        (r"*,CN=\alice", True),
        (r"\*,CN=alice", False),
        (r"*,CN=\[a]lice", False),
        (r"*,CN=alice\?", False),
        (r"*Big\\\, Co*", True),
        ("", False),
    ],
)
def test_wildcards(pattern: str, matches: bool) -> None:
    """As fnmatch(3) has them. A name in brackets, or quoted, is itself."""
    for prefix in ("dn", "DN"):
        filter = configured([f"allow={prefix}:{pattern}", "deny=all"])
        assert filter.permits(known_as(DN)) == matches
    assert configured([f"deny=issuer-dn:{pattern}"]).permits(known_as("CN=x", DN)) != matches


@pytest.mark.parametrize(
    ("pattern", "text"), [("a[[:alpha:]]", "character classes"), ("a\\", "nothing follows")]
)
def test_wildcards_that_are_refused(pattern: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        IpFilter().config("allow", f"dn:{pattern}")


def test_who_has_shown_no_certificate_is_not_allowed_by_its_name() -> None:
    """nbdkit lets everybody in by allow=dn:*, also without TLS; in deny, both match."""
    for rule in ("dn:*", "issuer-dn:*", "dn:", "issuer-dn:"):
        assert not configured([f"allow={rule}", "deny=all"]).permits(known_as(""))
        assert not configured([f"deny={rule}"]).permits(known_as(""))
    assert configured(["allow=dn:*", "deny=all"]).permits(known_as("CN=x"))


@pytest.fixture
def as_client() -> Any:
    yield sessions.set_current
    sessions.set_current(None)


def test_names_are_looked_at_when_they_are_known(as_client: Any) -> None:
    """With such a rule all rules are judged when exports are listed, or one is opened."""
    plugin = Recording()
    rules = ["allow=dn:*,CN=alice", "allow=10.0.0.1", "deny=all"]
    chain = Chain(plugin, [configured(rules)])
    for session, permitted in (
        (known_as(DN), True),
        (known_as("CN=bob"), False),
        (known_as(""), False),
        (Session(peer_name=("10.0.0.1", 1)), True),
    ):
        as_client(session)
        chain.preconnect(False)
        if permitted:
            assert chain.list_exports(False, True) == [("", "")]
            chain.open(session).close()
            assert plugin.take() == [("close",)]
        else:
            with pytest.raises(OpenError, match="client not permitted"):
                chain.list_exports(False, True)
            with pytest.raises(PermissionError, match="client not permitted"):
                chain.open(session)
            assert plugin.take() == []


def test_a_client_that_is_judged_late_learns_nothing(nbd: Any, way: str) -> None:
    """Over the wire, without TLS: no list, no size, whatever it asks for first."""
    with serve(way, configured(["allow=dn:*", "deny=all"])) as server:
        client = nbd.NBD()
        client.set_opt_mode(True)
        client.connect_uri(server.uri)
        for ask in (lambda: client.opt_list(print), client.opt_info, client.opt_go):
            with pytest.raises(nbd.Error):
                ask()
        client.opt_abort()


def test_certificates_as_nbdkit(sockdir: Path, tmp_path: Path, nbd: Any) -> None:
    """The names are nbdkit's, letter by letter; who does not match can neither list nor open."""
    authority = Authority(tmp_path)
    fields = {"country": "US", "state": "New York", "organization": "Big, Co"}
    alice = authority.client("alice", **fields)
    bob = authority.client("bob", **fields)
    rules = [r"allow=dn:CN=alice,O=Big\\, Co,ST=New York,C=US", "allow=issuer-dn:x", "deny=all"]
    options = ("--tls=on", f"--tls-certificates={authority.server}", "--tls-verify-peer")
    for name, command in (("ours", None), ("theirs", [support.next_peer("nbdkit")])):
        arguments = [*options, "--filter=ip", "memory", "1M", *rules]
        (sockdir / name).mkdir()
        with support.ServerProcess(sockdir / name, arguments, command) as server:
            for who in (alice, bob, None):
                client = nbd.NBD()
                client.set_uri_allow_local_file(True)
                client.set_opt_mode(True)
                client.connect_uri(identities.uri(server, who))
                if who == alice:
                    client.opt_list(lambda name, description: None)
                    client.opt_go()
                    client.shutdown()
                else:
                    for ask in (lambda c=client: c.opt_list(print), client.opt_info, client.opt_go):
                        with pytest.raises(nbd.Error):
                            ask()
                    client.opt_abort()


# -- security labels ---------------------------------------------------------------------------


class Labelled(Session):
    peer_security_context = "system_u:system_r:svirt_t:s0"


def test_security_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ip, "has_security_labels", lambda: True)
    filter = configured(["allow=security:system_u:system_r:svirt_t:s0", "deny=all"])
    assert filter.permits(Labelled())
    assert not filter.permits(Session())
    with pytest.raises(ConfigError, match="the label is missing"):
        IpFilter().config("deny", "security:")


def test_security_labels_that_the_system_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that could never match is refused, for it would let in whom it should not."""
    monkeypatch.setattr(ip, "SO_PEERSEC", 32767)
    with pytest.raises(ConfigError, match="does not tell the security label"):
        IpFilter().config("deny", "security:x")


def test_a_label_comes_from_the_socket(nbd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no labels, something else that a socket knows stands in for one."""
    monkeypatch.setattr(connection, "SO_PEERSEC", socket.SO_PEERCRED)
    labels = []

    class Asking(Recording):
        def preconnect(self, readonly: bool) -> None:
            session = sessions.current()
            assert session is not None
            labels.append(session.peer_security_context)

    with serve("unix", plugin=Asking()) as server:
        assert gets_in(nbd, server.uri)
        monkeypatch.setattr(connection, "SO_PEERSEC", 32767)
        assert gets_in(nbd, server.uri)
    packed = struct.pack("iii", PID, UID, GID).rstrip(b"\0")
    assert labels == [packed.decode(errors="surrogateescape"), None]


def test_the_page_has_examples_that_work() -> None:
    page = (support.ROOT / "docs" / "filters" / "ip.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("    pynbdkit --filter=ip ")]
    assert len(lines) > 3
    for line in lines:
        words = [word for word in shlex.split(line) if word.startswith(("allow=", "deny="))]
        configured(words)
