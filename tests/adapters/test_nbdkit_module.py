"""The module that scripts get by `import nbdkit`: names, values, errors, and the connection."""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit import log
from pynbdkit.adapters import nbdkit_module as nbdkit
from pynbdkit.adapters.callbacks import pending
from pynbdkit.adapters.script import ScriptPlugin
from pynbdkit.session import Session, set_current

DUMP = """
import nbdkit
for name in sorted(dir(nbdkit)):
    value = getattr(nbdkit, name)
    if not name.startswith("_"):
        print(name, value if isinstance(value, int) else "function")
"""


def test_it_has_what_nbdkits_has(tmp_path: Path) -> None:
    """The installed peer's module, name by name, and each constant's value."""
    (tmp_path / "dump.py").write_text(DUMP)
    done = support.run("nbdkit", "-U", "-", "python", tmp_path / "dump.py", check=False)
    theirs = dict(line.split() for line in done.stdout.splitlines())
    assert len(theirs) > 20
    for name, value in theirs.items():
        ours = getattr(nbdkit, name)
        if value == "function":
            assert callable(ours)
        else:
            assert ours == int(value), name


def test_a_script_imports_it(load: Callable[..., ScriptPlugin]) -> None:
    plugin = load(
        "import nbdkit",
        "from nbdkit import *",
        "def open(readonly): pass",
        "def get_size(h): return parse_size('1k')",
        "def pread(h, count, offset): pass",
    )
    assert plugin._names["nbdkit"] is nbdkit
    assert sys.modules["nbdkit"] is nbdkit
    assert plugin._names["get_size"](None) == 1024


# -- parsing -------------------------------------------------------------------------------------


def test_parsing() -> None:
    assert nbdkit.parse_size("1M") == 1 << 20
    assert nbdkit.parse_bool("on") is True
    assert nbdkit.parse_bool("no") is False
    assert nbdkit.parse_probability("rate", "1:4") == 0.25
    assert nbdkit.parse_int("n", "-0x10") == -16
    assert nbdkit.parse_uint64_t("n", str(2**64 - 1)) == 2**64 - 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [("3", (3, 0)), ("1.5", (1, 500_000_000)), ("100ms", (0, 100_000_000)), ("7ns", (0, 7))],
)
def test_delays_are_seconds_and_nanoseconds(text: str, parts: tuple[int, int]) -> None:
    assert nbdkit.parse_delay("wait", text) == parts


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("parse_int", -(2**31), 2**31 - 1),
        ("parse_unsigned", 0, 2**32 - 1),
        ("parse_int8_t", -128, 127),
        ("parse_int16_t", -(2**15), 2**15 - 1),
        ("parse_int32_t", -(2**31), 2**31 - 1),
        ("parse_int64_t", -(2**63), 2**63 - 1),
        ("parse_uint8_t", 0, 255),
        ("parse_uint16_t", 0, 2**16 - 1),
        ("parse_uint32_t", 0, 2**32 - 1),
        ("parse_uint64_t", 0, 2**64 - 1),
    ],
)
def test_the_ranges_of_integers(name: str, low: int, high: int) -> None:
    parse = getattr(nbdkit, name)
    assert (parse("n", str(low)), parse("n", str(high))) == (low, high)
    for text in (str(low - 1), str(high + 1), "five", ""):
        with pytest.raises(ValueError, match="n: "):
            parse("n", text)


@pytest.mark.parametrize(
    "call",
    [
        lambda: nbdkit.parse_size("many"),
        lambda: nbdkit.parse_bool("perhaps"),
        lambda: nbdkit.parse_probability("rate", "often"),
        lambda: nbdkit.parse_delay("wait", "long"),
        lambda: nbdkit.read_password("+/no/such/file"),
    ],
)
def test_what_cannot_be_parsed_is_a_value_error(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["parse_size", "parse_bool", "read_password", "debug"])
def test_what_is_no_text_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match="expected a str, not int"):
        getattr(nbdkit, name)(5)


