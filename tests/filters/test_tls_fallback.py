"""The tls-fallback filter: what a client without TLS gets to see, and that it is nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from identities import Authority, uri
from pynbdkit import ConfigError, Device, Session, ThreadModel
from pynbdkit.chain import Chain
from pynbdkit.filters.tls_fallback import TlsFallbackFilter
from pynbdkit.loader import load_filter
from recording import Recording

NOTE = b"This NBD server requires TLS authentication before it will serve useful data.\n"
QUESTIONS = (
    "get_size",
    "is_read_only",
    "can_flush",
    "can_fua",
    "can_trim",
    "can_zero",
    "can_fast_zero",
    "can_cache",
    "can_multi_conn",
    "is_rotational",
    "get_export_description",
)


class Secret(Recording):
    """A plugin that notes whatever it is asked in a connection."""

    def list_exports(self, readonly: bool, is_tls: bool) -> Iterable[str | tuple[str, str]]:
        self.events.append(("list_exports", is_tls))
        return [("secret", "the crown jewels")]

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        self.events.append(("default_export", is_tls))
        return "secret"

    def may_open(self, session: Session) -> bool:
        self.events.append(("may_open", session.export_name))
        return session.peer_tls_dn != "CN=mallory"

    def open(self, session: Session) -> Device:
        self.events.append(("open", session.export_name))
        return super().open(session)


def chain(plugin: Recording, **values: str) -> Chain:
    return Chain(plugin, [TlsFallbackFilter(**values)])


def test_its_name() -> None:
    filter = load_filter("tls-fallback")
    assert type(filter) is TlsFallbackFilter
    assert filter.name == "tls-fallback"


def test_without_tls() -> None:
    """One export, whatever the name, and the layer below is not even asked."""
    plugin = Secret()
    it = chain(plugin)
    assert it.list_exports(False, False, Session()) == [("", "")]
    assert it.default_export(False, False) == ""
    for name in ("", "secret", "nothing of the kind"):
        layer = it.open(Session(export_name=name))
        assert layer.get_size() == 512
        assert bytes(layer.pread(512, 0, 0)) == NOTE.ljust(512, b"\0")
        assert bytes(layer.pread(3, 5, 0)) == NOTE[5:8]
        assert not layer.can_write()
        assert not layer.export_description()
        layer.close()
    assert plugin.events == []


def test_with_tls() -> None:
    """As if the filter were not there; who may not open the disk may not."""
    plugin = Secret()
    it = chain(plugin)
    session = Session(is_tls=True, export_name="secret")
    assert it.list_exports(False, True, session) == [("secret", "the crown jewels")]
    assert it.default_export(False, True) == "secret"
    layer = it.open(session)
    assert layer.get_size() == 1 << 20
    assert layer.can_write()
    layer.close()
    assert plugin.events[-1] == ("close",)
    session.peer_tls_dn = "CN=mallory"
    assert it.list_exports(False, True, session) == []
    with pytest.raises(PermissionError):
        it.open(session)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("read me", b"read me"),
        ("", b""),
        ("x" * 512, b"x" * 512),
        ("grün\udcff", b"gr\xc3\xbcn\xff"),
    ],
)
def test_tlsreadme(text: str, data: bytes) -> None:
    layer = chain(Secret(), tlsreadme=text).open(Session())
    assert layer.get_size() == 512
    assert bytes(layer.pread(512, 0, 0)) == data.ljust(512, b"\0")


def test_a_long_tlsreadme_is_not_cut_off() -> None:
    layer = chain(Secret(), tlsreadme="x" * 513).open(Session())
    assert layer.get_size() == 1024
    assert bytes(layer.pread(1024, 0, 0)) == (b"x" * 513).ljust(1024, b"\0")


@pytest.mark.parametrize("model", range(4))
def test_thread_model(model: int) -> None:
    """Where clients come one after the other, one without TLS must not hold up the others."""
    plugin = Secret()
    plugin.thread_model = model
    it = chain(plugin)
    it.complete()
    if model == ThreadModel.SERIALIZE_CONNECTIONS:
        with pytest.raises(ConfigError, match=r"^tls-fallback: .*one client at a time"):
            it.get_ready()
    else:
        it.get_ready()


def test_thread_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "def thread_model(): return 0\ndef open(r): return 1\n"
        "def get_size(h): return 512\ndef pread(h, c, o): return bytes(c)\n"
    )
    done = support.pynbdkit("-U", "-", "--filter=tls-fallback", tmp_path / "slow.py")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "use --tls=require" in done.stderr


def seen(nbd: Any, uri: str) -> list[Any]:
    """What a client without TLS sees and can do."""
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.set_full_info(True)
    client.set_strict_mode(0)
    client.connect_uri(uri)
    answers: list[Any] = []

    def note(call: Callable[[], Any]) -> None:
        try:
            answers.append(call())
        except nbd.Error as error:
            answers.append(error.errnum)

    exports: list[tuple[str, str]] = []
    client.opt_list(lambda name, description: exports.append((name, description)))
    answers.append(exports)
    client.set_export_name("secret")
    client.opt_info()
    note(client.get_export_description)
    client.opt_go()
    for question in QUESTIONS:
        note(getattr(client, question))
    note(lambda: bytes(client.pread(512, 0)))
    note(lambda: client.pread(513, 0))
    note(lambda: client.pwrite(b"x" * 512, 0))
    note(lambda: client.trim(512, 0))
    note(lambda: client.zero(512, 0))
    note(lambda: bytes(client.pread(512, 0)))
    client.shutdown()
    return answers


def test_over_the_wire_as_nbdkit(nbd: Any, sockdir: Path) -> None:
    """The peer's filter, over its memory plugin, shows the same and refuses the same."""
    arguments = ["--filter=tls-fallback", "memory", "1M"]
    with support.ServerProcess(sockdir, arguments, [support.program("nbdkit")]) as peer:
        theirs = seen(nbd, peer.uri)
    plugin = Secret()
    with pynbdkit.serve(plugin, filters=["tls-fallback"]) as server:
        ours = seen(nbd, server.uri)
    assert plugin.events == []
    assert ours == theirs
    assert NOTE.ljust(512, b"\0") in ours


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_with_certificates(
    nbd: Any, serve: Callable[..., support.ServerProcess], authority: Authority
) -> None:
    """The disk over TLS; the note without, for the same server."""
    alice = authority.client("alice")
    options = ("--tls=on", f"--tls-certificates={authority.server}", "--tls-verify-peer")
    server = serve(*options, "--filter=tls-fallback", "memory", "1M", "tlsreadme=not here")
    secure, plain = nbd.NBD(), nbd.NBD()
    secure.set_uri_allow_local_file(True)
    secure.connect_uri(uri(server, alice))
    plain.connect_uri(uri(server, None))
    assert secure.get_tls_negotiated()
    assert secure.get_size() == 1 << 20
    secure.pwrite(b"x" * 512, 0)
    assert bytes(plain.pread(512, 0)) == b"not here".ljust(512, b"\0")
    assert bytes(secure.pread(512, 0)) == b"x" * 512
    secure.shutdown()
    plain.shutdown()


STARTTLS_LATE = """
import nbd, sys
client = nbd.NBD()
client.set_opt_mode(True)
client.set_tls_certificates(sys.argv[2])
client.connect_unix(sys.argv[1])
client.opt_info()
print(client.get_size())
print(client.opt_starttls())
client.opt_go()
print(client.get_size())
client.shutdown()
"""


def test_what_was_asked_before_tls_is_forgotten(
    serve: Callable[..., support.ServerProcess], authority: Authority
) -> None:
    """Who has looked at the note in the clear gets the disk over TLS, not the note once more."""
    alice = authority.client("alice")
    options = ("--tls=on", f"--tls-certificates={authority.server}", "--tls-verify-peer")
    server = serve(*options, "--filter=tls-fallback", "memory", "1M")
    done = support.run(support.next_peer("python3"), "-c", STARTTLS_LATE, server.socket, alice)
    assert done.stdout.split() == ["512", "True", "1048576"]
