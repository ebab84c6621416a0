"""Whole connections, several at a time to one disk, in any order: a state machine by hypothesis.

Clients negotiate whatever they like, send requests that are good and such as are not, many before
they read a reply, in pieces, close one half or all of it, and come back. The model is the bytes of
the disk and a reading of the specification that is not the server's (campaigns/fuzz_handshake.py
and fuzz_requests.py). Requests that touch the same bytes are never under way at the same time: the
protocol leaves their order to the server.

`CONNECTIONS` in the environment is how many runs are tried (`make fuzz` tries many).
"""

from __future__ import annotations

import os
import sys
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import pynbdkit
import support
from raw import Raw

sys.path.insert(0, str(support.ROOT / "campaigns"))

import fuzz_disks
import fuzz_requests
from fuzz_disks import PAGE
from fuzz_handshake import (
    ABORT,
    ACK,
    CONTEXTS,
    DF,
    ERR,
    EXPORT_NAME,
    EXTENDED,
    FILTER,
    GO,
    HAS_FLAGS,
    HEAD,
    IHAVEOPT,
    INFO,
    LIST,
    LIST_MC,
    SET_MC,
    START,
    STRUCTURED,
    Oracle,
    Switches,
)
from fuzz_requests import DISC, FLUSH, READ, STATUS, WRITE, ZEROES, Asked, Model, Terms

from pynbdkit.complete import Layer
from pynbdkit.protocol.negotiated import ExportInfo
from pynbdkit.server.connection import transmission_flags
from pynbdkit.session import Session

SIZE = fuzz_disks.Strict.size
CLIENTS = 3


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return HEAD.pack(IHAVEOPT, number, len(data) if length is None else length) + data


