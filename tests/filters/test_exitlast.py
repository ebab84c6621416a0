"""The exitlast filter: when the server stops by itself, and when it does not."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import support
from pynbdkit import Device, Session
from pynbdkit.chain import Chain
from pynbdkit.filters.exitlast import ExitLastFilter
from recording import Recording


def test_only_the_last_one_stops_the_server() -> None:
    stops: list[None] = []
    session = Session(shutdown=lambda: stops.append(None))
    served = Chain(Recording(4096), [ExitLastFilter()])
    served.preconnect(False)
    first, second = served.open(session), served.open(session)
    first.close()
    third = served.open(session)
    third.close()
    assert not stops
    second.close()
    assert len(stops) == 1


def test_a_client_that_opens_nothing_is_none() -> None:
    class Refusing(Recording):
        def open(self, session: Session) -> Device:
            raise OSError(5, "no disk")

    def never() -> None:
        raise AssertionError("stopped before the first client")

    with pytest.raises(OSError, match="no disk"):
        Chain(Refusing(4096), [ExitLastFilter()]).open(Session(shutdown=never))


@pytest.mark.parametrize("peer", [False, True], ids=["pynbdkit", "nbdkit"])
def test_over_the_wire(nbd: Any, sockdir: Path, peer: bool) -> None:
    """A probe and a list do not stop it; two clients, one after the other gone, do: exit 0."""
    command = [support.program("nbdkit")] if peer else None
    arguments = ["--filter=exitlast", "memory", "1M"]
    server = support.ServerProcess(sockdir, arguments, command)  # it has been probed to get here
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(server.socket))
            assert probe.recv(18, socket.MSG_WAITALL)
        lister = nbd.NBD()
        lister.set_opt_mode(True)
        lister.connect_uri(server.uri)
        assert lister.opt_list(lambda name, description: 0) == 1
        lister.opt_abort()

        first, second = nbd.NBD(), nbd.NBD()
        first.connect_uri(server.uri)
        second.connect_uri(server.uri)
        first.shutdown()
        assert second.pread(512, 0) == bytes(512)
        assert server.process.poll() is None
        second.shutdown()
        assert server.process.wait(30) == 0
    finally:
        server.stop()


def test_info_before_go_is_one_client(
    nbd: Any, serve: Callable[..., support.ServerProcess]
) -> None:
    """A client that asks about the export before it goes on is not taken for two."""
    server = serve("--filter=exitlast", "memory", "1M")
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_uri(server.uri)
    client.opt_info()
    client.opt_go()
    assert client.pread(512, 0) == bytes(512)
    client.shutdown()
    assert server.process.wait(30) == 0