def test_passwords(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("geheim\n")
    assert nbdkit.read_password("plain") == "plain"
    assert nbdkit.read_password(f"+{tmp_path / 'secret'}") == "geheim"


# -- errors and messages -------------------------------------------------------------------------


def test_set_error_takes_integers() -> None:
    try:
        nbdkit.set_error(errno.ENOSPC)
        assert pending == {threading.get_ident(): errno.ENOSPC}
        with pytest.raises(TypeError):
            nbdkit.set_error("ENOSPC")  # type: ignore[arg-type]
    finally:
        pending.clear()


def test_debug_speaks_when_verbose(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nbdkit.debug("quiet")
    monkeypatch.setattr(log, "verbose", True)
    nbdkit.debug("loud")
    assert capsys.readouterr().err == "pynbdkit: debug: loud\n"


# -- the connection ------------------------------------------------------------------------------

ABOUT_A_CLIENT = (
    "export_name",
    "is_tls",
    "peer_name",
    "peer_pid",
    "peer_uid",
    "peer_gid",
    "peer_tls_dn",
    "peer_tls_issuer_dn",
)


@pytest.mark.parametrize("name", ABOUT_A_CLIENT)
def test_without_a_connection(name: str) -> None:
    with pytest.raises(RuntimeError, match="no connection in this thread"):
        getattr(nbdkit, name)()


@pytest.fixture
def told(load: Callable[..., ScriptPlugin]) -> Callable[..., tuple[ScriptPlugin, list[Any]]]:
    """A script whose `open` and `pread` do something and note what they found."""

    def make(expression: str, *more: str) -> tuple[ScriptPlugin, list[Any]]:
        plugin = load(
            "import nbdkit",
            "found = []",
            "def open(readonly):",
            f"    found.append({expression})",
            "def get_size(h): return 65536",
            "def pread(h, count, offset):",
            f"    found.append({expression})",
            "    return bytes(count)",
            *more,
        )
        return plugin, plugin._names["found"]

    return make


def test_what_is_known_of_a_client(nbd: Any, connect: Callable[..., Any], told: Any) -> None:
    names = ", ".join(f"nbdkit.{name}()" for name in ABOUT_A_CLIENT)
    plugin, found = told(f"({names})")
    with pynbdkit.serve(plugin) as server:
        h = connect(server.export_uri("some/export"))
        h.pread(512, 0)
        h.shutdown()
    assert len(found) == 2
    for name, tls, _, pid, uid, gid, dn, issuer in found:
        assert (name, tls, dn, issuer) == ("some/export", False, "", "")
        assert (pid, uid, gid) == (os.getpid(), os.getuid(), os.getgid())


def test_what_is_known_of_a_client_by_tcp(connect: Callable[..., Any], told: Any) -> None:
    plugin, found = told("nbdkit.peer_name()")
    with pynbdkit.serve(plugin, tcp=("127.0.0.1", 0)) as server:
        connect(server).shutdown()
    ((host, port),) = found
    assert host == "127.0.0.1"
    assert 0 < port < 65536


def test_credentials_are_a_unix_sockets(connect: Callable[..., Any], told: Any) -> None:
    plugin, found = told("tried(nbdkit.peer_pid)", TRIED)
    with pynbdkit.serve(plugin, tcp=("127.0.0.1", 0)) as server:
        connect(server).shutdown()
    assert found == ["RuntimeError: known for clients on a Unix socket only"]


TRIED = """
def tried(call, *arguments):
    try:
        return call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


def test_shutdown_ends_the_server(serve: Callable[..., Any], connect: Any, tmp_path: Path) -> None:
    (tmp_path / "last.py").write_text(
        "import nbdkit\n"
        "def open(readonly): pass\n"
        "def get_size(h): return 512\n"
        "def pread(h, count, offset):\n"
        "    nbdkit.shutdown()\n"
        "    return b'x' * count\n"
    )
    server = serve("python", tmp_path / "last.py")
    h = connect(server)
    assert h.pread(512, 0) == b"x" * 512, "the request that asked for it is answered"
    assert server.process.wait(timeout=20) == 0


def test_disconnect_ends_the_connection_alone(
    nbd: Any, connect: Callable[..., Any], told: Any
) -> None:
    plugin, _ = told(
        "None",
        "def pread(h, count, offset):",
        "    if offset: nbdkit.disconnect(offset == 512)",
        "    return b'x' * count",
    )
    with pynbdkit.serve(plugin) as server:
        other = connect(server)
        forced = connect(server)
        with pytest.raises(nbd.Error):
            forced.pread(512, 512)
        gentle = connect(server)
        assert gentle.pread(512, 1024) == b"x" * 512, "answered first"
        with pytest.raises(nbd.Error):
            gentle.pread(512, 0)
        assert other.pread(512, 0) == b"x" * 512
        other.shutdown()


# -- nanosleep -----------------------------------------------------------------------------------


@pytest.fixture
def session() -> Iterator[Callable[..., None]]:
    yield lambda **options: set_current(Session(**options))
    set_current(None)
    pending.clear()


def test_nanosleep_sleeps() -> None:
    started = time.monotonic()
    nbdkit.nanosleep(0, 20_000_000)
    assert time.monotonic() - started >= 0.02


def test_nanosleep_in_a_connection(session: Callable[..., None]) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> bool:
        slept.append(seconds)
        return False

    session(stopping=sleep)
    nbdkit.nanosleep(1, 500_000_000)
    assert slept == [1.5]


def test_nanosleep_ends_early_with_eshutdown(session: Callable[..., None]) -> None:
    session(stopping=lambda seconds: True)
    with pytest.raises(OSError, match=re.compile("stopping")) as caught:
        nbdkit.nanosleep(1000, 0)
    assert caught.value.errno == errno.ESHUTDOWN
    assert pending == {threading.get_ident(): errno.ESHUTDOWN}


def test_nanosleep_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="cannot sleep"):
        nbdkit.nanosleep(-1, 0)
    with pytest.raises(TypeError):
        nbdkit.nanosleep(0.5, 0)  # type: ignore[arg-type]