def counted(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def contexts(*names: bytes) -> bytes:
    return counted(b"") + len(names).to_bytes(4, "big") + b"".join(map(counted, names))


GOOD = (
    option(STRUCTURED),
    option(EXTENDED),
    option(SET_MC, contexts(b"base:allocation")),
    option(SET_MC, contexts(b"test:wide", b"base:allocation", b"test:page", b"x:y")),
)
OTHERS = (
    *(option(LIST), option(INFO, counted(b"") + b"\0\3\0\1\0\2\0\3"), option(LIST_MC, contexts())),
    *(option(LIST_MC, contexts(b"test:")), option(SET_MC, contexts()), option(START)),
    *(option(99, b"data"), option(0), option(LIST, b"data"), option(START, b"data")),
    *(option(INFO, b"\0"), option(INFO, counted(b"\xff") + b"\0\0"), option(INFO)),
    *(option(SET_MC, contexts(b"none")), option(SET_MC, counted(b"") + b"\xff\xff\xff\xff")),
)
ENDS = (
    *(option(GO, counted(b"") + b"\0\0"), option(GO, counted(b"") + b"\0\1\0\3")),
    *(option(EXPORT_NAME), option(ABORT), option(ABORT, b"data"), option(EXPORT_NAME, b"\xff")),
    *(b"IHAVEOPX" + bytes(8), option(INFO, b"", 1 << 27), b"IHAVE"),
)

AGREEMENTS: tuple[list[bytes], ...] = (
    *([], [], [GOOD[0]], [GOOD[0], GOOD[2]], [GOOD[0], GOOD[3]]),
    *([GOOD[1]], [GOOD[1], GOOD[2]], [GOOD[1], GOOD[3]], [GOOD[1], GOOD[3]]),
)

offsets = st.sampled_from((0, 1, 512, PAGE - 1, PAGE, 2 * PAGE, 9 * PAGE, SIZE - 100, SIZE - 1))
lengths = st.sampled_from((1, 2, 100, 512, PAGE, 9 * PAGE))
bad_offsets = st.sampled_from((SIZE, SIZE - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
kinds = st.sampled_from((READ, READ, WRITE, WRITE, FLUSH, 4, 5, ZEROES, STATUS, STATUS))


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, int, int, int, bytes]:
    """flags, kind, offset, length, content: good, or with one thing wrong."""
    kind, offset, length = draw(kinds), draw(offsets), draw(lengths)
    flags = int(draw(st.booleans())) if kind in (WRITE, FLUSH, 4, ZEROES) else 0
    if kind == FLUSH:
        offset = length = 0
    if kind == STATUS:
        flags = draw(st.sampled_from((0, 8, 32)))
    wrong = draw(st.sampled_from((None, None, None, "offset", "length", "flags", "kind")))
    if wrong == "offset":
        offset = draw(bad_offsets)
    elif wrong == "length":
        length = draw(st.sampled_from((0, 0, SIZE + 1, (1 << 32) - 1)))
    elif wrong == "flags":
        flags |= 1 << draw(st.integers(0, 15))
    elif wrong == "kind":
        kind = draw(st.sampled_from((8, 99, 0xFFFF)))
    return flags, kind, offset, length, draw(st.binary(min_size=1, max_size=3))


class Client:
    """A connection that has got as far as requests."""

    def __init__(self, raw: Raw, terms: Terms) -> None:
        self.raw = raw
        self.terms = terms
        self.pending: dict[int, Asked] = {}
        self.cookie = 0

    def encode(self, request: tuple[int, int, int, int, bytes]) -> tuple[Asked, bytes]:
        """A request for this connection: what is asked, and the bytes."""
        flags, kind, offset, length, content = request
        self.cookie += 1
        extended = self.terms.extended
        payload = b""
        if kind == WRITE:
            length = min(length, SIZE + 1)
            payload = (content * length)[:length]
            flags |= 32 if extended else 0
        elif kind == STATUS and extended and flags & 32:
            ids = [byte % 4 for byte in content]
            payload = length.to_bytes(8, "big") + b"".join([n.to_bytes(4, "big") for n in ids])
            length = len(payload)
        elif extended and flags & 32:
            length = min(length, 100)
            payload = bytes(length)
        asked = Asked(flags, kind, self.cookie, offset, length, payload or None)
        head = fuzz_requests.LONG_HEAD if extended else fuzz_requests.HEAD
        magic = 0x21E41C71 if extended else 0x25609513
        return asked, head.pack(magic, flags, kind, self.cookie, offset, length) + payload


def clash(one: Asked, other: Asked) -> bool:
    """Whether the order of two requests makes a difference."""
    if one.kind in (READ, STATUS, FLUSH) and other.kind in (READ, STATUS, FLUSH):
        return False
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length


class Negotiation(Oracle):
    """What the handshake may answer, for the one export."""

    secret = None

    def _has(self, name: str) -> bool:
        return True  # it is called whatever a client calls it

    def available(self, name: str, queries: Any) -> tuple[str, ...]:
        return CONTEXTS


class Connections(RuleBasedStateMachine):
    """Clients of a server."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Client] = []
        self.stack: Any = fuzz_disks.no_surprises()
        self.stack.__enter__()

    @initialize(
        kind=st.sampled_from((fuzz_disks.Strict, fuzz_disks.Group)),
        blocking=st.sampled_from((None, False, True)),
    )
    def serve(self, kind: type[fuzz_disks.Strict], blocking: bool | None) -> None:
        self.disk = kind()
        self.disk.blocking = blocking
        self.server = pynbdkit.serve(self.disk)
        layer = Layer(self.disk, Session(), "disk")
        self.model = Model(self.disk, layer, Terms(False, False, {}))
        flags = transmission_flags(layer) & ~(DF | FILTER) | HAS_FLAGS
        Negotiation.exports = {"": ExportInfo("", SIZE, flags)}

    # -- negotiation -----------------------------------------------------------------------------

    def connect(self) -> Raw:
        assert self.server.socket is not None
        return Raw(self.server.socket, go=False)

    @precondition(lambda self: len(self.clients) < CLIENTS)
    @rule(
        first=st.sampled_from(AGREEMENTS),
        options=st.lists(st.sampled_from((*GOOD, *OTHERS)), max_size=4),
        end=st.sampled_from((ENDS[0],) * 8 + ENDS),
        flags=st.sampled_from((3, 3, 3, 3, 3, 1, 2, 0, 7)),
        early=st.lists(requests(), max_size=2),
        cut=st.integers(0, 300),
    )
    def negotiate(
        self,
        first: list[bytes],
        options: list[bytes],
        end: bytes,
        flags: int,
        early: list[tuple[int, int, int, int, bytes]],
        cut: int,
    ) -> None:
        """Send it all, and perhaps requests at once behind what should be the end."""
        raw = self.connect()
        assert raw.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        options = [*first, *options]
        stream = flags.to_bytes(4, "big") + b"".join(options) + end
        client = Client(raw, Terms(False, GOOD[1] in options, {}))
        behind = b""
        if end in ENDS[:2] and flags & 1:
            for other in self.clients:
                self.receive_all(other)
            for request in early:
                behind += self.encode(client, request)
        for part in (stream[:cut], stream[cut:] + behind):
            if part:
                try:
                    raw.send(part)
                except OSError:  # it has been ended by what came before
                    break
        answers = b""
        ended = flags == 7
        for frame in () if ended else (*options, end):
            answer = self.answer(raw, frame, flags)
            if answer is None:
                ended = True
                break
            answers += answer
        oracle = Negotiation(Switches(), stream, b"", answers)
        terms = oracle.run()
        assert oracle.out == len(answers)
        if terms is None:
            assert oracle.closed or not ended
            if not oracle.closed:  # it is refused, or waits for the rest of an option
                raw.sock.shutdown(1)
            assert raw.at_end()
            raw.close()
        else:
            names = dict(enumerate(terms.contexts, 1))
            client.terms = Terms(terms.structured, terms.extended, names)
            self.clients.append(client)

    @staticmethod
    def encode(client: Client, request: tuple[int, int, int, int, bytes]) -> bytes:
        """A request that is to be answered; b"" if it has to wait for one that is under way."""
        asked, data = client.encode(request)
        if any(clash(asked, other) for other in client.pending.values()):
            return b""
        client.pending[asked.cookie] = asked
        return data

    @staticmethod
    def answer(raw: Raw, frame: bytes, flags: int) -> bytes | None:
        """The replies to an option, to the last; None where the server ends the connection."""
        number = int.from_bytes(frame[8:12], "big")
        answer = b""
        try:
            if number == EXPORT_NAME:
                return raw.receive(10 if flags & 2 else 134)
            while len(frame) >= 16:
                head = raw.receive(20)
                answer += head + raw.receive(int.from_bytes(head[16:], "big"))
                if head[15] == ACK or int.from_bytes(head[12:16], "big") & ERR:
                    return answer
        except (EOFError, ConnectionResetError):
            assert not answer
        return None if len(frame) >= 16 else b""

    # -- requests --------------------------------------------------------------------------------

    @precondition(lambda self: self.clients)
    @rule(
        which=st.integers(0, CLIENTS),
        batch=st.lists(requests(), min_size=1, max_size=6),
        cut=st.integers(0, 300),
    )
    def send(self, which: int, batch: list[tuple[int, int, int, int, bytes]], cut: int) -> None:
        client = self.clients[which % len(self.clients)]
        stream = b""
        for request in batch:
            asked, data = client.encode(request)
            if any(clash(asked, other) for c in self.clients for other in c.pending.values()):
                client.raw.send(stream)
                stream = b""
                for other in self.clients:
                    self.receive_all(other)
            client.pending[asked.cookie] = asked
            stream += data
        client.raw.send(stream[:cut])
        client.raw.send(stream[cut:])

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, CLIENTS))
    def receive(self, which: int) -> None:
        self.receive_all(self.clients[which % len(self.clients)])

    def receive_all(self, client: Client) -> None:
        while client.pending:
            self.receive_one(client)
        fuzz_disks.nothing_wrong()

    def receive_one(self, client: Client) -> None:
        raw = client.raw
        data = head = raw.receive(16)
        asked = client.pending.pop(int.from_bytes(head[8:], "big"))
        if head[:4] == b"\x67\x44\x66\x98":
            if asked.kind == READ and head[4:8] == bytes(4):
                data += raw.receive(asked.length)
        else:
            size = 16 if client.terms.extended else 4
            while True:
                rest = raw.receive(size)
                data += rest + raw.receive(int.from_bytes(rest[-8 if size > 4 else -4 :], "big"))
                if head[5]:
                    break
                head = raw.receive(16)
                data += head
        self.model.terms = client.terms
        assert self.model.check_reply(asked, data, 0) == len(data)

    # -- ways to go ------------------------------------------------------------------------------

    def drop(self, which: int) -> Client:
        return self.clients.pop(which % len(self.clients))

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, CLIENTS), how=st.sampled_from(("half", "goodbye", "magic", "part")))
    def leave(self, which: int, how: str) -> None:
        client = self.drop(which)
        if how == "goodbye":
            _, data = client.encode((0, DISC, 0, 0, b"x"))
            client.raw.send(data + data)
        elif how == "magic":
            client.raw.send(bytes(32))
        elif how == "part":
            _, data = client.encode((0, WRITE, 0, PAGE, b"never"))
            client.raw.send(data[:-1])
        if how in ("half", "part"):
            client.raw.sock.shutdown(1)
        self.receive_all(client)
        assert client.raw.at_end()
        client.raw.close()

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, CLIENTS), length=st.integers(1, 40))
    def vanish(self, which: int, length: int) -> None:
        client = self.drop(which)
        self.receive_all(client)
        _, data = client.encode((0, WRITE, 0, PAGE, b"never"))
        client.raw.send(data[:length])
        client.raw.close()

    def teardown(self) -> None:
        try:
            if hasattr(self, "server"):
                for client in self.clients:
                    self.receive_all(client)
                with Raw(str(self.server.socket)) as last:
                    last.ask(READ, 1, 0, SIZE)
                    assert last.simple(SIZE) == (1, 0, bytes(self.model.content))
                fuzz_disks.nothing_wrong()
        finally:
            for client in self.clients:
                client.raw.close()
            if hasattr(self, "server"):
                self.server.stop()
            self.stack.__exit__(None, None, None)


TestConnections = Connections.TestCase
TestConnections.settings = settings(
    max_examples=int(os.environ.get("CONNECTIONS", "25")),
    stateful_step_count=20,
    deadline=None,
    derandomize="CONNECTIONS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
