"""Handing clients from one process to another: the two ends of a channel."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator

import pytest

from pynbdkit.server import handover
from pynbdkit.server.handover import NUMBER, Channel

Ends = tuple[socket.socket, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    link, channel = handover.pair()
    channel.setblocking(False)
    ended: list[str] = []
    channel.on_end = lambda: ended.append("end")
    channel.on_reload = lambda: ended.append("reload")
    with link, channel:
        yield link, channel


def hand_one(link: socket.socket, number: int) -> socket.socket:
    """Hand over a client; returns the client's end."""
    ours, client = socket.socketpair()
    with client:
        assert handover.hand(link, client, number)
    return ours


def test_a_client_arrives_with_its_number(ends: Ends) -> None:
    link, channel = ends
    with pytest.raises(BlockingIOError):
        channel.accept()
    with hand_one(link, 7) as ours:
        client, _ = channel.accept()
        with client:
            assert channel.number == 7
            assert client.family == socket.AF_UNIX
            assert not os.get_inheritable(client.fileno())
            client.sendall(b"hello")
            assert ours.recv(5) == b"hello"
    assert link.recv(100) == handover.TAKEN + NUMBER.pack(7)


def test_without_room_the_sender_keeps_it(ends: Ends) -> None:
    """It is told which one it was."""
    link, channel = ends
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with hand_one(link, 8):
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
        fillers = []
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    fillers.append(os.dup(0))
            with pytest.raises(OSError, match="Too many open files"):
                channel.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for fd in fillers:
                os.close(fd)
    assert link.recv(100) == handover.NOT_TAKEN + NUMBER.pack(8)


def test_what_is_no_client(ends: Ends) -> None:
    link, channel = ends
    told: list[str] = []
    channel.on_end = lambda: told.append("end")
    channel.on_reload = lambda: told.append("reload")
    link.send(handover.RELOAD)
    link.shutdown(socket.SHUT_WR)
    for _ in range(2):
        with pytest.raises(BlockingIOError):
            channel.accept()
    assert told == ["reload", "end"]
    channel.tell(handover.READY)  # there is still somebody to tell
    assert link.recv(100) == handover.READY


def test_a_sender_that_has_gone_with_something_unread(ends: Ends) -> None:
    """The kernel says that the connection was reset: it is the end, as any other."""
    link, channel = ends
    told: list[str] = []
    channel.on_end = lambda: told.append("end")
    channel.tell(handover.READY)
    link.close()
    with pytest.raises(BlockingIOError):
        channel.accept()
    assert told == ["end"]
    channel.tell(handover.READY)  # nobody hears it


def test_a_channel_that_is_full_or_closed_takes_no_client(ends: Ends) -> None:
    link, channel = ends
    clients = []
    ours, client = socket.socketpair()
    with ours, client:
        while handover.hand(link, client, 1):
            clients.append(channel)
            assert len(clients) < 10_000
        assert len(clients) > 100
        channel.close()
        assert not handover.hand(link, client, 1)
