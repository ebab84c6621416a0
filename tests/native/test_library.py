"""The functions that a plugin in C calls, beside the peer's: `asks.c` writes down what it gets."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit.native import library
from pynbdkit.native.library import sockaddr

Built = Callable[..., Path]
OURS = [sys.executable, "-m", "pynbdkit"]

INTEGERS = (
    *("0", "1", "-1", "+3", "-0", "00", " 3", "3 ", "\t3", "", " ", "-", "+", "x", "1x", "0x"),
    *("0X10", "0x10", "-0x10", "010", "-010", "09", "0b11", "1e3", "1.0", "--1", "+-1", "0x-1"),
    "1 2",
    *(str(sign * (1 << bits) + more) for bits in (7, 8, 15, 16, 31, 32, 63, 64)
      for sign in (1, -1) for more in (-1, 0, 1)),
    "99999999999999999999999999",
)  # fmt: skip
SIZES = (
    *("0", "1", "-1", "-0", "+3", " 1", "1 ", "", "x", "1x", "1.5M", "1KB", "0x10", "010", "k"),
    *(f"{number}{suffix}" for number in (1, 7, 10) for suffix in "bBkKmMgGtTpPeEsSzZ"),
    *("9223372036854775807", "9223372036854775808", "8388608T", "8388607T", "1 K", "1k ", "--1"),
    *("18014398509481983s", "18014398509481984s", "99999999999999999999999", "99999999999999E"),
)
BOOLEANS = (
    *("1", "0", "2", "-1", "", " 1", "1 ", "true", "TRUE", "True", "tRuE", "t", "T", "false", "f"),
    *(
        "yes",
        "YES",
        "y",
        "Y",
        "no",
        "n",
        "N",
        "on",
        "On",
        "off",
        "OFF",
        "enable",
        "tru",
        "00",
        "01",
    ),
)
DELAYS = (
    *("0", "1", "0.5", "2.5s", "100ms", "10us", "10μs", "5ns", "1.5ms", "", "s", "ms", "-1", "+1"),
    *("1m", "1e-3", "2147483647", "1 s", "inf", "nan", "0x", "1,5"),
)
PROBABILITIES = (
    *("0", "1", "0.5", "10%", "100%", "1:1000", "1/1000", "1e-3", ".5", "", "%", "x"),
    *("-0.1", "0:1", "1:0", "1:2:3", "50 %", "0%", "1:1"),
)


class Asker:
    """Runs a server with `asks.c`; returns what it wrote down."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.folder = folder
        self.stderr = ""

    def __call__(self, server: list[str], *arguments: str, **variables: str) -> list[str]:
        log = self.folder / "asked"
        log.write_text("")
        done = subprocess.run(
            [*server, str(self.path), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **variables, "ASKS_LOG": str(log)},
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        self.stderr = done.stderr
        return log.read_text().splitlines()


@pytest.fixture
def ask(built: Built, tmp_path: Path) -> Asker:
    return Asker(built("asks"), tmp_path)


def test_parsing(ask: Asker, peer: str) -> None:
    """Each text and each type: the same value, or the same refusal, and a line about it."""
    kinds = (
        "int",
        "unsigned",
        *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
    words = [f"{kind}={text}" for kind in kinds for text in INTEGERS]
    words += [f"size={text}" for text in SIZES]
    words += [f"bool={text}" for text in BOOLEANS]
    ours = ask(OURS, "--dump-plugin", *words)
    refused = len(ask.stderr.splitlines())
    theirs = ask([peer], "--dump-plugin", *words)
    assert len(ours) == len(words)
    assert ours == theirs
    assert refused == len(ask.stderr.splitlines())
    assert sum(": -1" in line for line in ours) > 100


def test_parsing_of_newer_servers(ask: Asker) -> None:
    """Delays and probabilities: those came later than the installed peer.

    Ours is stricter with what is over 100 %, or longer than 31 bits of seconds.
    """
    newer = support.next_peer("nbdkit")
    words = [f"delay={text}" for text in DELAYS] + [f"probability={text}" for text in PROBABILITIES]
    ours = ask(OURS, "--dump-plugin", *words)
    assert len(ours) == len(words)
    theirs = ask([newer], "--dump-plugin", *words)
    assert ours == theirs


def test_paths_and_passwords(ask: Asker, peer: str, tmp_path: Path) -> None:
    """Paths, passwords from a file and a descriptor, refused forms."""
    secret = tmp_path / "secret"
    secret.write_text("from a file\nnot this\n")
    words = [
        *("absolute=x", "absolute=/y", "absolute=", "absolute=a/../b", "realpath=/usr/bin/../bin"),
        *("realpath=/nonexistent", "realpath=", "realpath=.", "password=plain", "password="),
        *(f"password=+{secret}", "password=+/nonexistent", "password=-2", "password=-x"),
        "password=-",
    ]  # fmt: skip
    ours, theirs = (ask(server, "--dump-plugin", *words) for server in (OURS, [peer]))
    assert len(ours) == len(words)
    assert ours == theirs
    assert f"password +{secret}: 0 from a file" in ours


def test_strings_last(ask: Asker, peer: str) -> None:
    """Strings that were handed out while loading are there until unload."""
    for server in (OURS, [peer]):
        assert ask(server, "intern=texting", "-U", "-", "--run", "true") == [
            "kept texting tex <texting 7> ."
        ]


def test_errno_survives_messages(ask: Asker, peer: str) -> None:
    """%m in a message is the plugin's errno, which is the same afterwards."""
    for server in (OURS, [peer]):
        assert ask(server, "-v", "errno=text", "--dump-plugin") == [
            "errno after error: 1",
            "errno after debug: 1",
        ]
        assert "error: error Not a directory text\n" in ask.stderr
        assert "debug: debug Not a directory text\n" in ask.stderr
        ask(server, "errno=text", "--dump-plugin")
        assert "debug Not" not in ask.stderr


def test_outside_of_connections(ask: Asker, peer: str) -> None:
    """There is nobody to ask about: each fails, and says so."""
    ours, theirs = (ask(server, "outside=1", "--dump-plugin") for server in (OURS, [peer]))
    assert ours == theirs == ["export name: NULL", "is tls: -1", "peer name: -1", "peer pid: -1"]


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_who_the_client_is(ask: Asker, peer: str, family: str, free_port: int) -> None:
    """Name, user, process and address of a client, over both kinds of socket."""
    if family == "unix":
        words = ["-U", "-", "--run", 'nbdinfo --size "$uri" >/dev/null']
    else:
        words = ["-i", "127.0.0.1", "-p", str(free_port)]
        words += ["--run", f"nbdinfo --size nbd://127.0.0.1:{free_port}/some%20name >/dev/null"]
    answers = []
    for server in (OURS, [peer]):
        lines = ask(server, *words)
        who = lines.pop(2)
        if family == "unix":
            pid, *rest = who.split(", ")
            assert int(pid.removeprefix("pid ")) > 1
            assert rest == [f"uid {os.getuid()}", f"gid {os.getgid()}"]
        elif server == OURS:  # the peer has an error for the process, and none for the others
            assert who == "pid -1, uid -1, gid -1"
        answers.append(lines)
    ours, theirs = answers
    assert ours == theirs[: len(ours)]  # the peer opens it twice for nbdinfo
    assert ours[0] == ("export name: " if family == "unix" else "export name: some name")
    assert ours[-1].endswith("the rest is untouched")


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (("127.0.0.1", 10809), "0200 2a39 7f000001 0000000000000000"),
        (("::1", 10809, 0, 0), "0a00 2a39 00000000" + "0" * 31 + "1 00000000"),
        (("fe80::1%1", 80, 5, 1), "0a00 0050 00000005 fe80" + "0" * 27 + "1 01000000"),
        ("/tmp/x", "0100 2f746d702f7800"),
        (None, "0100"),
        ((2, 10809), "2800 0000 392a0000 02000000 00000000"),
    ],
)
def test_socket_addresses(name: Any, wanted: str) -> None:
    """Addresses as C has them (on a little-endian machine)."""
    if sys.byteorder != "little":
        support.lacking("the expected bytes are a little-endian machine's")
    assert sockaddr(name).hex() == wanted.replace(" ", "")


