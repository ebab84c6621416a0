"""The same bytes to the server's handshake and to peers: the same replies, but where we differ.

Where we differ on purpose is in docs/protocol.md; here are the options whose rules are finest, TLS
and extended headers, and the oldstyle greeting.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import support
from packing import (
    ABORT,
    EXPORT_NAME,
    EXTENDED,
    GO,
    INFO,
    LIST,
    LIST_META,
    PEEK,
    REP_INFO,
    SEND_DF,
    SET_META,
    STARTTLS,
    STATUS_PAYLOAD,
    STRUCTURED,
    Reply,
    drain,
    flags,
    go,
    kinds,
    meta,
    option,
    split,
)
from pynbdkit.protocol import handshake_server as hs
from pynbdkit.protocol.handshake_server import ExportInfo, ServerHandshake

SIZE = 2**20
ALLOCATION = meta(b"", b"base:allocation")


class Exports(hs.ExportSource):
    """One export without a name, as nbdkit's memory plugin has and qemu-nbd by default."""

    def list_exports(self) -> list[tuple[str, str]]:
        return [("", "")]

    def open(self, name: str) -> ExportInfo:
        return ExportInfo("", SIZE, 1)


@contextmanager
def running(sock: Path, *command: str) -> Iterator[None]:
    """A peer that listens on the socket."""
    peer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while not sock.exists():
            assert peer.poll() is None, peer.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield
    finally:
        peer.terminate()
        peer.communicate()


