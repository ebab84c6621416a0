"""Many connections at once, random requests, calls that wait now and then: no byte is lost.

Each client (libnbd) has a part of the disk for itself and a model of it, and never has two requests
under way for the same bytes. So every read has one right answer, whatever order the server chooses.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
from pynbdkit import Device, Plugin, RunningServer, Session
from pynbdkit.server import carousel, company, crew, waiting, watch

CLIENTS = 6
BLOCK = 512
PART = 4 << 20
"""Bytes of the disk that each client has."""
DEPTH = 24
"""Requests under way per client."""
SECONDS = 0.8


class Moody(Device):
    """A shared RAM disk; some calls wait long, and in bad moments many wait a little."""

    data: bytearray
    threads: set[str]

    def __init__(self, moody: bool) -> None:
        self.moody = moody
        self.nothing = threading.Event()
        self.chance = random.Random(7)

    def get_size(self) -> int:
        return len(self.data)

    def _wait(self) -> None:
        self.threads.add(threading.current_thread().name)
        if self.moody:
            luck = self.chance.random()
            if luck < 0.01:
                self.nothing.wait(0.012)  # long enough to be left behind
            elif luck < 0.3 and int(time.monotonic() * 4) % 4 == 0:
                self.nothing.wait(0.0002)  # in its bad moments: enough to be dispatched

    def pread(self, count: int, offset: int, flags: int) -> Any:
        self._wait()
        data = self.data[offset : offset + count]
        kind = count // BLOCK % 3
        return data if kind == 0 else bytes(data) if kind == 1 else memoryview(data)

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        before = bytes(buf)
        self._wait()
        assert bytes(buf) == before  # nobody else uses the buffer meanwhile
        self.data[offset : offset + len(buf)] = buf

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._wait()
        self.data[offset : offset + count] = bytes(count)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.zero(count, offset, flags)

    def flush(self, flags: int) -> None:
        self._wait()


class MoodyPlugin(Plugin):
    name = "moody"

    def __init__(self, blocking: bool | None, moody: bool = True) -> None:
        super().__init__()
        self.blocking = blocking
        self.moody = moody
        self.data = bytearray(CLIENTS * PART)
        self.threads: set[str] = set()

    def open(self, session: Session) -> Device:
        device = Moody(self.moody)
        device.data, device.threads = self.data, self.threads
        return device


class Client:
    """One connection's random requests on its part of the disk, and what they must give."""

    def __init__(self, nbd: ModuleType, server: RunningServer, number: int) -> None:
        self.nbd = nbd
        self.chance = random.Random(number)
        self.start = number * PART
        self.model = bytearray(PART)
        self.busy: set[int] = set()  # blocks that a request is under way for
        self.waiting = 0
        self.answered = 0
        self.wrong: list[str] = []
        self.handle = nbd.NBD()
        self.handle.add_meta_context("base:allocation")
        self.handle.connect_uri(server.uri)

    def run(self, until: float) -> None:
        try:
            while time.monotonic() < until or self.waiting:
                while self.waiting < DEPTH and time.monotonic() < until:
                    self._ask()
                self.handle.poll(1000)
                if self.wrong:
                    return
            self.handle.shutdown()
        except self.nbd.Error as error:
            self.wrong.append(str(error))

    def _free_blocks(self) -> tuple[int, int] | None:
        """(first, count) of some blocks that no request is under way for."""
        largest = self.chance.choice((1, 1, 8, 8, 8, 64, 600, 1500))
        count = self.chance.randint(1, largest)
        first = self.chance.randrange(PART // BLOCK - count)
        blocks = range(first, first + count)
        return None if any(block in self.busy for block in blocks) else (first, count)

    def _ask(self) -> None:
        found = self._free_blocks()
        if found is None:
            return
        first, count = found
        self.busy.update(range(first, first + count))
        self.waiting += 1
        at, size = first * BLOCK, count * BLOCK
        kind = self.chance.choices(("read", "write", "zero", "trim", "flush"), (9, 7, 2, 1, 1))[0]
        offset = self.start + at
        if kind == "read":
            buffer = self.nbd.Buffer(size)
            right = bytes(self.model[at : at + size])

            def check() -> str:
                got = buffer.to_bytearray()
                return "" if got == right else f"read of {size} at {offset}: {_differ(got, right)}"

            self.handle.aio_pread(buffer, offset, self._done(first, count, kind, check))
            return
        done = self._done(first, count, kind, str)
        if kind == "write":
            data = self.chance.randbytes(size)
            self.model[at : at + size] = data
            self.handle.aio_pwrite(self.nbd.Buffer.from_bytearray(bytearray(data)), offset, done)
        elif kind == "flush":
            self.handle.aio_flush(done)
        else:
            self.model[at : at + size] = bytes(size)
            send = self.handle.aio_zero if kind == "zero" else self.handle.aio_trim
            send(size, offset, done)

    def _done(self, first: int, count: int, kind: str, check: Any) -> Any:
        def done(error: Any) -> int:
            self.busy.difference_update(range(first, first + count))
            self.waiting -= 1
            self.answered += 1
            value = error.value if hasattr(error, "value") else error
            wrong = f"{kind} at block {first}: errno {value}" if value else check()
            if wrong:
                self.wrong.append(wrong)
            return 1

        return done


def _differ(got: bytes, right: bytes) -> str:
    places = [at for at in range(len(right)) if got[at] != right[at]]
    return f"{len(places)} bytes differ, from {places[0]} to {places[-1]}"


def soak(nbd: ModuleType, server: RunningServer) -> list[Client]:
    """Let all clients loose; returns them, when they have ended and nothing was wrong."""
    clients = [Client(nbd, server, number) for number in range(CLIENTS)]
    until = time.monotonic() + SECONDS
    threads = [threading.Thread(target=client.run, args=(until,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [client.wrong for client in clients] == [[] for _ in clients]
    assert min(client.answered for client in clients) > DEPTH
    return clients


@pytest.mark.parametrize("blocking", [False, None, True])
def test_no_byte_is_lost(
    nbd: ModuleType, blocking: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is dispatched seems quick at once: readers run calls again, and are left behind again.
    monkeypatch.setattr(crew, "SAMPLE", 16)
    monkeypatch.setattr(crew, "MAX_SAMPLE", 16)
    monkeypatch.setattr(waiting, "QUICK_CALL", 0.005)
    plugin = MoodyPlugin(blocking)
    with pynbdkit.serve(plugin) as server:
        clients = soak(nbd, server)
    for client in clients:
        assert plugin.data[client.start : client.start + PART] == client.model
    readers = {name for name in plugin.threads if name.startswith(("connection", "carousel"))}
    others = plugin.threads - readers
    if blocking is None:  # calls ran where they were read, and elsewhere
        assert readers
        assert others
    else:
        assert bool(readers) != blocking
        assert bool(others) == blocking


def test_no_byte_is_lost_where_connections_get_on_and_off_all_the_time(
    nbd: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The carousel takes on who has the least company; calls end as they are left behind on it."""
    monkeypatch.setattr(crew, "SAMPLE", 16)
    monkeypatch.setattr(crew, "MAX_SAMPLE", 16)
    monkeypatch.setattr(waiting, "QUICK_CALL", 0.005)
    monkeypatch.setattr(company, "SEVERAL", 2)
    monkeypatch.setattr(carousel, "SWEEP", 0.05)
    monkeypatch.setattr(carousel, "ALONE", 30)
    monkeypatch.setattr(watch, "TICK", 0.001)

    def wait(self: Moody) -> None:
        self.threads.add(threading.current_thread().name)
        luck = self.chance.random()
        if luck < 0.02:
            self.nothing.wait(self.chance.random() * 0.004)  # now before the tick, now after it
        elif luck < 0.1:
            self.nothing.wait(0.0002)

    monkeypatch.setattr(Moody, "_wait", wait)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # threads meet in more places
    try:
        plugin = MoodyPlugin(None)
        with pynbdkit.serve(plugin) as server:
            clients = soak(nbd, server)
    finally:
        sys.setswitchinterval(interval)
    for client in clients:
        assert plugin.data[client.start : client.start + PART] == client.model
    assert "carousel" in plugin.threads


def test_no_byte_is_lost_in_the_memory_plugin(nbd: ModuleType) -> None:
    plugin = pynbdkit.load_plugin("memory", size=CLIENTS * PART)
    with pynbdkit.serve(plugin) as server:
        clients = soak(nbd, server)
        reader = nbd.NBD()
        reader.connect_uri(server.uri)
        for client in clients:
            assert reader.pread(PART, client.start) == client.model
        reader.shutdown()