@pytest.mark.parametrize("single", [False, True])
def test_stdio_is_safe(ask: Asker, peer: str, single: bool) -> None:
    """Not with -s, where the client is on stdin and stdout."""
    words = ["safe=1", "-s"] if single else ["safe=1", "-U", "-", "--run", "true"]
    answers = [ask(server, *words, ASKS_SAFE="1") for server in (OURS, [peer])]
    assert answers[0] == answers[1]
    assert answers[0] == [
        f"stdio safe in config: {int(not single)}",
        f"stdio safe in config_complete: {int(not single)}",
    ]


def test_threads_of_the_plugins_own(ask: Asker) -> None:
    """Threads that Python does not know may call everything, many at a time."""
    ask(OURS, "-v", "threads=8", "-U", "-", "--run", "nbdinfo $nbd >/dev/null", ASKS_QUIET="1")
    for number in range(8):
        assert f"error: thread {number} has {300 * 1024}\n" in ask.stderr
        for said in (0, 299):
            assert f"debug: thread {number} says {said}\n" in ask.stderr


def test_a_child_process(ask: Asker) -> None:
    """A child that a plugin makes may say an error: it waits for no lock of ours."""
    assert ask(OURS, "fork=1", "--dump-plugin") == ["child: 7"]
    assert ask.stderr == "pynbdkit: error: said by a child\n"


