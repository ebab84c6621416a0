"""Where the server listens, and the URI that leads there."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command import COMMAND, can_bind
from pynbdkit.cli.background import Identity
from pynbdkit.cli.options import parse
from pynbdkit.cli.where import Where, _host, percent, private_folder, unix_mode
from pynbdkit.errors import ConfigError
from support import program, pynbdkit

NOBODY_NEW = Identity(None, None)
ANY_BYTES = st.binary(max_size=30).map(lambda data: os.fsdecode(data.replace(b"\0", b"x")))


@contextmanager
def listening(
    *words: str, activated: tuple[socket.socket, ...] = (), tls: str = "off"
) -> Iterator[Where]:
    where = Where(parse([*words, "memory"]), activated, tls)
    sockets = where.listen(NOBODY_NEW)
    try:
        where.addresses = [sock.getsockname() for sock in sockets]  # type: ignore[attr-defined]
        yield where
    finally:
        for sock in sockets:
            sock.close()
        where.remove()


def hosts(where: Where) -> list[str]:
    return [address[0] for address in where.addresses]  # type: ignore[attr-defined]


# -- URIs ------------------------------------------------------------------------------------------


@given(ANY_BYTES)
def test_percent_is_urllibs(text: str) -> None:
    assert percent(text) == quote_from_bytes(os.fsencode(text), safe="")
    assert percent(text, b"/") == quote_from_bytes(os.fsencode(text), safe="/")
    assert unquote_to_bytes(percent(text)) == os.fsencode(text)


@pytest.mark.parametrize("name", ["s", "s p", "s?#%/../t", "s'\"$", "ü", "a" * 60])
def test_libnbd_finds_every_path_and_export(name: str, sockdir: Path) -> None:
    (sockdir / "s?#%").mkdir()
    (sockdir / "e.py").write_text(
        "import nbdkit\ndef open(ro): return nbdkit.export_name()\n"
        "def get_size(h): return 1 << 20\n"
        "def export_description(h): return 'it is ' + h\n"
        "def pread(h, c, o): return bytes(c)\n"
    )
    words = ["-U", str(sockdir / name), "-e", name, str(sockdir / "e.py")]
    done = pynbdkit(*words, "--run", 'nbdinfo "$uri"')
    assert f"it is {name}\n" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "hosts_expected", "host"),
    [
        ([], ["127.0.0.1", "::1"], "localhost"),
        (["-4"], ["127.0.0.1"], "localhost"),
        (["-6"], ["::1"], "[::1]"),
        (["-i", ""], ["0.0.0.0", "::"], "localhost"),
        (["-i", "0.0.0.0"], ["0.0.0.0"], "localhost"),
        (["-i", "::"], ["::"], "[::1]"),
        (["-4", "-i", ""], ["0.0.0.0"], "localhost"),
        (["-6", "-i", ""], ["::"], "[::1]"),
        (["-i", "127.0.0.2"], ["127.0.0.2"], "127.0.0.2"),
        (["-i", "127.0.0.2", "-i", "::1"], ["127.0.0.2", "::1"], "127.0.0.2"),
        (["-i", "127.0.0.2", "-i", "127.0.0.3"], ["127.0.0.2", "127.0.0.3"], "127.0.0.2"),
        (["-i", "127.0.0.1", "-i", "127.0.0.1"], ["127.0.0.1"], "localhost"),
    ],
)
def test_tcp(words: list[str], hosts_expected: list[str], host: str) -> None:
    """Without -i, this machine alone."""
    there = [each for each in hosts_expected if can_bind(each)]
    if not there or set(words) & (set(hosts_expected) - set(there)):
        with pytest.raises(ConfigError, match="cannot listen"), listening("-p", "0", *words):
            pass
        return
    with listening("-p", "0", *words) as where:
        assert sorted(hosts(where)) == sorted(there)
        ports = {address[1] for address in where.addresses}  # type: ignore[attr-defined]
        assert ports == {where.port}
        assert where.port
        assert where.path is None
        assert where.uri("") == f"nbd://{host}:{where.port}"
        assert where.uri("a/b c") == f"nbd://{host}:{where.port}/a%2Fb%20c"
        if hosts(where)[0] != "::" or can_bind("::1"):
            socket.create_connection((hosts(where)[0], where.port), timeout=30).close()


@pytest.mark.parametrize(
    ("address", "host"), [("fe80::1%eth0", "[fe80::1%25eth0]"), ("192.0.2.1", "192.0.2.1")]
)
def test_hosts_of_other_addresses(address: str, host: str) -> None:
    assert _host(address) == host


def test_no_socket_of_the_private_kind_is_left() -> None:
    with listening("-U", "-") as where:
        assert where.path is not None
        folder = os.path.dirname(where.path)
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert where.uri("x") == f"nbd+unix:///x?socket={where.path}"
    assert not os.path.exists(folder)
    where.remove()  # a second time is no mistake


def test_a_socket_by_name_is_left_as_nbdkit_leaves_it(sockdir: Path) -> None:
    with listening("-U", str(sockdir / "s")):
        pass
    assert (sockdir / "s").exists()


def test_addresses_are_ignored_with_a_unix_socket(sockdir: Path) -> None:
    """As nbdkit does; a port beside it is a mistake that `Service` refuses."""
    with listening("-U", str(sockdir / "s"), "-i", "192.0.2.1", "-4") as where:
        assert where.port is None


def test_activated_sockets_tell_where_they_are(sockdir: Path) -> None:
    path = str(sockdir / "a ctivated")
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp, socket.socket() as second:
        unix.bind(path)
        tcp.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        with listening(activated=(unix.dup(), tcp.dup())) as where:
            assert where.uri("") == f"nbd+unix:///?socket={sockdir}/a%20ctivated"
        with listening(activated=(tcp.dup(), second.dup())) as where:
            assert where.uri("e") == f"nbd://localhost:{tcp.getsockname()[1]}/e"


def test_an_abstract_socket_has_no_uri() -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(b"\0" + os.urandom(8))
        with listening(activated=(unix.dup(),)) as where:
            assert where.uri("") == ""
            assert where.variables("x")["uri"] == ""
            assert where.variables("x")["unixsocket"] == ""


# -- TLS, vsock and modes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tls", "words", "query", "number"),
    [
        ("off", "", "", None),
        ("on", "--tls-certificates=/c", "", "1"),
        ("require", "", "", "2"),
        ("require", "--tls-certificates=/c", "tls-certificates=/c", "2"),
        ("require", "--tls-psk=/k", "tls-psk-file=/k", "2"),
        ("require", "--tls-psk=/k --tls-certificates=/c", "tls-psk-file=/k", "2"),
    ],
)
def test_uris_with_tls_are_as_nbdkits(
    tls: str, words: str, query: str, number: str | None, sockdir: Path
) -> None:
    """Of 1.42, which says where the client finds certificates; with --tls=on they are without."""
    secure = "s" if tls == "require" else ""
    with listening("-U", str(sockdir / "s"), *words.split(), tls=tls) as where:
        more = f"&{query}" if query else ""
        assert where.uri("e") == f"nbd{secure}+unix:///e?socket={sockdir}/s{more}"
    with listening("-4", "-p", "0", *words.split(), tls=tls) as where:
        more = f"?{query}" if query else ""
        assert where.uri("") == f"nbd{secure}://localhost:{where.port}{more}"
        assert where.uri("e") == f"nbd{secure}://localhost:{where.port}/e{more}"
        assert where.variables("")["tls"] == number


def test_files_of_tls_are_named_from_the_root(sockdir: Path) -> None:
    """Whoever uses them may be in another folder."""
    words = ["-U", "-", "--tls-certificates", "a b", "--tls-psk", "k"]
    with listening(*words, tls="require") as where:
        variables = where.variables("")
        assert variables["tls_certificates"] == os.path.abspath("a b")
        assert variables["tls_psk"] == os.path.abspath("k")
        assert where.uri("").endswith(f"&tls-psk-file={percent(os.path.abspath('k'), b'/')}")
    with listening("-U", "-") as where:
        assert where.variables("")["tls_certificates"] == where.variables("")["tls_psk"] == ""


def test_vsock() -> None:
    with listening("--vsock", "-p", "0", "-i", "192.0.2.1") as where:
        ((_, port),) = where.addresses  # type: ignore[attr-defined]
        assert where.uri("") == f"nbd+vsock://1:{port}"
        assert where.uri("a/b") == f"nbd+vsock://1:{port}/a%2Fb"
        assert where.variables("")["port"] == str(port)
    with listening("--vsock", "-p", str(port), tls="require") as where:
        assert where.uri("") == f"nbds+vsock://1:{port}"


@pytest.mark.parametrize(("text", "mode"), [("600", 0o600), ("0660", 0o660), ("0", 0)])
@pytest.mark.parametrize("path", ["s", "-"])
def test_unix_mode(text: str, mode: int, path: str, sockdir: Path) -> None:
    name = path if path == "-" else str(sockdir / path)
    with listening("-U", name, "--unix-mode", text) as where:
        assert where.path is not None
        assert stat.S_IMODE(os.stat(where.path).st_mode) == mode


@pytest.mark.parametrize("text", ["", "8", "-1", "0o600", "u+rw", "1777", "07777", " 600", "٣"])
def test_modes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--unix-mode .*: expecting octal digits, 0 to 777"):
        unix_mode(text)


@pytest.mark.parametrize("umask", ["000", "022", "077"])
def test_a_unix_sockets_mode_is_nbdkits_whatever_the_umask(umask: str, sockdir: Path) -> None:
    modes = []
    for number, command in enumerate(([program("nbdkit")], COMMAND)):
        path = sockdir / str(number)
        words = ["-U", str(path), "memory", "1M", "--run", "true"]
        shell = f'umask {umask}; exec "$@"'
        subprocess.run(["sh", "-c", shell, "sh", *command, *words], timeout=30, check=True)
        modes.append(stat.S_IMODE(path.stat().st_mode))
    assert modes == [0o755, 0o755]


# -- $TMPDIR ---------------------------------------------------------------------------------------


def test_private_folders_are_in_tmpdir(sockdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(sockdir))
    folders = {private_folder() for _ in range(3)}
    assert {os.path.dirname(folder) for folder in folders} == {str(sockdir)}
    assert len(folders) == 3


def test_a_private_folders_name_may_be_taken(
    sockdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(sockdir))
    names = iter([b"aaaaaa", b"aaaaaa", b"bbbbbb"])
    monkeypatch.setattr(os, "urandom", lambda count: next(names))
    assert private_folder() != private_folder()


@pytest.mark.parametrize("folder", ["/nonexistent", "/dev/null", "/" + 100 * "x"])
def test_tmpdir_that_cannot_be_used(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", folder)
    with pytest.raises(ConfigError, match=f"^-U -: cannot make {folder}/pynbdkit-"):
        private_folder()


def test_tmpdir_that_is_too_deep_for_a_socket(sockdir: Path) -> None:
    deep = sockdir / ("d" * 90)
    deep.mkdir()
    done = pynbdkit("-U", "-", "memory", "1M", "--run", "true", env={"TMPDIR": str(deep)})
    assert done.returncode == 1
    assert "at most 107 bytes" in done.stderr
    assert list(deep.iterdir()) == []
