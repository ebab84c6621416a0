"""TLS from STARTTLS to the last request: over sockets, with clients of GnuTLS and OpenSSL."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
from certificates import CA_NAME, CLIENT_NAME, Certificates, certificates
from pynbdkit import Device, Plugin, Session, log
from pynbdkit.embed import RunningServer
from raw import READ, WRITE, Raw
from storm import Storm
from support import ROOT, ServerProcess, next_peer, run

__all__ = ["certificates"]

SIZE = 1 << 20
LIMIT = 20
STARTTLS, LIST, GO, STRUCTURED = 5, 3, 7, 8
ACK, TLS_REQD, UNSUP = 1, 2**31 + 5, 2**31 + 1
Start = Callable[..., RunningServer]


class Log:
    """What the log says, as it says it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()

    def add(self, line: str) -> None:
        with self._more:
            self.lines.append(line)
            self._more.notify_all()

    def wait_for(self, text: str) -> str:
        """The first line with a text, when it has come."""
        with self._more:
            found = self._more.wait_for(lambda: self._with(text), LIMIT)
        assert found, (text, self.lines)
        return found[0]

    def _with(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]

    @property
    def errors(self) -> list[str]:
        return self._with("error: ")


@pytest.fixture
def lines() -> Iterator[Log]:
    said = Log()
    sink, log._sink = log._sink, said.add
    yield said
    log._sink = sink


@pytest.fixture
def start(certificates: Certificates, lines: Log) -> Iterator[Start]:
    """start(folder="good", source=…, …): a server with TLS, "require" unless told otherwise."""
    running: list[RunningServer] = []

    def serve(folder: str | Path = "good", source: Any = None, **options: Any) -> RunningServer:
        options = {"tls": "require", **options}
        if options["tls"] != "off":
            options["tls_certificates"] = certificates.root / folder
        if source is None:
            source = pynbdkit.load_plugin("memory", size=SIZE)
        running.append(pynbdkit.serve(source, **options))
        return running[-1]

    yield serve
    for server in running:
        server.stop()
        assert server.connections == 0


def begin(server: RunningServer) -> Raw:
    """A client that has been granted TLS, and has to begin it."""
    assert server.socket is not None
    client = Raw(server.socket, go=False)
    client.receive(18)
    client.send(struct.pack(">I", 3))
    client.option(STARTTLS)
    assert client.reply() == (STARTTLS, ACK, b"")
    return client


def context(folder: Path, certificate: bool = False) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(folder / "ca-cert.pem")
    if certificate:
        made.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return made


def secure(server: RunningServer, folder: Path, certificate: bool = False) -> Raw:
    """A client whose options are encrypted from now on."""
    client = begin(server)
    client.sock = context(folder, certificate).wrap_socket(
        client.sock, server_hostname="localhost", suppress_ragged_eofs=False
    )
    return client


def go(client: Raw, name: bytes = b"") -> None:
    client.option(GO, struct.pack(">I", len(name)) + name + bytes(2))
    while client.reply()[1] != ACK:
        pass


def is_alive(server: RunningServer, certificates: Certificates) -> None:
    """A good client is served, whatever others have done."""
    with secure(server, certificates["good"], True) as client:
        go(client)
        client.ask(READ, count=512)
        assert client.simple(512) == (1, 0, bytes(512))