@pytest.fixture
def quiet(built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ASKS_LOG", str(tmp_path / "asked"))
    monkeypatch.setenv("ASKS_QUIET", "1")
    return built("asks")


def test_children_among_busy_threads(
    quiet: Path, nbd: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """So it is while other threads of Python are at work."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        with pynbdkit.serve(pynbdkit.load_plugin(str(quiet))) as server:
            client = nbd.NBD()
            client.connect_uri(server.uri)
            for _ in range(20):
                assert client.pread(1, 3 * 4096) == b"\7"
            client.shutdown()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert capfd.readouterr().err == "pynbdkit: error: said by a child\n" * 20


def test_a_sleep_ends_with_the_server(quiet: Path, nbd: Any, tmp_path: Path) -> None:
    """nbdkit_nanosleep returns early with ESHUTDOWN, which the client gets."""
    server = pynbdkit.serve(pynbdkit.load_plugin(str(quiet)))
    client = nbd.NBD()
    client.connect_uri(server.uri)
    cookie = client.aio_pread(nbd.Buffer(1), 4096)
    log = tmp_path / "asked"
    while not (log.exists() and "sleeping" in log.read_text()):
        client.poll(10)
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    with pytest.raises(nbd.Error) as caught:
        while not client.aio_command_completed(cookie):
            client.poll(-1)
    stopper.join(30)
    assert not stopper.is_alive()
    assert caught.value.errnum == errno.ESHUTDOWN
    assert log.read_text().splitlines()[-1] == "slept: -1 ESHUTDOWN"


def test_a_sleep_ends_with_the_client(quiet: Path, nbd: Any, tmp_path: Path) -> None:
    """A client that is gone keeps nothing asleep; a short sleep is one."""
    with pynbdkit.serve(pynbdkit.load_plugin(str(quiet))) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        assert client.pread(1, 2 * 4096) == b"\0"
        client.aio_pread(nbd.Buffer(1), 4096)
        log = tmp_path / "asked"
        while not (log.exists() and "sleeping" in log.read_text()):
            client.poll(10)
        del client
    assert log.read_text().splitlines()[-1] == "slept: -1 ESHUTDOWN"


def test_shutdown(quiet: Path, sockdir: Path) -> None:
    """A plugin may stop the server; what runs is answered first."""
    with support.ServerProcess(sockdir, [quiet]) as process:
        done = support.run("qemu-io", "-f", "raw", "-r", "-c", "read 16384 512", process.uri)
        assert "read 512/512 bytes" in done.stdout
        assert process.process.wait(30) == 0


def test_a_text_is_there_until_it_is_copied() -> None:
    """C copies what it is handed at once, but not quicker than at once."""
    text = "x" * 100
    address = library._for_now(text)
    assert address
    others = [bytes(100) for _ in range(1000)]
    assert ctypes.string_at(address) == text.encode()
    assert len(others) == 1000


def test_strings_do_not_gather(quiet: Path, nbd: Any) -> None:
    """What a connection was handed goes with it: 64 KiB each time, and a name of its own."""
    plugin = pynbdkit.load_plugin(str(quiet))
    with pynbdkit.serve(plugin) as server:

        def clients(count: int, name: str) -> None:
            for number in range(count):
                client = nbd.NBD()
                client.set_export_name(f"{name}-{number}")
                with contextlib.suppress(nbd.Error):
                    client.connect_unix(server.socket)
                    client.shutdown()

        clients(20, "warm")
        before = resident()
        clients(200, "then")
        assert resident() - before < 4 << 20  # it would be 13 MiB


def resident() -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
