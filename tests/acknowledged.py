"""A client that writes down what it was promised: which of its writes were acknowledged as stable.

A write with FUA is promised when it is answered. A plain write is promised when a flush is answered
that was sent, on whatever connection, after the write had been answered.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SLOT = 4096
"""Each request has a place of its own: so many bytes, written once at most."""
DEPTH = 12
"""And so many requests are in flight on each connection, about."""
KINDS = {"write": 35, "write, fua": 40, "zero, fua": 6, "trim, fua": 6, "flush": 13}


@dataclass
class Sent:
    """One request without an answer yet. `covers`: what is promised when it is answered."""

    kind: str
    client: int
    cookie: int
    covers: dict[int, bytes]


class Writer:
    """`promised`: slot -> the bytes that have to be there, whatever happens to the server."""

    def __init__(
        self,
        nbd: ModuleType,
        clients: Sequence[Any],
        slots: int,
        seed: int = 1,
        kinds: Mapping[str, int] = KINDS,
    ) -> None:
        self.nbd: Any = nbd
        self.clients = clients
        self.promised: dict[int, bytes] = {}
        self.answered = 0
        self._kinds = kinds
        self._rng = random.Random(seed)
        self._free = self._rng.sample(range(slots), slots)
        self._written: dict[int, bytes] = {}
        self._sent: list[Sent] = []
        self._buffers: list[Any] = []
        self._cut_off = False

    def run(self, requests: int, at_half: Callable[[], None] | None = None) -> None:
        """Send so many requests and take the answers.

        `at_half`: called once, when half of them are answered and others are on their way; after
        it, that a connection breaks is no error, and what was answered nevertheless is taken.
        """
        for _ in range(requests):
            self._send()
            while len(self._sent) > DEPTH * len(self.clients):
                self._take_some()
            if at_half is not None and self.answered >= requests // 2:
                at_half()
                self._cut_off = True
                break
        while self._sent:
            self._take_some()

    def _send(self) -> None:
        nbd, number = self.nbd, self._rng.randrange(len(self.clients))
        client = self.clients[number]
        (kind,) = self._rng.choices(list(self._kinds), list(self._kinds.values()))
        flags = nbd.CMD_FLAG_FUA if "fua" in kind else 0
        covers: dict[int, bytes] = {}
        if kind == "flush":
            covers = dict(self._written)
            cookie = client.aio_flush()
        else:
            slot = self._free.pop()
            if kind.startswith("write"):
                data = b"%016x" % self._rng.getrandbits(64) * (SLOT // 16)
                buffer = nbd.Buffer.from_bytearray(bytearray(data))
                self._buffers.append(buffer)
                cookie = client.aio_pwrite(buffer, slot * SLOT, flags=flags)
            else:
                data = bytes(SLOT)
                if kind.startswith("zero"):
                    flags |= self._rng.choice((0, nbd.CMD_FLAG_NO_HOLE))
                    cookie = client.aio_zero(SLOT, slot * SLOT, flags=flags)
                else:
                    cookie = client.aio_trim(SLOT, slot * SLOT, flags=flags)
            covers = {slot: data}
        self._sent.append(Sent(kind, number, cookie, covers))

    def _take_some(self) -> None:
        """Wait for something on the connection of the oldest request, and take what has come."""
        try:
            self.clients[self._sent[0].client].poll(-1)
        except self.nbd.Error:
            if not self._cut_off:
                raise
        for sent in list(self._sent):
            self._take_if_answered(sent)

    def _take_if_answered(self, sent: Sent) -> None:
        try:
            if not self.clients[sent.client].aio_command_completed(sent.cookie):
                return
        except self.nbd.Error:
            if not self._cut_off:
                raise
            self._sent.remove(sent)
            return
        self._sent.remove(sent)
        self.answered += 1
        if sent.kind == "write":
            self._written |= sent.covers
        else:
            self.promised |= sent.covers