def ask(path: Path, greeting: int, data: bytes) -> tuple[bytes, bytes]:
    """The peer's greeting and all that it answers; it closes when it is told that no more comes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        head = b""
        while len(head) < greeting:
            head += sock.recv(greeting - len(head))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        parts = []
        try:
            while part := sock.recv(65536):
                parts.append(part)
        except ConnectionResetError:  # It has closed before it had read everything.
            pass
        return head, b"".join(parts)


def compare(path: Path, server: ServerHandshake, data: bytes) -> None:
    """Every option is refused or granted as the peer does; only the texts are different."""
    greeting, answer = ask(path, 18, data)
    assert server.greeting() == greeting
    theirs, ours = split(answer), split(drain(server, data))
    assert [reply[:2] for reply in ours] == [reply[:2] for reply in theirs]


def nbdkit(program: str, sock: Path, *arguments: str) -> list[str]:
    return [program, "-f", "-U", str(sock), *arguments, "memory", "1M"]


PEERS = ["nbdkit", "newer nbdkit"]


def peer(name: str) -> str:
    return support.program("nbdkit") if name == "nbdkit" else support.next_peer("nbdkit")


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("readonly", [(), ("-r",)])
def test_oldstyle_is_nbdkits(name: str, readonly: tuple[str, ...], sockdir: Path) -> None:
    sock = sockdir / "old.sock"
    with running(sock, *nbdkit(peer(name), sock, "-o", *readonly)):
        greeting, _rest = ask(sock, 152, b"")
        flag_bits = struct.unpack_from(">I", greeting, 24)[0]
    assert hs.oldstyle(ExportInfo("", SIZE, flag_bits | SEND_DF)) == greeting


REQUIRED = {
    "everything": b"".join(
        option(number, data)
        for number, data in [
            (LIST, b""),
            (LIST, b"x"),
            (PEEK, b""),
            (INFO, go(b"")),
            (GO, go(b"", 0, 1, 2, 3)),
            (STRUCTURED, b""),
            (LIST_META, meta(b"")),
            (SET_META, ALLOCATION),
            (EXTENDED, b""),
            (77, b"data"),
            (STARTTLS, b"data"),
        ]
    ),
    "GO with data that lies": option(GO, b"x"),
    "ABORT": option(ABORT) + option(LIST),
    "ABORT with data": option(ABORT, b"x"),
    "EXPORT_NAME": option(EXPORT_NAME),
    "LIST, EXPORT_NAME": option(LIST) + option(EXPORT_NAME),
    "STARTTLS and plaintext": option(STARTTLS) + option(LIST) + option(GO, go(b"")),
}


@pytest.mark.parametrize("name", PEERS)
def test_require_is_nbdkits(name: str, sockdir: Path) -> None:
    sock, keys = sockdir / "tls.sock", sockdir / "psk"
    keys.touch(0o600)
    keys.write_text(f"alice:{os.urandom(32).hex()}\n")
    with running(sock, *nbdkit(peer(name), sock, "--tls=require", f"--tls-psk={keys}")):
        for case, options in REQUIRED.items():
            print(case)
            compare(sock, ServerHandshake(Exports(), tls="require"), flags() + options)
        not_fixed = flags(0) + option(LIST) + option(STARTTLS)
        compare(sock, ServerHandshake(Exports(), tls="require"), not_fixed)


@pytest.mark.parametrize("name", PEERS)
def test_tls_on_is_nbdkits(name: str, sockdir: Path) -> None:
    sock, keys = sockdir / "tls.sock", sockdir / "psk"
    keys.touch(0o600)
    keys.write_text(f"alice:{os.urandom(32).hex()}\n")
    with running(sock, *nbdkit(peer(name), sock, "--tls=on", f"--tls-psk={keys}")):
        for options in (
            option(STARTTLS, b"x") + option(LIST) + option(STRUCTURED) + option(STARTTLS),
            option(STARTTLS) + option(LIST),
            option(INFO, go(b"")) + option(GO, go(b"")),
        ):
            compare(sock, ServerHandshake(Exports(), tls="on"), flags() + options)


def test_no_mc_is_nbdkits(sockdir: Path) -> None:
    sock = sockdir / "mc.sock"
    options = option(LIST_META, meta(b"")) + option(SET_META, ALLOCATION) + option(GO, go(b""))
    with running(sock, *nbdkit(support.next_peer("nbdkit"), sock, "--no-mc")):
        for before in (b"", option(STRUCTURED)):
            server = ServerHandshake(Exports(), meta_contexts=False)
            compare(sock, server, flags() + before + options)


EXTENDED_CASES = {
    "once": option(EXTENDED) + option(GO, go(b"", 3)),
    "before structured replies": option(EXTENDED) + option(STRUCTURED) + option(GO, go(b"", 3)),
    "after structured replies": option(STRUCTURED) + option(EXTENDED) + option(GO, go(b"", 3)),
    "with data": option(EXTENDED, b"x"),
    "contexts before any": option(SET_META, ALLOCATION) + option(LIST_META, ALLOCATION),
    "contexts, and then none": option(EXTENDED)
    + option(SET_META, ALLOCATION)
    + option(SET_META, meta(b""))
    + option(GO, go(b"", 3)),
    "contexts": option(EXTENDED) + option(SET_META, ALLOCATION) + option(GO, go(b"", 3)),
    "EXPORT_NAME": option(EXTENDED) + option(EXPORT_NAME),
}


def test_extended_headers_are_qemus(sockdir: Path) -> None:
    sock, disk = sockdir / "qemu.sock", sockdir / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    command = ["-t", "-f", "raw", "-e", "20", "-k", str(sock), str(disk)]
    with running(sock, support.next_peer("qemu-nbd"), *command):
        for case, options in EXTENDED_CASES.items():
            print(case)
            _greeting, answer = ask(sock, 18, flags() + options)
            server = ServerHandshake(Exports())
            theirs, ours = split(answer), split(drain(server, flags() + options))
            # qemu also tells block sizes, in an info of its own: count each run of infos once.
            assert runs(kinds(ours)) == runs(kinds(theirs))
            assert status_payload(ours) == status_payload(theirs)


def runs(numbers: list[int]) -> list[int]:
    return [number for at, number in enumerate(numbers) if at == 0 or numbers[at - 1] != number]


def status_payload(replies: list[Reply]) -> list[bool]:
    """Whether the server can filter block status, in each INFO_EXPORT."""
    infos = [reply.data for reply in replies if reply.kind == REP_INFO]
    infos = [info for info in infos if info[:2] == b"\0\0"]
    return [bool(struct.unpack(">HQH", info)[2] & STATUS_PAYLOAD) for info in infos]
