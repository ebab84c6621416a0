"""Fuzzing of the client: what a server may answer, to options and to requests.

Inputs are scripts, item by item: ``kind, length, bytes``. An item is a reply that is well formed
and to what was asked (with the bytes as its content), one with something wrong, or the bytes
themselves. So a server that keeps to the rules for a while, and then does not, is a short input.

The oracle: a server that breaks the rules is a ProtocolError and nothing else; the client asks for
one thing at a time, for nothing twice, and never in the clear for what it wants over TLS; what it
believes at the end is what it was told; any split gives the same; what is stored is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from struct import Struct
from typing import Any

from fuzz_base import Finding, Target, check, havoc, pieces, reframe

from pynbdkit.protocol.errors import ProtocolError
from pynbdkit.protocol.handshake_client import (
    ABORTING,
    CLOSED,
    GREETING,
    MAX_REPLY_DATA,
    OPTIONS,
    STARTTLS,
    TRANSMISSION,
    ClientHandshake,
)
from pynbdkit.protocol.replies import MAX_CHUNK, Reply, ReplyParser

EXPORT_NAME, ABORT, LIST, _PEEK, START, INFO, GO, STRUCTURED, LIST_MC, SET_MC, EXTENDED = range(
    1, 12
)
ERR = 1 << 31
REPLY = Struct(">QIII")
OPTION = Struct(">QII")
IHAVEOPT = 0x49484156454F5054
NBDMAGIC = 0x4E42444D41474943
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
FIXED_TYPES = (ACK, SERVER, REP_INFO, META, *(ERR + code for code in (1, 2, 3, 5, 6, 7, 10)))
(WRONG_OPTION, RAW, TYPED, LONG, END) = range(len(FIXED_TYPES), 16)
INFO_EXPORT, INFO_BLOCK, INFO_TEXT = 16, 32, 48
"""Added to REP_INFO: what its content is made of. In all: the high bits of an item's kind."""


