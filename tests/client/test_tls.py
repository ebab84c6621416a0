"""The client's TLS against servers that use GnuTLS (nbdkit, qemu-nbd), and against broken ones."""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from pynbdkit.cli import pynbd
from pynbdkit.client import connect, parse_uri
from pynbdkit.client import tls as client_tls
from pynbdkit.client.tls import TlsError
from pynbdkit.protocol import constants as nbd
from pynbdkit.protocol.errors import HandshakeError, ProtocolError
from pynbdkit.protocol.handshake_server import ExportInfo, ExportSource, ServerHandshake
from pynbdkit.protocol.requests import encode_request
from support import ROOT, ServerProcess, next_peer, program, run

Nbdkit = Callable[..., ServerProcess]
Capture = pytest.CaptureFixture[str]


# --- Certificates --------------------------------------------------------------------------------


class Pki:
    """Folders of certificates, each with the file names of nbdkit and libnbd.

    good: of the CA, for localhost and 127.0.0.1, and a client's.
    other: all of it of another CA. expired, named, revoked: a server's of the first CA that is out
    of date, for other.example.com, or on the list ca-crl.pem. ca: ca-cert.pem alone.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("good", "other"):
            self._authority(name)
            self._issue(
                name, "server", "cn=localhost", "dns_name=localhost", "ip_address=127.0.0.1"
            )
            self._issue(name, "client", "cn=alice", use="tls_www_client")
        for name in ("expired", "named", "revoked", "ca"):
            self.folder(name).mkdir()
            for file in ("ca-cert.pem", "ca-key.pem"):
                (self.folder(name) / file).write_bytes((self.folder("good") / file).read_bytes())
        past = 'activation_date="2020-01-01 00:00:00"', 'expiration_date="2020-02-01 00:00:00"'
        self._issue("expired", "server", "cn=localhost", "dns_name=localhost", *past)
        self._issue("named", "server", "cn=other.example.com", "dns_name=other.example.com")
        self._issue("revoked", "server", "cn=localhost", "dns_name=localhost")
        revoked = self.folder("revoked")
        self._certtool(
            *("--generate-crl", "--load-certificate", revoked / "server-cert.pem"),
            *("--load-ca-certificate", revoked / "ca-cert.pem"),
            *("--load-ca-privkey", revoked / "ca-key.pem"),
            *("--template", self._template("crl_next_update=365", "crl_number=1")),
            *("--outfile", revoked / "ca-crl.pem"),
        )
        self.keys = root / "keys.psk"
        self.keys.write_text("bob:" + "11" * 32 + "\nalice:" + "5a" * 32 + "\n")

    def folder(self, name: str) -> Path:
        return self.root / name

    def uri(self, server: ServerProcess, certificates: str | Path = "good", **more: str) -> str:
        """The URI of a server on a Unix socket; ``more`` are its tls_ parameters."""
        text = server.uri.replace("nbd", "nbds", 1)
        if certificates:
            more = {"tls_certificates": str(self.root / certificates), **more}
        given = [f"&{name.replace('_', '-')}={quote(value)}" for name, value in more.items()]
        return text + "".join(given)

    def _certtool(self, *words: str | Path) -> None:
        run("certtool", *words)

    def _template(self, *lines: str) -> Path:
        path = self.root / "template"
        path.write_text("\n".join(lines) + "\n")
        return path

    def _key(self, path: Path) -> Path:
        self._certtool("--generate-privkey", "--key-type", "ecdsa", "--outfile", path)
        return path

    def _authority(self, name: str) -> None:
        folder = self.folder(name)
        folder.mkdir()
        self._certtool(
            *("--generate-self-signed", "--load-privkey", self._key(folder / "ca-key.pem")),
            *(
                "--template",
                self._template(f"cn=CA {name}", "ca", "cert_signing_key", "crl_signing_key"),
            ),
            *("--outfile", folder / "ca-cert.pem"),
        )

    def _issue(self, name: str, who: str, *lines: str, use: str = "tls_www_server") -> None:
        folder = self.folder(name)
        self._certtool(
            *("--generate-certificate", "--load-privkey", self._key(folder / f"{who}-key.pem")),
            *("--load-ca-certificate", folder / "ca-cert.pem"),
            *("--load-ca-privkey", folder / "ca-key.pem"),
            *("--template", self._template(*lines, use, "encryption_key", "signing_key")),
            *("--outfile", folder / f"{who}-cert.pem"),
        )


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def secure(nbdkit: Nbdkit, pki: Pki) -> ServerProcess:
    """nbdkit that requires TLS, with good certificates."""
    return nbdkit("--tls=require", f"--tls-certificates={pki.folder('good')}", "memory", "1M")


# --- What works ----------------------------------------------------------------------------------


def test_every_command_over_tls(secure: ServerProcess, pki: Pki) -> None:
    with connect(pki.uri(secure)) as client:
        assert client.tls
        assert client.structured_replies
        content = bytes(range(256)) * 4096  # More than one record holds.
        client.write(content, 0, fua=True)
        assert client.read(len(content), 0) == content
        client.zero(512, 0)
        client.trim(512, 512)
        client.flush()
        assert client.block_status(1024**2, 0) != []
    assert secure.stop() == 0
    # No complaint about this, its second connection (the fixture's wait was the first).
    assert "memory[2]" not in secure.log()


def test_the_connection_has_tls_1_2_at_least(pki: Pki) -> None:
    context = client_tls.context_for(parse_uri(f"nbds://h/?tls-certificates={pki.folder('good')}"))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.options & ssl.OP_NO_COMPRESSION


@pytest.mark.parametrize("offer", ["on", "require"])
def test_info_is_nbdinfos(nbdkit: Nbdkit, pki: Pki, capsys: Capture, offer: str) -> None:
    server = nbdkit(f"--tls={offer}", f"--tls-certificates={pki.folder('good')}", "memory", "1M")
    uri = pki.uri(server, tls_hostname="localhost", tls_verify_peer="false")
    for words in ([], ["--list"]):
        assert pynbd.main(["info", uri, *words]) == 0
        theirs = run(next_peer("nbdinfo"), "--no-content", *words, uri).stdout
        assert capsys.readouterr().out == theirs
        assert theirs.startswith("protocol: newstyle-fixed with TLS, using structured packets\n")
    assert pynbd.main(["info", "--json", uri]) == 0
    mine = json.loads(capsys.readouterr().out)
    del mine["listing"]
    assert mine == json.loads(run(next_peer("nbdinfo"), "--no-content", "--json", uri).stdout)
    assert mine["TLS"] is True


def test_qemu_nbd(sockdir: Path, pki: Pki) -> None:
    """TLS and extended headers at once, of somebody else."""
    disk = sockdir / "disk"
    disk.write_bytes(b"\0" * 65536 + b"x" * 65536)
    path = sockdir / "qemu.sock"
    run(
        *(next_peer("qemu-nbd"), "--fork", "-f", "raw", "-k", path, disk),
        *("--object", f"tls-creds-x509,id=tls0,endpoint=server,dir={pki.folder('good')}"),
        *("--tls-creds", "tls0"),
    )
    uri = f"nbds+unix:///?socket={path}&tls-certificates={pki.folder('good')}"
    with connect(uri) as client:
        assert (client.tls, client.extended_headers) == (True, True)
        assert client.read(131072, 0) == disk.read_bytes()
        assert client.block_status(131072, 0)


def test_our_own_server(serve: Callable[..., ServerProcess], pki: Pki, capsys: Capture) -> None:
    """TLS, a client's certificate and extended headers on both sides."""
    good = f"--tls-certificates={pki.folder('good')}"
    server = serve("--tls=require", "--tls-verify-peer", good, "memory", "1G")
    uri = pki.uri(server, tls_hostname="localhost")
    with connect(uri) as client:
        assert (client.tls, client.extended_headers) == (True, True)
        content = bytes(range(256)) * 4096
        client.write(content, 512, fua=True)
        assert client.read(len(content), 512) == content
        client.zero(1024**3, 0)
        assert client.block_status(1024**3, 0) == [(1024**3, 3)]
    assert pynbd.main(["info", uri]) == 0
    mine = capsys.readouterr().out
    assert mine == run(next_peer("nbdinfo"), "--no-content", uri).stdout
    assert mine.startswith("protocol: newstyle-fixed with TLS, using extended packets\n")
    with pytest.raises(TlsError, match="wants a client's certificate"):
        connect(pki.uri(server, "ca"))
    with pytest.raises(TlsError, match=r"client-cert|client's certificate"):
        connect(pki.uri(server, "other", tls_verify_peer="false"))


@contextmanager
def tcp(*arguments: str) -> Iterator[int]:
    """nbdkit on a free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = 'exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" -f "$@"'
        server = subprocess.Popen(
            ["sh", "-c", command, program("nbdkit"), *arguments], stdin=listener.fileno()
        )
        try:
            yield listener.getsockname()[1]
        finally:
            server.terminate()
            server.wait()


def test_the_name_of_the_host_is_verified(pki: Pki) -> None:
    certificates = f"tls-certificates={pki.folder('good')}"
    with tcp("--tls=require", f"--tls-{certificates[4:]}", "memory", "1M") as port:
        for host in ("localhost", "127.0.0.1"):
            with connect(f"nbds://{host}:{port}/?{certificates}") as client:
                assert client.size == 1024**2
    named = f"--tls-certificates={pki.folder('named')}"
    with tcp("--tls=require", named, "memory", "1M") as port:
        for host in ("localhost", "127.0.0.1"):
            with pytest.raises(TlsError, match=host):
                connect(f"nbds://{host}:{port}/?{certificates}")
        uri = f"nbds://127.0.0.1:{port}/?{certificates}"
        with connect(uri + "&tls-hostname=other.example.com") as client:
            assert client.size == 1024**2
        with connect(uri + "&tls-verify-peer=false") as client:
            assert client.size == 1024**2


def test_on_a_unix_socket_the_ca_is_verified_alone(nbdkit: Nbdkit, pki: Pki) -> None:
    server = nbdkit("--tls=require", f"--tls-certificates={pki.folder('named')}", "memory", "1M")
    with connect(pki.uri(server)) as client:
        assert client.tls
    with pytest.raises(TlsError, match=r"localhost.*tls-hostname=NAME"):
        connect(pki.uri(server, tls_hostname="localhost"))


def test_a_clients_certificate(nbdkit: Nbdkit, pki: Pki) -> None:
    good = f"--tls-certificates={pki.folder('good')}"
    server = nbdkit("--tls=require", "--tls-verify-peer", good, "memory", "1M")
    with connect(pki.uri(server)) as client:
        assert client.size == 1024**2
    with pytest.raises(TlsError, match="client's certificate"):
        connect(pki.uri(server, "ca"))
    # Of another CA; the server's own is not verified, so that it is the server that refuses.
    with pytest.raises(TlsError, match=r"client-cert|client's certificate"):
        connect(pki.uri(server, "other", tls_verify_peer="false"))


# --- Servers that are not to be trusted ----------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "client", "words"),
    [
        ("other", "good", "good/ca-cert.pem is another's"),
        ("expired", "good", "certificate has expired"),
        ("revoked", "revoked", "certificate revoked"),
    ],
)
def test_a_certificate_that_is_no_good(
    nbdkit: Nbdkit, pki: Pki, capsys: Capture, server: str, client: str, words: str
) -> None:
    running = nbdkit("--tls=require", f"--tls-certificates={pki.folder(server)}", "memory", "1M")
    uri = pki.uri(running, client)
    with pytest.raises(TlsError) as caught:
        connect(uri)
    assert str(caught.value).startswith("the server's certificate is not to be trusted: ")
    assert words in str(caught.value)
    assert pynbd.main(["info", uri]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line == f"pynbd: {uri}: {caught.value}"
    with connect(pki.uri(running, client, tls_verify_peer="false")) as insecure:
        assert insecure.size == 1024**2


def test_the_system_does_not_know_a_ca_of_ones_own(
    secure: ServerProcess, pki: Pki, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(client_tls, "ROOTS_FOLDER", str(tmp_path / "etc"))
    with pytest.raises(TlsError, match="tls-certificates=DIR has whom to believe"):
        connect(pki.uri(secure, "", tls_hostname="localhost"))
    # Anybody's certificate would do: the system believes them all, and no name is wanted.
    with pytest.raises(TlsError, match=r"Unix socket.*tls-hostname=NAME"):
        connect(pki.uri(secure, ""))


@pytest.mark.parametrize("root", [True, False])
def test_default_folders(
    secure: ServerProcess, pki: Pki, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: bool
) -> None:
    folder = tmp_path / (".config/pki/libnbd" if not root else "etc")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(pki.folder("good"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(client_tls, "ROOTS_FOLDER", str(tmp_path / "etc"))
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    with connect(pki.uri(secure, "")) as client:
        assert client.tls
    if not root:
        (tmp_path / ".pki").mkdir()
        (tmp_path / ".pki" / "libnbd").symlink_to(pki.folder("other"))
        with pytest.raises(TlsError, match=r"\.pki/libnbd/ca-cert\.pem is another's"):
            connect(pki.uri(secure, ""))


# --- Servers without TLS, and those that require it ----------------------------------------------


@pytest.mark.parametrize("option", ["--tls=off", "-o", "--mask-handshake=0"])
def test_a_server_without_tls(nbdkit: Nbdkit, pki: Pki, capsys: Capture, option: str) -> None:
    server = nbdkit(option, "memory", "1M")
    with pytest.raises(HandshakeError, match="TLS"):
        connect(pki.uri(server))
    for words in ([], ["--list"]):
        assert pynbd.main(["info", pki.uri(server), *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "TLS" in line


def test_a_server_that_requires_tls(secure: ServerProcess, capsys: Capture) -> None:
    with pytest.raises(HandshakeError, match="requires TLS: use a URI that begins with nbds"):
        connect(secure.uri)
    assert pynbd.main(["info", secure.uri]) == 1
    assert "nbds" in capsys.readouterr().err


# --- Files ---------------------------------------------------------------------------------------


def test_files_that_are_missing_or_wrong(pki: Pki, tmp_path: Path) -> None:
    good = pki.folder("good")
    names = ("ca-cert.pem", "client-cert.pem", "client-key.pem")
    uri = parse_uri(f"nbds://localhost/?tls-certificates={tmp_path}")

    def reset(*without: str) -> None:
        for name in (*names, "ca-crl.pem"):
            (tmp_path / name).unlink(missing_ok=True)
        for name in names:
            if name not in without:
                (tmp_path / name).write_bytes((good / name).read_bytes())

    def complaint() -> str:
        with pytest.raises(TlsError) as caught:
            client_tls.context_for(uri)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for name in names:
        reset(name)
        assert str(tmp_path / name) in complaint()
    for name in (*names, "ca-crl.pem"):
        reset()
        (tmp_path / name).write_text("nothing\n")
        assert str(tmp_path / name) in complaint()
    reset()
    other = pki.folder("other") / "client-key.pem"
    (tmp_path / "client-key.pem").write_bytes(other.read_bytes())
    assert "does not belong to the certificate" in complaint()
    reset()
    run(
        *("certtool", "--to-p8", "--password=secret", "--load-privkey", good / "client-key.pem"),
        *("--outfile", tmp_path / "client-key.pem"),
    )
    assert "the key is encrypted" in complaint()
    reset()
    client_tls.context_for(uri)
    missing = parse_uri(f"nbds://localhost/?tls-certificates={tmp_path}/none")
    with pytest.raises(TlsError, match="none is not a folder"):
        client_tls.context_for(missing)


def test_no_server_is_asked_before_the_files_are_right(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"ca-cert\.pem is missing"):
        connect(f"nbds+unix:///?socket={tmp_path}/none&tls-certificates={tmp_path}")


# --- Pre-shared keys -----------------------------------------------------------------------------


def test_pre_shared_keys_need_a_newer_python(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssl, "HAS_PSK", False, raising=False)
    with pytest.raises(TlsError, match=r"tls-psk-file: .* Python 3\.13"):
        connect(f"nbds://alice@localhost/?tls-psk-file={pki.keys}")


def with_psk(uri: str) -> str:
    """What `pynbd info` says about a URI on a Python that has pre-shared keys."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    code += "from pynbdkit.cli.pynbd import main; sys.exit(main(['info', sys.argv[1]]))"
    python = sys.executable if getattr(ssl, "HAS_PSK", False) else next_peer("python3")
    done = run(python, "-c", code, uri, check=False)
    assert done.returncode == (1 if done.stderr else 0)
    assert len(done.stderr.splitlines()) <= 1
    return done.stdout or done.stderr.removeprefix(f"pynbd: {uri}: ")


def test_pre_shared_keys(nbdkit: Nbdkit, secure: ServerProcess, pki: Pki, tmp_path: Path) -> None:
    server = nbdkit("--tls=require", f"--tls-psk={pki.keys}", "memory", "1M")

    def uri(user: str, keys: Path, of: ServerProcess = server) -> str:
        text = pki.uri(of, "", tls_psk_file=str(keys))
        return text.replace("nbds+unix://", f"nbds+unix://{user}@")

    assert with_psk(uri("alice", pki.keys)).startswith("protocol: newstyle-fixed with TLS")
    wrong = tmp_path / "wrong.psk"
    wrong.write_text("alice:" + "5b" * 32 + "\nmallory:" + "5a" * 32 + "\neve:nohex\n")
    for user in ("alice", "mallory"):
        assert "know the user" in with_psk(uri(user, wrong))
    assert "no key of the user 'nobody'" in with_psk(uri("nobody", wrong))
    assert "hexadecimal" in with_psk(uri("eve", wrong))
    assert "No such file" in with_psk(uri("alice", tmp_path / "none"))
    # A server without the key cannot get away with a certificate, which is not verified.
    assert "pre-shared keys" in with_psk(uri("alice", pki.keys, secure))
    # And one that has keys alone has no use for certificates.
    assert "pre-shared key" in with_psk(pki.uri(server))


# --- Servers that break off or break the rules ---------------------------------------------------

ACK_STARTTLS = struct.pack(">QIII", 0x3E889045565A9, nbd.OPT_STARTTLS, nbd.REP_ACK, 0)
Play = Callable[..., str]


@pytest.fixture
def play(sockdir: Path, pki: Pki) -> Iterator[Play]:
    """play(serve, more): the URI of a server that grants STARTTLS, sends more, then is `serve`."""
    path = sockdir / "broken.sock"
    threads = []

    def start(serve: Callable[[socket.socket], None], more: bytes = b"") -> str:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            with listener:
                connected, _ = listener.accept()
            with connected:
                connected.settimeout(30)
                connected.sendall(b"NBDMAGICIHAVEOPT\0\3")
                connected.recv(4 + 16, socket.MSG_WAITALL)
                connected.sendall(ACK_STARTTLS + more)
                try:
                    serve(connected)
                except ConnectionError:  # The client left: with bytes unread, by a reset.
                    pass

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return f"nbds+unix:///?socket={path}&tls-certificates={pki.folder('good')}"

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def hello(sock: socket.socket) -> None:
    assert sock.recv(65536)[0] == 0x16


def test_plain_bytes_behind_the_ack(play: Play) -> None:
    injected = struct.pack(">QIII", 0x3E889045565A9, nbd.OPT_EXTENDED_HEADERS, nbd.REP_ACK, 0)
    with pytest.raises(ProtocolError, match="plain data"):
        connect(play(lambda sock: None, injected))


def test_garbage_instead_of_tls(play: Play) -> None:
    def serve(sock: socket.socket) -> None:
        hello(sock)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        sock.recv(65536)

    with pytest.raises(TlsError, match="what the server sent is not TLS"):
        connect(play(serve))


@pytest.mark.parametrize("head", [b"", b"\x16\x03\x03\x01\x00\x02\x00\x00\xfc\x03\x03"])
def test_a_server_that_dies_in_mid_handshake(play: Play, head: bytes) -> None:
    def serve(sock: socket.socket) -> None:
        hello(sock)
        sock.sendall(head)

    with pytest.raises(TlsError, match="closed the connection during TLS") as caught:
        connect(play(serve))
    assert "_ssl.c" not in str(caught.value)


def test_an_alert_is_told_in_words(play: Play) -> None:
    def serve(sock: socket.socket) -> None:
        hello(sock)
        sock.sendall(b"\x15\x03\x03\0\2\2" + bytes([115]))  # unknown_psk_identity
        sock.recv(65536)

    with pytest.raises(TlsError, match="ended TLS: it does not know the user"):
        connect(play(serve))


def test_a_server_that_is_silent(play: Play) -> None:
    done = threading.Event()

    def serve(sock: socket.socket) -> None:
        hello(sock)
        done.wait(30)

    try:
        with pytest.raises(TimeoutError) as caught:
            connect(play(serve), timeout=0.05)
    finally:
        done.set()
    assert "_ssl.c" not in str(caught.value)


def over_tls(pki: Pki, then: Callable[[ssl.SSLSocket], None]) -> Callable[[socket.socket], None]:
    """A server that runs TLS, answers no option but the first, and then is `then`."""

    def serve(sock: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        good = pki.folder("good")
        context.load_cert_chain(good / "server-cert.pem", good / "server-key.pem")
        with context.wrap_socket(sock, server_side=True) as encrypted:
            assert encrypted.recv(16) == b"IHAVEOPT" + struct.pack(">II", 11, 0)
            then(encrypted)

    return serve


def test_a_server_that_leaves_behind_the_handshake(play: Play, pki: Pki) -> None:
    with pytest.raises(TlsError, match="closed the connection during TLS"):
        connect(play(over_tls(pki, lambda sock: None)))


def test_a_server_that_leaves_later(play: Play, pki: Pki) -> None:
    def serve(sock: ssl.SSLSocket) -> None:
        sock.sendall(struct.pack(">QIII", 0x3E889045565A9, 11, nbd.REP_ACK, 0))
        sock.recv(1024)

    with pytest.raises(ProtocolError, match="closed the connection instead of answering"):
        connect(play(over_tls(pki, serve)))


def test_close_says_goodbye_and_does_not_wait(play: Play, pki: Pki) -> None:
    """The end of TLS is told (close_notify), to a server that never answers it."""
    ends: list[bytes] = []
    told, closed = threading.Event(), threading.Event()

    class Exports(ExportSource):
        def list_exports(self) -> list[tuple[str, str]]:
            return []

        def open(self, name: str) -> ExportInfo:
            return ExportInfo(name, 512, nbd.FLAG_HAS_FLAGS)

    def serve(sock: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        good = pki.folder("good")
        context.load_cert_chain(good / "server-cert.pem", good / "server-key.pem")
        handshake = ServerHandshake(Exports(), extended_headers=False)
        handshake.greeting()
        handshake.receive(b"\0\0\0\3")
        # Without close_notify the end of the connection is an SSLEOFError.
        with context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as encrypted:
            while handshake.state == "OPTIONS":
                encrypted.sendall(handshake.receive(encrypted.recv(4096)))
            ends.append(encrypted.recv(4096))
            closed.wait(30)
            ends.append(encrypted.recv(4096))
            told.set()

    client = connect(play(serve))
    client.close()
    closed.set()
    assert told.wait(30)
    assert ends == [encode_request(nbd.CMD_DISC, 1), b""]


def test_old_versions_of_tls_are_refused(play: Play, pki: Pki) -> None:
    def serve(sock: socket.socket) -> None:
        hello(sock)
        # A server hello of TLS 1.1 (version 3.2) with TLS_RSA_WITH_AES_128_CBC_SHA.
        body = b"\x03\x02" + bytes(32) + b"\0" + b"\0\x2f" + b"\0"
        body = b"\x02" + len(body).to_bytes(3, "big") + body
        sock.sendall(b"\x16\x03\x02" + len(body).to_bytes(2, "big") + body)
        sock.recv(65536)

    with pytest.raises(TlsError, match=r"version|protocol"):
        connect(play(serve))


def test_a_command_without_tls_does_not_load_it() -> None:
    code = (
        "import sys; from pynbdkit.cli import pynbd; pynbd.main(['info', 'nbd+unix:///?socket=/n']);"
        "print('ssl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
