"""Writers: a load of changing requests on several connections, entered into a ledger.

Writes of many sizes, zeros and trims, with and without FUA, and flushes; so many in flight on each
connection. Places are chosen without care, so requests overlap, and much is written over and over.
"""

from __future__ import annotations

import random
import select
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ledger import SECTOR, TRIM, WRITE, ZERO, Ledger, payload


@dataclass(frozen=True)
class Load:
    """How many connections, how many requests in flight on each, and how many of each kind."""

    connections: int
    depth: int
    mix: Mapping[str, int]


MIXED = {
    "write": 30,
    "write, fua": 40,
    "zero": 4,
    "zero, fua": 5,
    "trim": 4,
    "trim, fua": 5,
    "flush": 12,
}
LOADS = {
    "mixed": Load(4, 16, MIXED),
    "few": Load(2, 3, MIXED),
    "fua": Load(4, 16, {"write": 50, "write, fua": 50}),
    "fua, alone": Load(1, 1, {"write": 50, "write, fua": 50}),
    "flush": Load(4, 16, {"write": 90, "flush": 10}),
    "flushes": Load(8, 6, {"write": 60, "flush": 40}),
    "zero": Load(4, 16, {"write": 50, "zero, fua": 25, "trim, fua": 25}),
}
"""After the first two: loads in which no other request's sync makes up for a missing one."""
SIZES = (1, 1, 2, 7, 8, 8, 8, 8, 9, 16, 32, 64, 128)
"""Sectors that a request has."""


class Writers:
    """Connections that write to one export together."""

    def __init__(
        self,
        nbd: ModuleType,
        uri: str,
        ledger: Ledger,
        rng: random.Random,
        load: Load = LOADS["mixed"],
        *,
        sizes: Sequence[int] = SIZES,
    ) -> None:
        """Connect. Raises nbd.Error."""
        self._nbd: Any = nbd
        self._ledger = ledger
        self._rng = rng
        self._depth = load.depth
        self._kinds, self._weights = list(load.mix), list(load.mix.values())
        self._sizes = sizes
        self.errors: list[tuple[str, int]] = []
        """(kind, errno) of requests that were answered with an error."""
        self.sent = 0
        self._clients: list[Any] = []
        for _ in range(load.connections):
            client = self._nbd.NBD()
            client.connect_uri(uri)
            self._clients.append(client)
        self._in_flight = [0] * load.connections
        self._buffers: dict[int, Any] = {}
        assert self._clients[0].can_multi_conn(), "the ledger's rule for flushes is for multi-conn"

    def run(self, more: Callable[[], bool]) -> None:
        """Send while `more` says so, then take the answers; a connection's end ends its part."""
        while True:
            going = more()
            poll = select.poll()
            by_fd: dict[int, int] = {}
            for number, client in enumerate(self._clients):
                if client.aio_is_dead() or client.aio_is_closed():
                    continue
                while going and self._in_flight[number] < self._depth:
                    if not self._send(number, client):
                        break
                if self._in_flight[number] and not self._gone(client):
                    direction = client.aio_get_direction()
                    events = (direction & 1 and select.POLLIN) | (direction & 2 and select.POLLOUT)
                    poll.register(client.aio_get_fd(), events)
                    by_fd[client.aio_get_fd()] = number
            if not by_fd:
                return
            for fd, event in poll.poll():
                self._notify(self._clients[by_fd[fd]], event)

    def _gone(self, client: Any) -> bool:
        return bool(client.aio_is_dead() or client.aio_is_closed())

    def _notify(self, client: Any, event: int) -> None:
        try:
            if event & select.POLLOUT and client.aio_get_direction() & 2:
                client.aio_notify_write()
            elif event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                client.aio_notify_read()
        except self._nbd.Error:
            pass  # the server has gone; the calls learn of it from libnbd

    @property
    def broken(self) -> bool:
        """Whether a connection has ended that nobody closed."""
        return any(self._gone(client) for client in self._clients)

    def close(self) -> None:
        """Say goodbye where somebody still listens."""
        for client in self._clients:
            try:
                client.shutdown()
            except self._nbd.Error:
                pass
        self._clients.clear()

    # -- one request -------------------------------------------------------------------------------

    def _send(self, number: int, client: Any) -> bool:
        """Send a request; False if the connection has ended."""
        nbd, rng = self._nbd, self._rng
        (what,) = rng.choices(self._kinds, self._weights)
        self.sent += 1
        try:
            if what == "flush":
                begun = self._ledger.flush()
                done = self._completion(number, what, lambda: self._ledger.flushed(begun))
                client.aio_flush(completion=done)
                return True
            kind, fua = what.split(",")[0], "fua" in what
            sectors = len(self._ledger.base) // SECTOR
            first = rng.randrange(sectors)
            end = min(first + rng.choice(self._sizes), sectors)
            offset, count = first * SECTOR, (end - first) * SECTOR
            flags = nbd.CMD_FLAG_FUA if fua else 0
            entry = self._ledger.send(kind, fua, first, end)
            done = self._completion(number, what, lambda: self._ledger.answer(entry), entry.serial)
            if kind == WRITE:
                buffer = nbd.Buffer.from_bytearray(payload(entry.serial, first, end))
                self._buffers[entry.serial] = buffer  # libnbd reads it until the answer
                client.aio_pwrite(buffer, offset, completion=done, flags=flags)
            elif kind == ZERO:
                flags |= rng.choice((0, nbd.CMD_FLAG_NO_HOLE))
                client.aio_zero(count, offset, completion=done, flags=flags)
            else:
                assert kind == TRIM
                client.aio_trim(count, offset, completion=done, flags=flags)
        except nbd.Error:
            if not self._gone(client):
                raise
            return False
        return True

    def _completion(
        self, number: int, what: str, good: Callable[[], None], serial: int = 0
    ) -> Callable[[Any], int]:
        self._in_flight[number] += 1

        def done(error: Any) -> int:
            self._in_flight[number] -= 1
            self._buffers.pop(serial, None)
            if not error.value:
                good()
            elif not self._gone_with(error.value):
                self.errors.append((what, error.value))
            return 1

        return done

    @staticmethod
    def _gone_with(number: int) -> bool:
        import errno

        return number in (errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET)