# --- It works ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [{}, {"tcp": ("127.0.0.1", 0)}], ids=["unix", "tcp"])
@pytest.mark.parametrize("verify", [False, True])
def test_tools_copy_both_ways(
    start: Start,
    certificates: Certificates,
    tmp_path: Path,
    lines: Log,
    where: dict[str, Any],
    verify: bool,
) -> None:
    server = start(tls_verify_peer=verify, **where)
    uri = certificates.uri(server.uri)
    shown = run("nbdinfo", uri).stdout
    assert "with TLS" in shown
    assert f"export-size: {SIZE}" in shown
    data = random.Random(1).randbytes(SIZE)
    (tmp_path / "in").write_bytes(data)
    run("nbdcopy", tmp_path / "in", uri)
    run("nbdcopy", uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    assert lines.errors == []


@pytest.mark.parametrize("where", [{}, {"tcp": ("127.0.0.1", 0)}], ids=["unix", "tcp"])
def test_qemu(
    start: Start, certificates: Certificates, tmp_path: Path, lines: Log, where: dict[str, Any]
) -> None:
    server = start(tls_verify_peer=True, **where)
    (tmp_path / "in").write_bytes(random.Random(2).randbytes(SIZE))
    image = ["driver=raw,file.driver=nbd,file.tls-creds=t,file.tls-hostname=localhost"]
    if server.socket:
        image += ["file.server.type=unix", f"file.server.path={server.socket}"]
    else:
        image += ["file.server.type=inet", "file.server.host=127.0.0.1"]
        image += [f"file.server.port={server.port}"]
    folder = certificates["good"]
    credentials = f"tls-creds-x509,id=t,dir={folder},endpoint=client"
    qemu = ["qemu-img", "convert", "--object", credentials]
    there = ",".join(image)
    run(*qemu, "-n", "--target-image-opts", "-f", "raw", tmp_path / "in", there)
    run(*qemu, "--image-opts", there, "-O", "raw", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()
    assert lines.errors == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_openssl(start: Start, certificates: Certificates, version: ssl.TLSVersion) -> None:
    client = begin(start())
    made = context(certificates["good"])
    made.minimum_version = made.maximum_version = version
    client.sock = made.wrap_socket(client.sock, server_hostname="localhost")
    with client:
        go(client)
        client.ask(WRITE, 1, 100, 5, payload=b"bytes")
        assert client.simple() == (1, 0, b"")
        client.ask(READ, 2, 99, 7)
        assert client.simple(7) == (2, 0, b"\0bytes\0")


def test_the_uri_says_that_tls_is_needed(start: Start) -> None:
    assert start().uri.startswith("nbds+unix:///")
    assert start(tcp=("127.0.0.1", 0)).uri.startswith("nbds://127.0.0.1:")
    assert start(tls="on").uri.startswith("nbd+unix:///")
    assert start(tls="off").uri.startswith("nbd+unix:///")


def test_goodbye_is_said_to_a_client_that_leaves(start: Start, certificates: Certificates) -> None:
    with secure(start(), certificates["good"]) as client:
        go(client)
        client.send(client.request(2))
        assert client.sock.recv(1) == b""  # raises where the stream just ends


def test_extended_headers_over_tls(start: Start, certificates: Certificates) -> None:
    uri = certificates.uri(start().uri)
    shown = run(next_peer("nbdinfo"), uri).stdout
    assert "with TLS, using extended packets" in shown
    assert (
        "using structured packets"
        in run(next_peer("nbdinfo"), certificates.uri(start(extended_headers=False).uri)).stdout
    )


# --- off, on, require ----------------------------------------------------------------------------


def test_off(start: Start) -> None:
    server = start(tls="off")
    assert server.socket is not None
    with Raw(server.socket, go=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        client.option(STARTTLS)
        assert client.reply()[1] == UNSUP
        go(client)


class Watched(Plugin):
    """Says what it was asked, and how."""

    name = "watched"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, bool]] = []
        self.sessions: list[Session] = []
        self.closed = 0

    def list_exports(self, readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
        self.asked.append(("list", is_tls))
        return [("secret-name", "secret description")]

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        self.asked.append(("default", is_tls))
        return "secret-name"

    def open(self, session: Session) -> Device:
        self.asked.append(("open", session.is_tls))
        self.sessions.append(session)
        return WatchedDevice(self)


class WatchedDevice(Device):
    def __init__(self, plugin: Watched) -> None:
        self.plugin = plugin

    def get_size(self) -> int:
        return 12345

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return bytes(count)

    def export_description(self) -> str:
        return "secret description"

    def close(self) -> None:
        self.plugin.closed += 1


def test_require_tells_a_client_in_the_clear_nothing(
    start: Start, certificates: Certificates
) -> None:
    plugin = Watched()
    server = start(source=plugin)
    assert server.socket is not None
    shown = run("nbdinfo", f"nbd+unix:///?socket={server.socket}", check=False)
    assert shown.returncode != 0
    with Raw(server.socket, go=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        query = struct.pack(">I", 11) + b"secret-name"
        for option, data in (
            (LIST, b""),
            (6, query + bytes(2)),
            (GO, query + bytes(2)),
            (STRUCTURED, b""),
            (9, query + bytes(4)),
            (10, query + bytes(4)),
            (11, b""),
        ):
            client.option(option, data)
            _, kind, text = client.reply()
            assert kind == TLS_REQD
            assert b"secret" not in text
        client.option(1, b"secret-name")
        assert client.at_end()
    assert plugin.asked == []
    with secure(server, certificates["good"]) as client:
        client.option(LIST)
        assert b"secret-name" in client.reply()[2]
        assert client.reply()[1] == ACK
        go(client)
    assert plugin.asked == [("list", True), ("default", True), ("open", True)]


def test_on_lets_both_in(start: Start, certificates: Certificates) -> None:
    plugin = Watched()
    server = start(source=plugin, tls="on")
    run("nbdinfo", "--size", server.uri)
    run("nbdinfo", "--size", certificates.uri(server.uri))
    assert [session.is_tls for session in plugin.sessions] == [False, True]


def test_what_was_opened_in_the_clear_is_closed_and_opened_anew(
    start: Start, certificates: Certificates
) -> None:
    plugin = Watched()
    server = start(source=plugin, tls="on")
    assert server.socket is not None
    with Raw(server.socket, go=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        client.option(6, bytes(6))  # INFO
        while client.reply()[1] != ACK:
            pass
        assert (len(plugin.sessions), plugin.closed) == (1, 0)
        client.option(STARTTLS)
        assert client.reply()[1] == ACK
        assert plugin.closed == 1
        made = context(certificates["good"])
        client.sock = made.wrap_socket(client.sock, server_hostname="localhost")
        go(client)
        assert plugin.asked[-1] == ("open", True)
        assert len(plugin.sessions) == 2


def test_plaintext_behind_starttls_is_not_taken_for_protocol(
    start: Start, certificates: Certificates, lines: Log
) -> None:
    """What somebody on the way slips in behind the request for TLS: TLS gets it, and refuses."""
    plugin = Watched()
    server = start(source=plugin)
    assert server.socket is not None
    with Raw(server.socket, go=False) as client:
        client.receive(18)
        injected = b"IHAVEOPT" + struct.pack(">II", LIST, 0)
        client.send(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", STARTTLS, 0) + injected)
        assert client.reply() == (STARTTLS, ACK, b"")
        with pytest.raises((ssl.SSLError, OSError)):
            context(certificates["good"]).wrap_socket(client.sock, server_hostname="localhost")
    lines.wait_for("TLS: what the client sends is not TLS")
    assert plugin.asked == []
    is_alive(server, certificates)


def test_a_hello_in_one_piece_with_starttls(start: Start, certificates: Certificates) -> None:
    server = start()
    assert server.socket is not None
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context(certificates["good"]).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with Raw(server.socket, go=False) as client:
        client.receive(18)
        head = struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", STARTTLS, 0)
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        client.send(head + outgoing.read())
        assert client.reply() == (STARTTLS, ACK, b"")
        while True:
            incoming.write(client.sock.recv(1 << 16))
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                break
        tls.write(b"IHAVEOPT" + struct.pack(">II", 2, 0))
        client.send(outgoing.read())
        while True:
            incoming.write(client.sock.recv(1 << 16))
            with contextlib.suppress(ssl.SSLWantReadError):
                assert tls.read(100)[8:16] == struct.pack(">II", 2, ACK)
                break


# --- Who is refused, and what the operator learns ------------------------------------------------


@pytest.mark.parametrize(
    ("server_files", "client_files"),
    [("good", "other"), ("expired", "good"), ("named", "good")],
    ids=["another CA", "expired", "host name"],
)
def test_the_client_refuses_the_server(
    start: Start,
    certificates: Certificates,
    lines: Log,
    server_files: str,
    client_files: str,
) -> None:
    """libnbd then just leaves; it verifies over TCP alone."""
    server = start(server_files, tcp=("127.0.0.1", 0))
    done = run("nbdinfo", certificates.uri(server.uri, client_files), check=False)
    assert done.returncode != 0
    assert "Error in the certificate verification" in done.stderr
    lines.wait_for("TLS: the client has gone during the handshake: does it trust this server?")
    assert len(lines.errors) == 1


@pytest.mark.parametrize(
    ("server_files", "client_files", "says"),
    [
        ("good", "nobody", "the client has shown no certificate"),
        ("good", "other", "certificate is refused: .*(self.signed|issuer)"),
        ("good", "expired", "certificate is refused: certificate has expired"),
        ("revoked", "good", "certificate is refused: certificate revoked"),
    ],
)
def test_the_server_refuses_the_client(
    start: Start,
    certificates: Certificates,
    lines: Log,
    tmp_path: Path,
    server_files: str,
    client_files: str,
    says: str,
) -> None:
    server = start(server_files, tls_verify_peer=True)
    folder = tmp_path / "client"  # what it thinks of the server is not the question
    shutil.copytree(certificates[client_files], folder)
    shutil.copy(certificates["good"] / "ca-cert.pem", folder)
    uri = certificates.uri(server.uri).replace(str(certificates["good"]), str(folder))
    assert run("nbdinfo", uri, check=False).returncode != 0
    line = lines.wait_for("error: TLS: ")
    assert re.search(says, line), line
    assert len(lines.errors) == 1
    if server_files == "revoked":  # the list revokes one client, and no other
        run("nbdinfo", "--size", certificates.uri(server.uri, "bob"))
    else:
        is_alive(server, certificates)


def test_tls_1_1_is_refused(start: Start, certificates: Certificates, lines: Log) -> None:
    client = begin(start())
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.set_ciphers("ALL:@SECLEVEL=0")
    made.load_verify_locations(certificates["good"] / "ca-cert.pem")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        made.minimum_version = made.maximum_version = ssl.TLSVersion.TLSv1_1
    with client, pytest.raises(ssl.SSLError):
        made.wrap_socket(client.sock, server_hostname="localhost")
    lines.wait_for("error: TLS: the client speaks no TLS 1.2 or newer")


def test_no_cipher_in_common(start: Start, certificates: Certificates, lines: Log) -> None:
    client = begin(start())
    made = context(certificates["good"])
    made.maximum_version = ssl.TLSVersion.TLSv1_2
    made.set_ciphers("AES128-SHA")
    with client, pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        made.wrap_socket(client.sock, server_hostname="localhost")
    lines.wait_for("error: TLS: client and server have no cipher in common")


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.0\r\n\r\n", bytes(64), b"IHAVEOPT" + bytes(8), b"\x16\x03\x01\xff\xff" * 20],
)
def test_garbage_in_place_of_a_hello(
    start: Start, certificates: Certificates, lines: Log, garbage: bytes
) -> None:
    server = start()
    with begin(server) as client:
        client.send(garbage)
        client.sock.shutdown(socket.SHUT_WR)
        while client.sock.recv(100):  # an alert, perhaps
            pass
    line = lines.wait_for("error: TLS: ")
    assert "not TLS" in line
    assert len(lines.errors) == 1
    is_alive(server, certificates)


def test_a_client_that_dies_in_mid_handshake(
    start: Start, certificates: Certificates, lines: Log
) -> None:
    """Wherever it dies: after each byte of what a client says until it has TLS."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = start()
    tls = context(certificates["good"]).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    for count in (0, 1, 5, 100, len(hello) - 1, len(hello)):
        with begin(server) as client:
            client.send(hello[:count])
        lines.wait_for("error: TLS: the client has gone during the handshake")
        assert len(lines.errors) == 1
        lines.lines.clear()
    is_alive(server, certificates)


@pytest.mark.parametrize("stage", ["flags", "option", "hello", "secure"])
@pytest.mark.parametrize("trickle", [False, True])
def test_a_client_that_stalls_is_ended(
    start: Start, certificates: Certificates, lines: Log, stage: str, trickle: bool
) -> None:
    """One limit for all of the negotiation; a byte now and then does not prolong it."""
    server = start(handshake_timeout=0.4)
    assert server.socket is not None
    if stage in ("flags", "option"):
        client = Raw(server.socket, go=False)
        client.receive(18)
        if stage == "option":
            client.send(struct.pack(">I", 3))
    elif stage == "hello":
        client = begin(server)
    else:
        client = secure(server, certificates["good"])
    rest = b"IHAVEOPT" + struct.pack(">II", 99, 1 << 20) + bytes(1 << 16)
    if stage == "flags":
        rest = struct.pack(">I", 3) + rest
    elif stage == "hello":
        rest = b"\x16\x03\x01\x40\0" + bytes(1 << 16)
    begun = time.monotonic()
    with client:
        if trickle:
            with contextlib.suppress(OSError):
                for number in range(len(rest)):
                    client.send(rest[number : number + 1])
                    if lines.errors:
                        break
                    time.sleep(0.02)
        lines.wait_for("error: handshake: the client has not ended it within 0.4 seconds")
        assert client.at_end()
    assert time.monotonic() - begun < LIMIT / 2


def test_the_limit_is_for_the_handshake_alone(start: Start, certificates: Certificates) -> None:
    server = start(handshake_timeout=2)
    with secure(server, certificates["good"]) as client:
        go(client)
        time.sleep(2.1)
        client.ask(READ, count=512)
        assert client.simple(512)[1] == 0


def test_a_broken_record_ends_one_connection(
    start: Start, certificates: Certificates, lines: Log
) -> None:
    server = start()
    with secure(server, certificates["good"]) as client:
        go(client)
        os.write(client.sock.fileno(), b"\x17\x03\x03\x00\x40" + bytes(64))
        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            client.sock.recv(1)
    assert lines.errors == []
    is_alive(server, certificates)


def test_stop_during_the_handshake(start: Start, certificates: Certificates) -> None:
    server = start()
    with begin(server), secure(server, certificates["good"]):
        server.stop()


# --- Who the client is ---------------------------------------------------------------------------


def test_plugins_learn_the_clients_names(start: Start, certificates: Certificates) -> None:
    plugin = Watched()
    server = start(source=plugin, tls_verify_peer=True)
    run("nbdinfo", "--size", certificates.uri(server.uri))
    run("nbdinfo", "--size", certificates.uri(server.uri, "bob"))
    names = [(session.peer_tls_dn, session.peer_tls_issuer_dn) for session in plugin.sessions]
    assert names == [(CLIENT_NAME, CA_NAME), ("CN=bob", CA_NAME)]
    assert [session.peer_tls_user for session in plugin.sessions] == ["", ""]


def test_a_certificate_that_is_not_verified_names_nobody(
    start: Start, certificates: Certificates
) -> None:
    plugin = Watched()
    run("nbdinfo", "--size", certificates.uri(start(source=plugin).uri))
    (session,) = plugin.sessions
    assert session.is_tls
    assert (session.peer_tls_dn, session.peer_tls_issuer_dn) == ("", "")


def test_scripts_learn_the_clients_names(
    start: Start, certificates: Certificates, tmp_path: Path, nbd: ModuleType
) -> None:
    script = tmp_path / "names.py"
    script.write_text(
        "import nbdkit\n"
        "def open(readonly):\n"
        "    return f'{nbdkit.peer_tls_dn()}|{nbdkit.peer_tls_issuer_dn()}|{nbdkit.is_tls()}'\n"
        "def get_size(h): return 512\n"
        "def pread(h, count, offset): return h.encode().ljust(512)[offset:offset + count]\n"
    )
    plugin = pynbdkit.load_plugin(str(script))
    server = start(source=plugin, tls_verify_peer=True)
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(certificates.uri(server.uri))
    assert bytes(handle.pread(512, 0)).decode().strip() == f"{CLIENT_NAME}|{CA_NAME}|True"
    handle.shutdown()


# --- Reading the files again ---------------------------------------------------------------------


def test_new_certificates_are_for_new_clients(
    start: Start, certificates: Certificates, tmp_path: Path, lines: Log
) -> None:
    folder = tmp_path / "pki"
    shutil.copytree(certificates["good"], folder)
    server = start(folder)
    with secure(server, certificates["good"]) as client:
        for file in certificates["other"].iterdir():
            shutil.copy(file, folder)
        assert server.reload_tls()
        go(client)
        run("nbdinfo", "--size", certificates.uri(server.uri, "other"))
        client.ask(READ, count=512)
        assert client.simple(512)[1] == 0
    with pytest.raises(ssl.SSLCertVerificationError):
        secure(server, certificates["good"])
    lines.wait_for("error: TLS: ")
    (folder / "server-key.pem").write_text("")
    assert not server.reload_tls()
    run("nbdinfo", "--size", certificates.uri(server.uri, "other"))


def test_a_list_of_revoked_certificates_is_read_again(
    start: Start, certificates: Certificates, tmp_path: Path, lines: Log
) -> None:
    shutil.copytree(certificates["good"], tmp_path / "pki")
    server = start(tmp_path / "pki", tls_verify_peer=True)
    uri = certificates.uri(server.uri)
    run("nbdinfo", "--size", uri)
    shutil.copy(certificates["revoked"] / "ca-crl.pem", tmp_path / "pki")
    assert server.reload_tls()
    assert run("nbdinfo", "--size", uri, check=False).returncode != 0
    lines.wait_for("certificate revoked")


# --- Under load ----------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [[], ["delay"]], ids=["quick", "blocking"])
def test_a_storm_of_requests(
    start: Start, certificates: Certificates, nbd: Any, filters: list[str], lines: Log
) -> None:
    """Replies of several threads, out of order, and requests meanwhile: every byte is right."""
    plugin = pynbdkit.load_plugin("memory", size="4M")
    parameters = {"rdelay": "300us", "wdelay": "300us"} if filters else {}
    server = start(
        source=plugin, filters=filters, parameters=parameters, tls_verify_peer=True, threads=8
    )
    clients = []
    for _ in range(2):
        client = nbd.NBD()
        client.set_uri_allow_local_file(True)
        client.add_meta_context("base:allocation")
        client.connect_uri(certificates.uri(server.uri))
        assert client.get_tls_negotiated()
        clients.append(client)
    storm = Storm(nbd, clients, bytes(4 << 20), seed=7)
    storm.run(800)
    found = b"".join(clients[0].pread(1 << 20, start) for start in range(0, 4 << 20, 1 << 20))
    storm.compare(found, storm.content, 0, "the end")
    for client in clients:
        client.shutdown()
    assert lines.errors == []


def test_a_client_that_reads_nothing_holds_up_nobody(
    start: Start, certificates: Certificates
) -> None:
    server = start()
    with secure(server, certificates["good"]) as client:
        go(client)
        for cookie in range(64):
            client.ask(READ, cookie, 0, SIZE // 2)
        is_alive(server, certificates)
        for cookie in range(64):
            assert client.simple(SIZE // 2) == (cookie, 0, bytes(SIZE // 2))


# --- Pre-shared keys -----------------------------------------------------------------------------


WHO = """
from pynbdkit import Device, Plugin

class Who(Plugin):
    def open(self, session):
        return Name(session.peer_tls_user.encode().ljust(512))

class Name(Device):
    def __init__(self, text):
        self.text = text

    def get_size(self):
        return len(self.text)

    def pread(self, count, offset, flags):
        return self.text[offset : offset + count]
"""
"""A disk that holds the name of the client's key."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys.psk as psktool makes it, and others that are not the server's."""
    folder = tmp_path_factory.mktemp("keys")
    for name, user in (("good", "alice"), ("wrong", "alice"), ("unknown", "eve")):
        (folder / name).mkdir()
        run("psktool", "-u", user, "-p", folder / name / "keys.psk")
        (folder / name / "keys.psk").chmod(0o600)
    return folder


@pytest.fixture
def with_keys(keys: Path, sockdir: Path) -> Iterator[ServerProcess]:
    """A server in a Python that has pre-shared keys."""
    has_psk = hasattr(ssl.SSLContext, "set_psk_server_callback")
    python = sys.executable if has_psk else next_peer("python3")
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    code += "from pynbdkit.cli.main import run; run()"
    file = keys / "good" / "keys.psk"
    plugin = sockdir / "who.py"
    plugin.write_text(WHO)
    words: list[str | Path] = ["--tls=require", f"--tls-psk={file}", plugin]
    with ServerProcess(sockdir, words, [python, "-c", code]) as server:
        yield server
    assert "Traceback" not in server.log()


def psk_uri(server: ServerProcess, keys: Path, user: str = "alice") -> str:
    return f"nbds+unix://{user}@/?socket={server.socket}&tls-psk-file={keys / 'keys.psk'}"


def psk_qemu(server: ServerProcess, keys: Path, user: str, version: str) -> list[str]:
    priority = "NORMAL:-VERS-ALL:+VERS-TLS" + version
    return [
        "qemu-img",
        "info",
        "--object",
        f"tls-creds-psk,id=t,dir={keys},username={user},endpoint=client,priority={priority}",
        "--image-opts",
        f"driver=nbd,server.type=unix,server.path={server.socket},tls-creds=t",
    ]


def test_keys(with_keys: ServerProcess, keys: Path, nbd: Any) -> None:
    uri = psk_uri(with_keys, keys / "good")
    assert "with TLS" in run("nbdinfo", uri).stdout
    for version in ("1.2", "1.3"):
        run(*psk_qemu(with_keys, keys / "good", "alice", version))
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(uri)
    assert bytes(handle.pread(5, 0)) == b"alice"
    handle.shutdown()


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_wrong_keys(
    with_keys: ServerProcess, keys: Path, certificates: Certificates, version: str
) -> None:
    for name, user, says in (
        ("wrong", "alice", "the client has not the key of user 'alice'"),
        ("unknown", "eve", "there is no user 'eve' among the pre-shared keys"),
    ):
        done = run(*psk_qemu(with_keys, keys / name, user, version), check=False)
        assert done.returncode != 0
        assert f"error: TLS: {says}" in with_keys.log()
        assert run("nbdinfo", psk_uri(with_keys, keys / name, user), check=False).returncode
    done = run("nbdinfo", certificates.uri(with_keys.uri), check=False)
    assert done.returncode != 0
    assert "it offers no pre-shared key" in with_keys.log()
    run("nbdinfo", "--size", psk_uri(with_keys, keys / "good"))


# --- In somebody's own program -------------------------------------------------------------------


def test_serve_refuses_what_cannot_be_meant(certificates: Certificates) -> None:
    good = certificates["good"]
    plugin = pynbdkit.load_plugin("memory", size=SIZE)
    for options, says in (
        ({"tls": "yes"}, "tls is 'yes', not 'off', 'on' or 'require'"),
        ({"tls_certificates": good}, "no tls: say tls='require'"),
        ({"tls_verify_peer": True}, "no tls: say tls='require'"),
        ({"tls_psk": "keys"}, "no tls: say tls='require'"),
        ({"tls": "require", "tls_certificates": good / "none"}, "none is not a folder"),
        ({"tls": "on", "tls_certificates": good, "oldstyle": True}, "the oldstyle has no TLS"),
    ):
        with pytest.raises(pynbdkit.ConfigError, match=re.escape(says)):
            pynbdkit.serve(plugin, **options)


def test_oldstyle(start: Start, nbd: Any) -> None:
    server = start(tls="off", oldstyle=True)
    handle = nbd.NBD()
    handle.connect_unix(server.socket)
    assert handle.get_protocol() == "oldstyle"
    handle.pwrite(b"old", 7)
    assert bytes(handle.pread(5, 6)) == b"\0old\0"
    handle.shutdown()
    assert not server.reload_tls()


def test_many_clients_leave_nothing_behind(start: Start, certificates: Certificates) -> None:
    server = start()

    def visit(count: int) -> None:
        for number in range(count):
            with contextlib.closing(secure(server, certificates["good"])) as client:
                if number % 2:
                    go(client)
        deadline = time.monotonic() + LIMIT
        while server.connections:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    visit(2)
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    visit(30)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads
