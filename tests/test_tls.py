"""Credentials: which files are read, what is wrong with them, who a certificate names."""

from __future__ import annotations

import os
import shutil
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certificates import CA_NAME, CLIENT_NAME, Certificates, certificates
from pynbdkit import ConfigError, log, tls
from pynbdkit.tls import Credentials, distinguished_name, peer_names, read_keys
from support import run

__all__ = ["certificates"]

HAS_PSK = hasattr(ssl.SSLContext, "set_psk_server_callback")


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the log says."""
    said: list[str] = []
    sink, log._sink = log._sink, said.append
    yield said
    log._sink = sink


@pytest.fixture
def folder(certificates: Certificates, tmp_path: Path) -> Path:
    """A copy of the good certificates, to be spoilt."""
    shutil.copytree(certificates["good"], tmp_path / "pki")
    return tmp_path / "pki"


def meet(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a TLS connection in memory, after the handshake. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server, server_hostname=name)
    waiting = [theirs, ours]
    for _ in range(6):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    return ours, theirs


def client_context(folder: Path, certificate: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca-cert.pem")
    if certificate:
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context


# --- Contexts ------------------------------------------------------------------------------------


def test_the_versions_and_ciphers(certificates: Certificates) -> None:
    context = Credentials(str(certificates["good"])).context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.num_tickets == 0
    for option in (ssl.OP_NO_COMPRESSION, ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_TICKET):
        assert context.options & option
    for cipher in context.get_ciphers():
        assert cipher["aead"], cipher
        assert cipher["protocol"] == "TLSv1.3" or cipher["kea"] == "kx-ecdhe", cipher


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_session_is_resumed(certificates: Certificates, version: ssl.TLSVersion) -> None:
    server = Credentials(str(certificates["good"])).context()
    client = client_context(certificates["good"])
    client.minimum_version = client.maximum_version = version
    _, theirs = meet(server, client)
    session = theirs.session
    assert session is None or not session.has_ticket


def test_a_client_is_not_asked_for_a_certificate_unless_it_is_verified(
    certificates: Certificates,
) -> None:
    good = certificates["good"]
    ours, _ = meet(Credentials(str(good)).context(), client_context(good, True))
    assert peer_names(ours.getpeercert()) == ("", "")
    verifying = Credentials(str(good), verify_peer=True)
    ours, _ = meet(verifying.context(), client_context(good, True))
    assert peer_names(ours.getpeercert()) == (CLIENT_NAME, CA_NAME)
    with pytest.raises(ssl.SSLError):
        meet(verifying.context(), client_context(good))


def test_an_intermediate_authority_is_enough(certificates: Certificates, tmp_path: Path) -> None:
    """ca-cert.pem names whom to trust; who has signed it is not asked, as the peer does not."""
    shutil.copytree(certificates["good"], tmp_path / "pki")
    folder = tmp_path / "pki"
    middle = Certificates(tmp_path)
    middle.issue("pki", "middle", "cn = Middle", "ca", "cert_signing_key")
    for what in ("key", "cert"):
        os.rename(folder / f"middle-{what}.pem", folder / f"ca-{what}.pem")
    middle.issue("pki", "server", "cn = localhost", "dns_name = localhost")
    middle.issue("pki", "client", "cn = alice")
    client = client_context(folder, True)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    ours, _ = meet(Credentials(str(folder), verify_peer=True).context(), client)
    assert peer_names(ours.getpeercert()) == ("CN=alice", "CN=Middle")


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    os.unlink(folder / file)
    with pytest.raises(ConfigError, match=rf"pki/{file}: No such file.*docs/tls\.md"):
        Credentials(str(folder), verify_peer=True)


def test_the_authority_is_needed_to_verify_alone(folder: Path) -> None:
    os.unlink(folder / "ca-cert.pem")
    Credentials(str(folder))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("server-cert.pem", r"server-cert\.pem has no certificate in PEM form"),
        ("server-key.pem", r"server-key\.pem has no private key in PEM form"),
        ("ca-cert.pem", r"ca-cert\.pem cannot be loaded"),
        ("ca-crl.pem", r"ca-crl\.pem cannot be loaded"),
    ],
)
def test_a_file_that_is_something_else_is_named(folder: Path, file: str, says: str) -> None:
    (folder / file).write_text("no PEM\n")
    with pytest.raises(ConfigError, match=says):
        Credentials(str(folder), verify_peer=True)


def test_a_key_of_another_certificate(folder: Path, certificates: Certificates) -> None:
    shutil.copy(certificates["other"] / "server-key.pem", folder)
    with pytest.raises(ConfigError, match=r"server-key\.pem is not the key of .*server-cert\.pem"):
        Credentials(str(folder))


def test_an_encrypted_key_asks_nobody(folder: Path, tmp_path: Path) -> None:
    key = folder / "server-key.pem"
    to = tmp_path / "new"
    run("openssl", "pkcs8", "-topk8", "-in", key, "-passout", "pass:secret", "-out", to)
    os.replace(to, key)
    with pytest.raises(ConfigError, match=r"server-key\.pem is encrypted"):
        Credentials(str(folder))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none is not a folder"):
        Credentials(str(tmp_path / "none"))


def test_default_folders(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, certificates: Certificates
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert tls.default_folders() == ["/etc/pki/nbdkit"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path))
    first, second = tmp_path / ".pki" / "nbdkit", tmp_path / ".config" / "pki" / "nbdkit"
    assert tls.default_folders() == [str(first), str(second)]
    with pytest.raises(ConfigError, match=rf"{first} or {second}: .*--tls-certificates"):
        Credentials()
    shutil.copytree(folder, second)
    assert tls.find_certificates() == str(second)
    Credentials()
    shutil.copytree(folder, first)
    assert tls.find_certificates() == str(first)
    monkeypatch.delenv("HOME")
    with pytest.raises(ConfigError, match="HOME"):
        Credentials()


# --- Warnings, and reading the files again -------------------------------------------------------


def test_a_key_that_others_can_read_is_warned_of_once(folder: Path, lines: list[str]) -> None:
    key = folder / "server-key.pem"
    key.chmod(0o640)
    credentials = Credentials(str(folder))
    credentials.reload()
    (warning,) = (line for line in lines if "warning" in line)
    assert "server-key.pem can be read by others (mode 0640)" in warning
    assert f"chmod 0600 {key}" in warning


def test_a_private_key_is_not_warned_of(folder: Path, lines: list[str]) -> None:
    Credentials(str(folder), verify_peer=True)
    assert lines == []


def test_reload_takes_new_files(folder: Path, certificates: Certificates, lines: list[str]) -> None:
    credentials = Credentials(str(folder))
    before = credentials.context()
    for file in certificates["other"].iterdir():
        shutil.copy(file, folder)
    assert credentials.reload()
    meet(credentials.context(), client_context(certificates["other"]))
    meet(before, client_context(certificates["good"]))  # who has begun goes on with the old ones
    assert lines == []


def test_reload_of_what_is_wrong_changes_nothing(
    folder: Path, certificates: Certificates, lines: list[str]
) -> None:
    credentials = Credentials(str(folder))
    (folder / "server-cert.pem").write_text("half a file")
    assert not credentials.reload()
    meet(credentials.context(), client_context(certificates["good"]))
    (line,) = lines
    assert "error: TLS credentials are not replaced: " in line
    assert "server-cert.pem" in line


# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        ["cn = alice"],
        ["country = US", "state = New York", "locality = Here", "organization = O", "cn = a b"],
        ['organization = "Disks, Plates + Sons; <\\"we\\">"', "cn = x"],
        ['cn = " #both ends "'],
        ['cn = "#number"'],
        ["unit = one", "unit = two", "cn = żółw", "uid = 7"],
        ["email = a@example.com", 'dn_oid = "2.5.4.4 Name"', 'dn_oid = "2.5.4.5 1"', "cn = x"],
        ['dn_oid = "2.5.4.9 A street"', 'dn = "CN=x,DC=example,DC=com"'],
    ],
)
def test_names_are_gnutlss(certificates: Certificates, tmp_path: Path, template: list[str]) -> None:
    """certtool shows names as GnuTLS gives them to nbdkit."""
    shutil.copytree(certificates["good"], tmp_path / "pki")
    Certificates(tmp_path).issue("pki", "client", *template)
    folder = tmp_path / "pki"
    shown = run("certtool", "--certificate-info", "--infile", folder / "client-cert.pem").stdout
    (expected,) = (
        line.partition("Subject: ")[2] for line in shown.splitlines() if "\tSubject: " in line
    )
    verifying = Credentials(str(folder), verify_peer=True)
    ours, _ = meet(verifying.context(), client_context(folder, True))
    assert peer_names(ours.getpeercert())[0] == expected


def unescaped(text: str) -> list[tuple[str, str]]:
    """A name taken apart again (RFC 4514, section 3)."""
    parts: list[tuple[str, str]] = []
    kind = value = ""
    rest = iter(text + ",")
    for c in rest:
        if c == "\\":
            following = next(rest)
            value += "\0" if following == "0" and next(rest) == "0" else following
        elif c == "=" and not kind:
            kind, value = value, ""
        elif c in ",+":
            parts.append((kind, value))
            kind = value = ""
        else:
            value += c
    return parts


@given(st.lists(st.tuples(st.sampled_from(["commonName", "userId"]), st.text()), min_size=1))
def test_a_name_can_be_read_again(pairs: list[tuple[str, str]]) -> None:
    """No value can look like a part of its own: who may do what hangs on it."""
    text = distinguished_name(tuple((pair,) for pair in pairs))
    short = {"commonName": "CN", "userId": "UID"}
    assert unescaped(text) == [(short[kind], value) for kind, value in reversed(pairs)]


def test_attributes_of_one_part_are_joined() -> None:
    name = ((("commonName", "a"), ("userId", "b")), (("2.3.4", "c"),))
    assert distinguished_name(name) == "2.3.4=c,CN=a+UID=b"


# --- Pre-shared keys -----------------------------------------------------------------------------


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text("alice:00ff\n\nżółw:AA\na:b:01\n", encoding="utf-8")
    assert read_keys(str(path)) == {"alice": b"\0\xff", "żółw": b"\xaa", "a:b": b"\x01"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no keys: psktool -u USER"),
        ("alice\n", "line 1 is not user:key"),
        ("a:00\nalice:5ecre7\n", "line 2 is not user:key"),
        ("alice:\n", "line 1 is not user:key"),
        (":00\n", "line 1 is not user:key"),
        ("a:00\nb:11\na:22\n", "line 3: user a is there already"),
        (f"a:{'00' * 257}", "at most 256 bytes, not 257"),
    ],
)
def test_a_wrong_file_of_keys(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_keys(str(path))
    assert "5ecre7" not in str(caught.value), "a key is nothing for the log"


def test_a_file_of_keys_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a text"):
        read_keys(str(path))
    with pytest.raises(ConfigError, match="none: No such file"):
        read_keys(str(tmp_path / "none"))


@pytest.mark.skipif(HAS_PSK, reason="this Python has pre-shared keys: nothing to refuse")
def test_keys_need_a_newer_python(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"need Python 3\.13 or newer, this is 3\.\d+.*--tls-cert"
    ):
        Credentials(psk=str(tmp_path / "keys.psk"))


def test_each_thread_learns_of_its_own_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    def set_callback(context: Any, find: Any, identity_hint: str | None = None) -> None:
        context.find = find

    monkeypatch.setattr(ssl.SSLContext, "set_psk_server_callback", set_callback, raising=False)
    path = tmp_path / "keys.psk"
    path.write_text("alice:0102\nbob:0304\n")
    credentials = Credentials(psk=str(path), verify_peer=True)
    assert "can be read by others" in lines[0]
    assert credentials.uses_psk
    assert not credentials.verify_peer
    found = []

    def ask(user: str | None, barrier: threading.Barrier) -> None:
        context: Any = credentials.context()
        assert credentials.user() == ("", False)
        barrier.wait(10)
        key = context.find(user)
        barrier.wait(10)
        found.append((user, key, credentials.user()))

    barrier = threading.Barrier(3)
    threads = [
        threading.Thread(target=ask, args=(user, barrier)) for user in ("alice", "eve", None)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=str) == sorted(
        [
            ("alice", b"\1\2", ("alice", True)),
            ("eve", b"", ("eve", False)),
            (None, b"", ("", False)),
        ],
        key=str,
    )
