"""`pynbd info`, compared with nbdinfo of libnbd 1.22 on the same servers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pynbdkit.cli import pynbd
from pynbdkit.client import info
from pynbdkit.protocol import constants as nbd
from pynbdkit.protocol.errors import HandshakeError
from pynbdkit.protocol.handshake_server import ExportInfo, ExportSource, ServerHandshake
from pynbdkit.protocol.requests import encode_request
from support import ServerProcess, next_peer, run

Nbdkit = Callable[..., ServerProcess]
Capture = pytest.CaptureFixture[str]

SERVERS = {
    "plain": ("memory", "1M"),
    "odd size": ("memory", "12345"),
    "read-only": ("-r", "memory", "3G"),
    "block sizes": ("--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=512"),
    "rotational": ("eval", "get_size=echo 1M", "pread=exit 1", "is_rotational=exit 0"),
    "described": (
        "eval",
        "get_size=echo 1M",
        "pread=exit 1",
        "export_description=echo 'about größe'",
        "default_export=echo canonical",
        "list_exports=echo NAMES; echo canonical",
    ),
    "no structured replies": ("--no-sr", "memory", "1M"),
    "no zeroes kept": ("--mask-handshake=1", "memory", "1M"),
    "not fixed": ("--mask-handshake=0", "memory", "1M"),
    "oldstyle": ("-o", "memory", "1M"),
}


def nbdinfo(*words: str) -> str:
    """nbdinfo's lines without `content:`, for which it reads the export and guesses."""
    lines = run(next_peer("nbdinfo"), *words).stdout.splitlines(keepends=True)
    return "".join(line for line in lines if "content" not in line)


@pytest.mark.parametrize("name", SERVERS)
def test_text_is_nbdinfos(nbdkit: Nbdkit, capsys: Capture, name: str) -> None:
    server = nbdkit(*SERVERS[name])
    assert pynbd.main(["info", server.uri]) == 0
    assert capsys.readouterr().out == nbdinfo(server.uri)


@pytest.mark.parametrize("name", SERVERS)
def test_json_has_nbdinfos_keys(nbdkit: Nbdkit, capsys: Capture, name: str) -> None:
    server = nbdkit(*SERVERS[name])
    assert pynbd.main(["info", "--json", server.uri]) == 0
    mine = json.loads(capsys.readouterr().out)
    listing = mine.pop("listing")
    assert mine == json.loads(nbdinfo("--json", server.uri))
    if name in ("not fixed", "oldstyle"):
        assert listing is None
    else:
        expected = "canonical" if name == "described" else ""
        assert [item["export-name"] for item in listing] == [expected]


@pytest.fixture
def many(nbdkit: Nbdkit, tmp_path: Path) -> ServerProcess:
    """A server with exports, and none by default."""
    for number, name in enumerate(["a", "größe", "with space"]):
        (tmp_path / name).write_bytes(b"x" * 1024 * number)
    return nbdkit("file", f"dir={tmp_path}")


def test_list_is_nbdinfos(many: ServerProcess, capsys: Capture) -> None:
    assert pynbd.main(["info", many.uri, "--list"]) == 0
    assert capsys.readouterr().out == nbdinfo("--list", many.uri)
    assert pynbd.main(["info", "-L", "--json", many.uri]) == 0
    mine = json.loads(capsys.readouterr().out)
    names = [item["export-name"] for item in mine.pop("listing")]
    assert sorted(names) == ["a", "größe", "with space"]
    assert mine == json.loads(nbdinfo("--list", "--json", many.uri))


def test_other_exports_are_listed(many: ServerProcess, capsys: Capture) -> None:
    assert pynbd.main(["info", many.export_uri("a")]) == 0
    report, others = capsys.readouterr().out.split("also listed:\n")
    assert report == nbdinfo(many.export_uri("a"))
    assert sorted(others.splitlines()) == ['\texport="größe"', '\texport="with space"']