def items(script: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and bytes of each item."""
    at = 0
    while at + 2 <= len(script):
        length = script[at + 1]
        yield script[at], script[at + 2 : at + 2 + length]
        at += 2 + length


def split_items(script: bytes) -> list[bytes]:
    """The items, as they are written."""
    return [bytes((kind, len(data))) + data for kind, data in items(script)]


def well_formed(kind: int, form: int, data: bytes) -> bytes:
    """The data of a reply, with `data` as its content."""
    if kind == SERVER:
        name, text = data[: len(data) // 2], data[len(data) // 2 :]
        return len(name).to_bytes(4, "big") + name + text
    if kind == META:
        return bytes(3) + data[:1].rjust(1, b"\0") + (data[1:] or b"base:allocation")
    if kind == REP_INFO:
        if form == INFO_EXPORT:
            return bytes(2) + data[:8].rjust(8, b"\0") + (data[8:10].ljust(1, b"\0") + b"\1")[:2]
        if form == INFO_BLOCK:
            sizes = [1 << byte % 33 for byte in data[:3].ljust(3, b"\x0c")]
            return b"\0\3" + b"".join([(size & 0xFFFFFFFF).to_bytes(4, "big") for size in sizes])
        return bytes((0, 1 + len(data) % 2)) + data
    return data


class Client(Target):
    """What a server says during a client's handshake."""

    name = "client"
    modules = ("pynbdkit.protocol.handshake_client", "pynbdkit.protocol.options")
    share = 3.0

    def one(self, data: bytes) -> None:
        """Play the server of the script."""
        head, script = (data + bytes(4))[:4], data[4:]
        first = self._machine(head)
        fed, said = self._play(first, head, script)
        if head[3] and not first[1]:
            again = self._machine(head)
            self._feed(again[0], fed, head[3], said)
            check(self._summary(first[0]) == self._summary(again[0]), "another split, another end")

    @staticmethod
    def _machine(head: bytes) -> tuple[ClientHandshake, list[str]]:
        bits = [bool(head[0] >> bit & 1) for bit in range(8)]
        machine = ClientHandshake(
            None if bits[0] and head[1] & 4 else "disk",
            enter=not bits[0],
            list_exports=bits[1] or (bits[0] and bool(head[1] & 4)),
            structured_replies=not bits[2],
            extended_headers=not bits[3],
            contexts=() if bits[4] else ("base:allocation", "x:y"),
            list_contexts=bits[5],
            fixed=not bits[6],
            no_zeroes=not bits[7],
            tls=("off", "on", "require", "off")[head[1] & 3],
        )
        return machine, []

    @staticmethod
    def _greeting(head: bytes) -> bytes:
        if head[2] & 15 == 15:
            flags = Struct(">QI").pack(1 << 20, head[2])
            return Struct(">QQ").pack(NBDMAGIC, 0x00420281861253) + flags + bytes(124)
        return Struct(">QQH").pack(NBDMAGIC, IHAVEOPT, (head[2] ^ 3) & 0x1F)

    def _play(
        self, state: tuple[ClientHandshake, list[str]], head: bytes, script: bytes
    ) -> tuple[list[bytes], bytes]:
        """Answer what the client asks. Returns what was fed, cut where TLS began; what it said."""
        machine, failed = state
        watch = Watch(machine, head)
        fed = [bytearray()]

        def feed(data: bytes) -> bool:
            fed[-1] += data
            try:
                said = machine.receive(data)
            except ProtocolError:
                failed.append("ProtocolError")
                check(machine.state == CLOSED, f"state {machine.state} after a ProtocolError")
                return False
            watch.listen(said)
            if machine.state == STARTTLS and not machine._input:
                fed.append(bytearray())
                watch.listen(machine.tls_started())
            return machine.state in (GREETING, OPTIONS, ABORTING)

        alive = feed(self._greeting(head))
        for kind, data in items(script):
            if not alive:
                break
            form, kind = kind & 48, kind & 15
            if kind == END:
                try:
                    machine.receive_eof()
                except ProtocolError:
                    pass
                failed.append("the end")
                check(machine.state == CLOSED, f"the state at the end is {machine.state}")
                break
            alive = feed(self._frame(watch, kind, form, data))
            check(len(machine._input) <= MAX_REPLY_DATA + 400, "too much is stored")
        watch.end()
        return [bytes(part) for part in fed], bytes(watch.heard)

    @staticmethod
    def _frame(watch: Watch, kind: int, form: int, data: bytes) -> bytes:
        if kind == RAW:
            return data
        if watch.option == EXPORT_NAME:
            size = 10 if watch.flags & 2 else 134
            return data[:9].ljust(9, b"\0") + bytes((1,)) + bytes(size - 10)
        number = FIXED_TYPES[kind] if kind < len(FIXED_TYPES) else ACK
        option = watch.option
        if kind == WRONG_OPTION:
            option = data[0] if data else 0
        elif kind == TYPED:
            number, data = int.from_bytes(data[:4], "big"), data[4:]
        elif form and kind < len(FIXED_TYPES):
            data = well_formed(number, form, data)
        length = len(data)
        if kind == LONG:
            length = int.from_bytes(data[:4], "big")
            data = data[4:]
        return REPLY.pack(0x3E889045565A9, option, number, length) + data

    @staticmethod
    def _feed(machine: ClientHandshake, fed: list[bytes], split: int, said: bytes) -> None:
        heard = b""
        for index, part in enumerate(fed):
            if index:
                heard += machine.tls_started()
            for piece in pieces(part, split):
                heard += machine.receive(piece)
        check(heard == said, "another split, other options")

    @staticmethod
    def _summary(machine: ClientHandshake) -> tuple[Any, ...]:
        return (
            *(machine.state, machine.protocol, machine.tls, machine.structured_replies),
            *(machine.extended_headers, machine.exports, machine.available_contexts),
            *(machine.contexts, machine.export, str(machine.refusal), machine.leftover),
        )

    def mutate(self, data: bytes, random: Random) -> bytes:
        """Another script, now and then for another client."""
        data += bytes(max(4 - len(data), 0))
        head, script = data[:4], data[4:]
        if not random.randrange(4):
            head = (havoc(head, random) + bytes(4))[:4]
        return head + reframe(
            split_items(script), random, lambda: make_item(random), lambda item: havoc(item, random)
        )


def make_item(random: Random) -> bytes:
    """A likely reply."""
    kind = random.choice((0, 0, 0, 1, 2, 2, 3, 3, 4, random.randrange(16)))
    if kind == REP_INFO - 1:
        kind |= random.choice((INFO_EXPORT, INFO_EXPORT, INFO_BLOCK, INFO_TEXT))
    elif kind in (1, 3):
        kind |= 16
    text = random.choice((b"", b"", b"abc", b"\0", b"\xff\xfe", random.randbytes(10), b"\7" * 250))
    if kind == 0 and random.randrange(8):
        text = b""
    return bytes((kind, len(text))) + text


class Watch:
    """What a client has said so far, and whether it may."""

    def __init__(self, machine: ClientHandshake, head: bytes) -> None:
        self._machine = machine
        self._tls = ("off", "on", "require", "off")[head[1] & 3]
        self.heard = bytearray()
        self.flags = -1
        self.option = 0
        self._asked: list[int] = []
        self._secure = False
        self._server = (head[2] ^ 3) & 0x1F

    def listen(self, said: bytes) -> None:
        """The client has said something."""
        self.heard += said
        if not said:
            return
        if self.flags < 0:
            self.flags = int.from_bytes(said[:4], "big")
            check(len(said) >= 4 and not self.flags & ~(self._server & 3), f"flags {self.flags:#x}")
            said = said[4:]
            if not said:
                return
        magic, option, length = OPTION.unpack_from(said)
        check(magic == IHAVEOPT and len(said) == OPTION.size + length, f"an odd option: {said!r}")
        check(option in range(1, 12), f"option {option}")
        check(option not in self._asked, f"option {option} twice")
        check(ABORT not in self._asked, f"option {option} after ABORT")
        check(self.flags & 1 or option == EXPORT_NAME, f"option {option} without fixed newstyle")
        if self._tls != "off" and self.flags & 1:
            check(option == START or self._asked, f"option {option} before STARTTLS")
        if self._tls == "require" and not self._machine.tls:
            check(option in (START, ABORT), f"option {option} in the clear")
        check(option != SET_MC or self._machine.structured_replies, "contexts, but no chunks")
        extended = self._machine.extended_headers
        check(not (extended and option in (STRUCTURED, EXPORT_NAME)), f"{option} after extended")
        self._asked.append(option)
        self.option = option

    def end(self) -> None:
        """Nothing more is said."""
        machine = self._machine
        if machine.state != TRANSMISSION:
            return
        negotiated = machine.negotiated
        check(negotiated.export.flags & 1, "flags that are not there")
        check(self._tls != "require" or machine.tls, "transmission in the clear")
        if negotiated.extended_headers:
            check(EXTENDED in self._asked and negotiated.structured_replies, "extended headers")
        elif negotiated.structured_replies:
            check(STRUCTURED in self._asked, "structured replies that were not asked for")
        ids = [number for number, _ in negotiated.contexts]
        check(len({*ids}) == len(ids), "a context ID twice")
        if ids:
            check(SET_MC in self._asked, "contexts that were not asked for")


# -- replies to requests ---------------------------------------------------------------------------

READ, WRITE, _DISC, FLUSH, TRIM, _CACHE, ZEROES, STATUS = range(8)
ASKED = (
    *((READ, 0, 16), (READ, 4096, 512), (READ, (1 << 63) - 9, 8), (WRITE, 0, 16), (FLUSH, 0, 0)),
    *((TRIM, 512, 1 << 33), (STATUS, 0, 4096), (STATUS, 1 << 40, 1 << 40), (READ, 7, 1)),
)
CHUNK = Struct(">IHHQI")
LONG_CHUNK = Struct(">IHHQQQ")
(S_OK, S_ERROR, C_NONE, C_DATA, C_HOLE, C_STATUS, C_ERROR, C_ERROR_AT, C_TYPED, C_RAW, C_LONG) = (
    range(11)
)


class Replies(Target):
    """Replies that a client gets."""

    name = "replies"
    modules = ("pynbdkit.protocol.replies",)
    share = 4.0

    def one(self, data: bytes) -> None:
        """Answer some requests as the script says."""
        head, script = (data + bytes(3))[:3], data[3:]
        form = head[0] % 3
        asked = [ASKED[(head[1] + i * (head[1] >> 4 | 1)) % len(ASKED)] for i in range(6)]
        stream = b"".join([self._frame(form, asked, kind, body) for kind, body in items(script)])
        seen = self._run(form, asked, [stream[at : at + 1] for at in range(len(stream))])
        other = self._run(form, asked, pieces(stream, head[2]))
        # What comes together with a breach is lost: it is to be trusted no more than the breach.
        check(other[0] == seen[0][: len(other[0])], "another split, other replies")
        check(other[1] == seen[1] and (seen[1] or len(other[0]) == len(seen[0])), "another end")

    @staticmethod
    def _frame(form: int, asked: list[tuple[int, int, int]], kind: int, body: bytes) -> bytes:
        which, kind, done = kind >> 5 & 7, kind & 15, not kind & 16
        cookie = which + 1
        _, offset, _ = asked[which % len(asked)]
        if kind == C_RAW:
            return body
        if kind <= S_ERROR:
            error = (5 if kind else 0).to_bytes(4, "big")
            return b"\x67\x44\x66\x98" + error + cookie.to_bytes(8, "big") + body
        number = 0x8001
        if kind == C_NONE:
            number = 0
        elif kind == C_DATA:
            number, at = 1, (offset + (body[0] if body else 0)) % (1 << 64)
            body = at.to_bytes(8, "big") + body[1:]
        elif kind == C_HOLE:
            number, at = 2, (offset + (body[0] if body else 0)) % (1 << 64)
            body = at.to_bytes(8, "big") + body[1:5].rjust(4, b"\0")
        elif kind == C_STATUS:
            number, size = (6, 16) if form == 2 else (5, 8)
            count = len(body) // size
            body = b"\0\0\0\1" + (count.to_bytes(4, "big") if form == 2 else b"") + body
        elif kind == C_ERROR:
            body = b"\0\0\0\5" + len(body).to_bytes(2, "big") + body
        elif kind == C_ERROR_AT:
            number, text = 0x8002, body[1:]
            at = (offset + (body[0] if body else 0)) % (1 << 64)
            body = b"\0\0\0\5" + len(text).to_bytes(2, "big") + text + at.to_bytes(8, "big")
        elif kind == C_TYPED:
            number, body = int.from_bytes(body[:2], "big"), body[2:]
        length = len(body)
        if kind == C_LONG:
            length = int.from_bytes(body[:4], "big")
        if form == 2:
            return LONG_CHUNK.pack(0x6E8A278C, done, number, cookie, offset, length) + body
        return CHUNK.pack(0x668E33EF, done, number, cookie, length) + body

    @staticmethod
    def _run(
        form: int, asked: list[tuple[int, int, int]], data: list[bytes]
    ) -> tuple[list[Reply], str]:
        parser = ReplyParser(form > 0, form == 2)
        for cookie, (kind, offset, count) in enumerate(asked, 1):
            parser.expect(cookie, kind, offset, count)
        left = dict(enumerate(asked, 1))
        seen: list[Reply] = []
        for piece in data:
            try:
                replies = parser.receive(piece)
            except ProtocolError as error:
                return seen, str(error)
            for reply in replies:
                check(reply.cookie in left, f"a reply to {reply.cookie}, which has had its last")
                Replies._check(reply, form, *left[reply.cookie])
                if reply.done:
                    del left[reply.cookie]
            seen += replies
            check(parser.waiting == len(left), "how many are waited for")
            check(len(parser._buffer) <= MAX_CHUNK + 32, "too much is stored")
        return seen, ""

    @staticmethod
    def _check(reply: Reply, form: int, kind: int, offset: int, count: int) -> None:
        if reply.kind is None:
            check(form < 2, "a simple reply, headers are extended")
            check(reply.done, "a simple reply is the last")
            wanted = count if kind == READ and not reply.error else 0
            check(len(reply.data) == wanted, "data of another length")
            check(not form or kind != READ, "a simple reply to a read")
            return
        check(form, "a chunk, but there are no structured replies")
        size = len(reply.data) + reply.length
        if size:
            inside = offset <= reply.offset and reply.offset + size <= offset + count
            check(kind == READ and inside, f"data outside of the read: {reply}")
        if reply.extents:
            check(kind == STATUS and all(length for length, _ in reply.extents), f"{reply}")
        if reply.kind & 0x8000:
            check(reply.error, "an error without a number")
        else:
            check(not reply.error and not reply.message, f"{reply}")
        if reply.kind == 0 and not reply.done:
            raise Finding("a chunk that says nothing, and is not the last")

    def mutate(self, data: bytes, random: Random) -> bytes:
        """Another script, now and then for other requests."""
        data += bytes(max(3 - len(data), 0))
        head, script = data[:3], data[3:]
        if not random.randrange(4):
            head = (havoc(head, random) + bytes(3))[:3]

        def make() -> bytes:
            kind = random.randrange(11) | random.choice((0, 16)) | random.randrange(6) << 5
            body = random.randbytes(random.choice((0, 0, 1, 2, 5, 8, 16, 17, 32)))
            if kind & 15 in (C_DATA, C_HOLE, C_ERROR_AT) and random.randrange(2):
                body = b"\0" + body[1:]
            return bytes((kind, len(body))) + body

        return head + reframe(split_items(script), random, make, lambda item: havoc(item, random))
