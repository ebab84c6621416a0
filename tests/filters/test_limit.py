"""The limit filter: who gets a place, who is refused, and when a place is free again."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit import ConfigError, Device, OpenError, Session
from pynbdkit.chain import Chain
from pynbdkit.filters.limit import LimitFilter
from recording import Recording


def chain(limit: int, plugin: Recording | None = None) -> Chain:
    return Chain(plugin or Recording(4096), [LimitFilter(limit=limit)])


def connected(nbd: Any, uri: str) -> Any:
    """A client, as soon as the server has seen that one before it has gone."""
    deadline = time.monotonic() + 30
    while True:
        client = nbd.NBD()
        try:
            client.connect_uri(uri)
        except nbd.Error:
            assert time.monotonic() < deadline, "no place becomes free"
            time.sleep(0.01)
        else:
            return client


def test_places_are_taken_and_given_back() -> None:
    served = chain(2)
    first, second = served.open(Session()), served.open(Session())
    with pytest.raises(OpenError, match="too many clients: 2 connected, limit=2"):
        served.preconnect(False)
    with pytest.raises(OpenError, match="too many clients: 2 connected, limit=2"):
        served.open(Session())
    first.close()
    served.preconnect(False)
    third = served.open(Session())
    with pytest.raises(OpenError):
        served.open(Session())
    second.close()
    third.close()
    served.open(Session())
    served.open(Session())


def test_the_default_is_one_and_0_is_no_limit() -> None:
    assert LimitFilter().limit == 1
    served = chain(0)
    for _ in range(100):
        served.preconnect(False)
        served.open(Session())


def test_a_client_whose_open_fails_takes_no_place() -> None:
    class Refusing(Recording):
        willing = False

        def open(self, session: Session) -> Device:
            if not self.willing:
                raise OSError(5, "no disk")
            return super().open(session)

    plugin = Refusing(4096)
    served = chain(1, plugin)
    for _ in range(3):
        with pytest.raises(OSError, match="no disk"):
            served.open(Session())
    plugin.willing = True
    served.preconnect(False)
    served.open(Session())


def test_a_layer_outside_that_fails_gives_the_place_back() -> None:
    class Failing(pynbdkit.Filter):
        def open(self, next: Any, session: Session) -> Device:
            next(session)
            raise OSError(5, "outside")

    limit = LimitFilter()
    with pytest.raises(OSError, match="outside"):
        Chain(Recording(4096), [Failing(), limit]).open(Session())
    Chain(Recording(4096), [limit]).open(Session())


def test_many_at_once_never_get_more_places() -> None:
    served = chain(3)
    start = threading.Barrier(16)
    layers: list[Any] = []
    most: list[int] = []

    def client() -> None:
        start.wait()
        for _ in range(200):
            try:
                layer = served.open(Session())
            except OpenError:
                continue
            layers.append(layer)
            most.append(len(layers))
            layers.remove(layer)
            layer.close()

    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= max(most) <= 3
    for _ in range(3):
        served.open(Session())
    with pytest.raises(OpenError):
        served.open(Session())


def test_over_the_wire(nbd: Any, serve: Callable[..., support.ServerProcess]) -> None:
    """The second client is refused with a line in the log; when the first has gone, it comes in."""
    server = serve("--filter=limit", "memory", "1M")
    first = nbd.NBD()
    first.connect_uri(server.uri)
    with pytest.raises(nbd.Error):
        nbd.NBD().connect_uri(server.uri)
    assert "too many clients: 1 connected, limit=1" in server.log()
    assert first.pread(512, 0) == bytes(512)
    first.shutdown()
    second = connected(nbd, server.uri)
    second.shutdown()


def greeted(path: Path) -> socket.socket:
    """A client that has read the greeting, if there was one, and nothing more."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.recv(18, socket.MSG_WAITALL)
    client.sendall(struct.pack(">I", 3))
    return client


def go(client: socket.socket) -> int:
    """Send GO; returns the type of the first reply."""
    client.sendall(b"IHAVEOPT" + struct.pack(">IIIH", 7, 6, 0, 0))
    reply = client.recv(20, socket.MSG_WAITALL)
    kind: int = struct.unpack(">QIII", reply)[2]
    return kind


@pytest.mark.parametrize("peer", [False, True], ids=["pynbdkit", "nbdkit"])
def test_who_is_in_the_handshake_counts_when_it_opens(nbd: Any, sockdir: Path, peer: bool) -> None:
    """A client that dawdles keeps nobody out, and cannot slip in; nbdkit counts the same way."""
    command = [support.program("nbdkit")] if peer else None
    arguments = ["--filter=limit", "memory", "1M"]
    with (
        support.ServerProcess(sockdir, arguments, command) as server,
        greeted(server.socket) as dawdler,
        greeted(server.socket) as other,
    ):
        client = nbd.NBD()
        client.connect_uri(server.uri)
        assert go(dawdler) & 1 << 31
        client.shutdown()
        connected(nbd, server.uri).shutdown()
        deadline = time.monotonic() + 30
        while go(other) & 1 << 31:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("value", ["-1", "x", "4294967296"])
def test_bad_limit(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^limit: "):
        LimitFilter().config("limit", value)