def test_a_refusal_tells_what_could_be_had(many: ServerProcess, capsys: Capture) -> None:
    assert pynbd.main(["info", many.export_uri("nope")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "'nope'" in line
    assert "'with space'" in line


def test_a_long_listing_is_cut_in_the_message() -> None:
    refusal = HandshakeError(1, "no")
    listing = [(str(number), "") for number in range(7)]
    text = str(info._with_listing(refusal, listing))
    assert text == "no; it lists '0', '1', '2', '3', '4' and 2 more"
    assert str(info._with_listing(refusal, [])) == "no"


def test_no_control_characters_reach_the_terminal(nbdkit: Nbdkit, capsys: Capture) -> None:
    server = nbdkit(
        *("eval", "get_size=echo 1M", "pread=exit 1"),
        r"list_exports=printf 'NAMES\n\033[31mred\n'",
        r"export_description=printf 'about \033[31mred'",
    )
    for words in ([], ["--list"]):
        assert pynbd.main(["info", server.uri, *words]) == 0
        out = capsys.readouterr().out
        assert "31mred" in out
        assert "\x1b" not in out


def test_what_is_listed_and_cannot_be_opened_is_left_out(nbdkit: Nbdkit, capsys: Capture) -> None:
    server = nbdkit(
        *("eval", "get_size=echo 1M", "pread=exit 1"),
        'open=test "$3" != bad',
        "list_exports=printf 'INTERLEAVED\\nbad\\nabout bad\\ngood\\nabout good\\n'",
    )
    assert pynbd.main(["info", "--list", server.uri]) == 0
    out = capsys.readouterr().out
    assert out.count("export-size: ") == 1
    assert "description: about good\n" in out  # In the listing alone.
    assert out.endswith('also listed:\n\texport="bad": about bad\n')


class Old(ServerHandshake):
    """A server that has LIST, but neither INFO nor GO."""

    _HANDLERS = {  # type: ignore[misc]
        option: handler
        for option, handler in ServerHandshake._HANDLERS.items()
        if option not in (nbd.OPT_INFO, nbd.OPT_GO)
    }


class OldExports(ExportSource):
    def list_exports(self) -> list[tuple[str, str]]:
        return [("disk", ""), ("other", "about it")]

    def open(self, name: str) -> ExportInfo:
        return ExportInfo(name, 1536, nbd.FLAG_HAS_FLAGS | nbd.FLAG_READ_ONLY)


def test_a_server_without_info_is_asked_by_export_name(sockdir: Path, capsys: Capture) -> None:
    path = str(sockdir / "old.sock")
    ends: list[tuple[str, str | None, bytes]] = []

    def serve() -> None:
        for _ in range(2):
            connected, _address = listener.accept()
            with connected:
                handshake = Old(OldExports(), extended_headers=False)
                connected.sendall(handshake.greeting())
                while handshake.state in ("CLIENT_FLAGS", "OPTIONS"):
                    connected.sendall(handshake.receive(connected.recv(4096)))
                ends.append((handshake.state, handshake.error, connected.recv(4096)))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        assert pynbd.main(["info", f"nbd+unix:///disk?socket={path}"]) == 0
        thread.join(30)
    out = capsys.readouterr().out
    assert "export-size: 1536\n" in out
    assert "is_read_only: true\n" in out
    assert "\t\tbase:allocation\n" in out
    assert out.endswith('also listed:\n\texport="other": about it\n')
    assert ends == [("CLOSED", None, b""), ("TRANSMISSION", None, encode_request(2, 1))]


def test_server_without_list(nbdkit: Nbdkit, capsys: Capture) -> None:
    server = nbdkit("--mask-handshake=0", "memory", "1M")
    assert pynbd.main(["info", "--list", server.uri]) == 1
    assert "fixed newstyle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1023, "1023"), (1024, "1K"), (1536 * 1024, "1536K"), (2**63, "8E"), (2**40, "1T")],
)
def test_human_size(size: int, text: str) -> None:
    assert info.human_size(size) == text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["frobnicate"], "'frobnicate'"),
        (["info"], "URI is missing"),
        (["info", "--frob"], "'--frob'"),
        (["info", "nbd://a", "nbd://b"], "'nbd://b'"),
        (["info", "--timeout", "x", "nbd://a"], "'x'"),
        (["info", "--timeout=-1", "nbd://a"], "'-1'"),
        (["info", "http://localhost/"], "not an NBD URI"),
        (["info", "nbd+unix:///?socket=/nonexistent"], "No such file or directory"),
        (["info", "nbd+unix:///%00?socket=/nonexistent"], "NUL"),
        (["info", "nbd+unix:///?socket=" + "x" * 200], "too long"),
        (["info", "nbd+unix:///" + "x" * 5000 + "?socket=/nonexistent"], "5000 bytes"),
    ],
)
def test_mistakes_are_told_in_one_line(words: list[str], text: str, capsys: Capture) -> None:
    assert pynbd.main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("pynbd: ")
    assert text in line


@pytest.mark.parametrize("words", [[], ["--help"], ["info", "--help"]])
def test_help(words: list[str], capsys: Capture) -> None:
    assert pynbd.main(words) == 0
    assert capsys.readouterr().out.startswith("usage: pynbd")


def test_version_comes_without_the_rest() -> None:
    code = (
        "import sys; from pynbdkit.cli.pynbd import main; status = main(['--version']);"
        "print([m for m in ('socket', 'typing', 'pynbdkit.client') if m in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, modules = done.stdout.splitlines()
    assert version.startswith("pynbd ")
    assert modules == "[] 0"


def test_a_closed_pipe_is_no_traceback(nbdkit: Nbdkit) -> None:
    code = "from pynbdkit.cli.pynbd import run; run()"
    words = [sys.executable, "-c", code, "info", nbdkit("memory", "1M").uri]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
