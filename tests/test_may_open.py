"""Exports by identity over the wire: the example, two certificates, and a client without any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from identities import Authority, uri
from pynbdkit import Device, Plugin, Session
from recording import Recording

EXAMPLE = support.ROOT / "examples" / "exports_by_identity.py"
POLICY = "policy prevents"


def listed(nbd: Any, address: str) -> list[str]:
    client = nbd.NBD()
    client.set_uri_allow_local_file(True)
    client.set_opt_mode(True)
    client.connect_uri(address)
    names: list[str] = []
    client.opt_list(lambda name, _: names.append(name))
    client.opt_abort()
    return names


def opened(nbd: Any, address: str) -> Any:
    client = nbd.NBD()
    client.set_uri_allow_local_file(True)
    client.connect_uri(address)
    return client


def why_not(nbd: Any, address: str) -> str:
    """What a client is told that may not open an export, by libnbd."""
    with pytest.raises(nbd.Error) as caught:
        opened(nbd, address)
    return str(caught.value)


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    folder = tmp_path / "disks"
    folder.mkdir()
    for name in ("public", "payroll", "nobodys"):
        (folder / name).write_bytes(name.encode().ljust(512, b"."))
    return folder


TABLE = """
public   *
payroll  CN=alice,O=Big\\\\, Co
payroll  CN=carol,*
missing  CN=alice,*
"""


def test_the_example(
    nbd: Any, serve: Callable[..., support.ServerProcess], tmp_path: Path, disks: Path
) -> None:
    authority = Authority(tmp_path)
    alice = authority.client("alice", organization="Big, Co")
    bob = authority.client("bob", organization="Big, Co")
    table = tmp_path / "table"
    table.write_text(TABLE.replace("\\\\", "[\\]"))
    options = ("--tls=on", f"--tls-certificates={authority.server}", "--tls-verify-peer")
    server = serve(*options, EXAMPLE, f"table={table}", f"dir={disks}")

    assert listed(nbd, uri(server, alice)) == ["payroll", "public"]
    for who in (bob, None):
        assert listed(nbd, uri(server, who)) == ["public"]
        assert opened(nbd, uri(server, who, "public")).pread(6, 0) == b"public"
    client = opened(nbd, uri(server, alice, "payroll"))
    assert client.pread(7, 0) == b"payroll"
    client.shutdown()

    # An export that there is, one that there is not, and one of nobody: no difference.
    before = server.log().count("\n")
    answers = {why_not(nbd, uri(server, bob, name)) for name in ("payroll", "none", "nobodys")}
    answers |= {why_not(nbd, uri(server, None, name)) for name in ("payroll", "missing")}
    assert len(answers) == 1
    assert POLICY in answers.pop()
    lines = server.log().splitlines()[before:]
    assert len(lines) == 5
    assert "open 'payroll': not permitted for CN=bob,O=Big\\, Co" in lines[0]
    # Who may open it is told that it is not there.
    assert POLICY not in why_not(nbd, uri(server, alice, "missing"))


@pytest.mark.parametrize(
    ("table", "message"),
    [("public", "table:1: who may open public?"), (None, "table: No such file or directory")],
)
def test_a_wrong_table(tmp_path: Path, disks: Path, table: str | None, message: str) -> None:
    path = tmp_path / "table"
    if table is not None:
        path.write_text(table)
    done = support.pynbdkit("-U", "-", EXAMPLE, f"table={path}", f"dir={disks}", "--run", "true")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


class ByName(Recording):
    """Opens what begins with "o"; its default export does not."""

    def list_exports(self, readonly: bool, is_tls: bool) -> list[str]:
        return ["", "open", "shut"]

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        return "shut"

    def may_open(self, session: Session) -> bool:
        return session.export_name.startswith("o")


def test_the_default_is_listed_where_what_it_stands_for_may_be_opened(nbd: Any) -> None:
    class Default(ByName):
        def default_export(self, readonly: bool, is_tls: bool) -> str:
            return "open"

    with pynbdkit.serve(Default()) as server:
        assert listed(nbd, server.uri) == ["", "open"]
        opened(nbd, server.uri).shutdown()


@pytest.mark.parametrize("filters", [(), ("nofilter",)], ids=["bare", "filtered"])
def test_every_way_to_ask(nbd: Any, filters: tuple[str, ...]) -> None:
    """Information, contexts, the old way to open, the default's name: nothing is opened."""
    plugin = ByName()
    with pynbdkit.serve(plugin, filters=filters) as server:
        assert listed(nbd, server.uri) == ["open"]
        for name in ("", "shut"):
            assert POLICY in why_not(nbd, server.export_uri(name))
        client = nbd.NBD()
        client.set_opt_mode(True)
        client.add_meta_context("x:secret")
        client.connect_uri(server.export_uri("shut"))
        contexts: list[str] = []
        for ask in (client.opt_info, lambda: client.opt_list_meta_context(contexts.append)):
            with pytest.raises(nbd.Error):
                ask()
        client.opt_abort()
        assert contexts == []
        assert plugin.events == []
    with pynbdkit.serve(plugin, filters=filters, handshake_mask=0) as server:
        with pytest.raises(nbd.Error):
            opened(nbd, server.export_uri("shut"))
        assert plugin.events == []
        opened(nbd, server.export_uri("open")).shutdown()


def test_by_user_id(nbd: Any) -> None:
    """Not only certificates: whatever the session knows."""
    import os

    class Mine(Plugin):
        def may_open(self, session: Session) -> bool:
            asked.append(session.peer_uid)
            return False

        def open(self, session: Session) -> Device:
            raise AssertionError("opened")

    asked: list[int | None] = []
    with pynbdkit.serve(Mine()) as server:
        assert POLICY in why_not(nbd, server.uri)
    assert asked == [os.getuid()]


def test_a_bug_in_may_open_lets_nobody_in(nbd: Any, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Recording):
        def may_open(self, session: Session) -> bool:
            raise ValueError("secret: no such export")

    plugin = Broken()
    with pynbdkit.serve(plugin) as server:
        said = why_not(nbd, server.export_uri("x"))
        assert POLICY in said
        assert "secret" not in said
        assert listed(nbd, server.uri) == []
    assert plugin.events == []
    assert "may_open 'x': ValueError: secret: no such export" in capfd.readouterr().err
