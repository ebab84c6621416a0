"""Fuzzing of the server's handshake: bytes before and after STARTTLS, under every switch.

The input: a byte of switches, one for how the bytes come, two that say how many of the last bytes
are sent over TLS (which is made believe here); the rest is what the client sends. The oracle reads
the specification once more, slowly:

- the bytes sent are replies, each to an option in its turn; each option that is complete has got
  exactly one final reply, of a kind that fits, with the error that it deserves;
- under ``require`` and without TLS there is TLS_REQD and nothing else, and no export is touched;
  what came behind STARTTLS without TLS has no effect;
- flags, contexts and what was negotiated are what was asked for, in the right order;
- any split of the bytes gives the same; what is stored is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

from fuzz_base import INTERESTING, Finding, Target, check, havoc, pieces, reframe

from pynbdkit.protocol.errors import HandshakeError
from pynbdkit.protocol.handshake_server import (
    CLOSED,
    MAX_OPTION_DATA,
    MAX_REPLY_BATCH,
    OPTIONS,
    STARTTLS,
    TRANSMISSION,
    ExportInfo,
    ExportSource,
    Negotiated,
    ServerHandshake,
)
from pynbdkit.protocol.options import BlockSize

EXPORT_NAME, ABORT, LIST, _PEEK, START, INFO, GO, STRUCTURED, LIST_MC, SET_MC, EXTENDED = range(
    1, 12
)
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
ERR = 1 << 31
UNSUP, POLICY, INVALID = ERR + 1, ERR + 2, ERR + 3
TLS_REQD, UNKNOWN, SHUTDOWN, TOO_BIG, EXT_REQD = ERR + 5, ERR + 6, ERR + 7, ERR + 9, ERR + 10
MOST = 64 << 20
"""Bytes of the longest option that is read."""
HEAD = Struct(">QII")
REPLY = Struct(">QIII")
IHAVEOPT = 0x49484156454F5054
DF, FILTER, HAS_FLAGS = 1 << 7, 1 << 12, 1
CONTEXTS = ("base:allocation", "test:page", "test:wide")
OVER_TLS = "secret"


class Terms(NamedTuple):
    """What both sides have agreed on, as this module reads the bytes; `at`: where they end."""

    name: str
    structured: bool
    extended: bool
    contexts: tuple[str, ...]
    no_zeroes: bool
    at: int
    sent: int


class Switches(NamedTuple):
    """How the server is set up."""

    tls: str = "off"
    structured: bool = True
    meta: bool = True
    extended: bool = True
    fixed: bool = True
    no_zeroes: bool = True
    stopping: bool = False

    @classmethod
    def of(cls, byte: int) -> Switches:
        """Those that a byte of the input stands for; zero bits are the usual setting."""
        tls = ("off", "on", "require", "require")[byte & 3]
        bits = [not byte >> bit & 1 for bit in range(2, 8)]
        fixed = bits[3] or tls != "off"
        return cls(tls, bits[0], bits[1], bits[2], fixed, bits[4], not bits[5])

    def machine(self, exports: ExportSource) -> ServerHandshake:
        """A server's handshake with them."""
        machine = ServerHandshake(
            exports,
            structured_replies=self.structured,
            meta_contexts=self.meta,
            extended_headers=self.extended,
            fixed=self.fixed,
            no_zeroes=self.no_zeroes,
            tls=self.tls,
        )
        if self.stopping:
            machine.begin_shutdown()
        return machine


EXPORTS = {
    "": ExportInfo("default", 1 << 20, 0x1F, "the first"),
    "a": ExportInfo("a", 0, HAS_FLAGS | DF | FILTER, "", BlockSize(1, 4096, 1 << 25)),
    "odd": ExportInfo("no\0name", (1 << 63) - 1, 0, "x" * 5000, BlockSize(512, 512, 0xFFFFFFFF)),
}
LISTED = [("", "the first"), ("a", "b\0c"), ("no\0name", ""), ("\udcff", ""), ("y" * 4097, "")]


class Exports(ExportSource):
    """Exports that watch who asks. `secure` is set when TLS has begun."""

    def __init__(self, tls: str) -> None:
        self._tls = tls
        self.secure = False
        self.opened: list[str] = []

    def _touched(self, name: str = "") -> None:
        check(self._tls != "require" or self.secure, "an export is touched before TLS")
        data = name.encode()
        check(len(data) <= 4096 and 0 not in data, "a name that no client may send")

    def list_exports(self) -> Sequence[tuple[str, str]]:
        """As the server's."""
        self._touched()
        return LISTED

    def open(self, name: str) -> ExportInfo:
        """As the server's. `OVER_TLS` is served over TLS alone."""
        self._touched(name)
        self.opened.append(name)
        if name == OVER_TLS:
            if not self.secure:
                raise HandshakeError(TLS_REQD, "over TLS alone")
            return EXPORTS[""]._replace(name=OVER_TLS)
        if name not in EXPORTS:
            raise HandshakeError(UNKNOWN, "there is none")
        return EXPORTS[name]

    def contexts(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        """As the server's."""
        self._touched(name)
        for query in queries:
            check(":" in query[1:], f"a query without a namespace: {query!r}")
        if name not in EXPORTS and name != OVER_TLS:
            raise HandshakeError(UNKNOWN, "there is none")
        return CONTEXTS

    def forget(self) -> None:
        """As the server's."""
        check(not self.secure, "forgotten twice")
        self.opened.clear()


class Bad(Exception):
    """A payload that is not well formed; the errors that fit."""


def _string(data: bytes) -> str:
    if len(data) > 4096 or 0 in data:
        raise Bad
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Bad from None


def _counted(data: bytes, at: int) -> tuple[str, int]:
    end = at + 4 + Struct(">I").unpack_from(data, at)[0]
    if end > len(data):
        raise Bad
    return _string(data[at + 4 : end]), end


def read_query(data: bytes) -> tuple[str, list[int]]:
    """The payload of INFO and GO: name, infos. Raises Bad."""
    try:
        name, at = _counted(data, 0)
        (count,) = Struct(">H").unpack_from(data, at)
    except StructError:
        raise Bad from None
    infos = data[at + 2 :]
    if len(infos) != 2 * count:
        raise Bad
    return name, [int.from_bytes(infos[i : i + 2], "big") for i in range(0, len(infos), 2)]


def read_contexts(data: bytes) -> tuple[str, list[str]]:
    """The payload of LIST_ and SET_META_CONTEXT: name, queries. Raises Bad."""
    try:
        name, at = _counted(data, 0)
        (count,) = Struct(">I").unpack_from(data, at)
        at += 4
        queries = []
        for _ in range(count):
            query, at = _counted(data, at)
            if query.find(":") < 1:
                raise Bad
            queries.append(query)
    except StructError:
        raise Bad from None
    if at != len(data):
        raise Bad
    return name, queries


class Oracle:
    """What the server may answer; one reading of both directions of a connection."""

    exports = EXPORTS
    secret: str | None = OVER_TLS
    """The export that is served over TLS alone."""

    def available(self, name: str, queries: Sequence[str]) -> tuple[str, ...]:
        """The contexts that an export has."""
        return CONTEXTS

    def _has(self, name: str) -> bool:
        return name in self.exports or name == self.secret

    def __init__(self, switches: Switches, plain: bytes, secure: bytes, sent: bytes) -> None:
        self.switches = switches
        self.inputs = [plain, secure]
        self.sent = sent
        self.at = 0  # of what was received, in the present input
        self.out = 0  # of what was sent
        self.secure = False
        self.flags = 0
        self.seen = 0
        self.closed = False
        self.starttls = False
        self._begin()

    def _begin(self) -> None:
        self.structured = self.extended = False
        self.contexts_for = ""
        self.contexts: tuple[str, ...] = ()
        self.seen = 0

    def run(self) -> Terms | None:
        """Read it all. Returns what was agreed on; None where no export was entered."""
        data = self.inputs[0]
        if len(data) < 4:
            return None
        self.flags = int.from_bytes(data[:4], "big")
        offered = self.switches.fixed | self.switches.no_zeroes << 1
        self.at = 4
        self.closed = bool(self.flags & ~offered)
        while not self.closed:
            data = self.inputs[self.secure]
            if len(data) - self.at < HEAD.size:
                return None
            magic, option, length = HEAD.unpack_from(data, self.at)
            self.at += HEAD.size
            self.seen += 1
            if magic != IHAVEOPT or self.seen > 256 or length > MOST or self._hopeless(option):
                break
            if option == EXPORT_NAME and length > 4096:
                break
            if option == SET_MC:
                self.contexts = ()
            if len(data) - self.at < length:
                return None
            payload = data[self.at : self.at + length]
            self.at += length
            try:
                terms = self._option(option, payload)
            except Finding as finding:
                raise Finding(f"{finding}\n  option {option}, {payload!r}") from None
            if terms is not None:
                return terms
            if self.starttls:
                self.starttls, self.secure, self.at = False, True, 0
                self._begin()
        self.closed = True
        return None

    def _hopeless(self, option: int) -> bool:
        """Whether the option's header is enough to end the connection."""
        switches = self.switches
        if option == EXPORT_NAME:
            needs_tls = switches.tls == "require" and not self.secure
            return switches.stopping or needs_tls or self.extended
        return not switches.fixed

    def reply(self, option: int) -> tuple[int, bytes]:
        """The next reply: its type and data."""
        check(len(self.sent) - self.out >= REPLY.size, f"option {option} is not answered")
        magic, to, kind, length = REPLY.unpack_from(self.sent, self.out)
        check(magic == 0x3E889045565A9, f"a reply with magic number {magic:#x}")
        check(to == option, f"a reply to option {to} where one to {option} was due")
        self.out += REPLY.size
        data = self.sent[self.out : self.out + length]
        check(len(data) == length, "a reply that is cut short")
        self.out += length
        if kind & ERR:
            check(len(data) <= 4096, "a message that is too long")
            data.decode()
        return kind, data

    def _refused(self, option: int, *codes: int) -> None:
        kind, _ = self.reply(option)
        check(kind in codes, f"reply {kind:#x}, expected {[hex(code) for code in codes]}")

    def _acknowledged(self, option: int) -> None:
        kind, data = self.reply(option)
        check(kind == ACK and not data, f"reply {kind:#x} instead of an ACK")

    def _option(self, option: int, payload: bytes) -> Terms | None:
        """Check the answer to an option that is complete."""
        switches = self.switches
        if option == EXPORT_NAME:
            return self._export_name(payload)
        if option == ABORT:
            self._acknowledged(option)
            self.closed = True
            return None
        errors = self._refusals(option, len(payload))
        if errors:
            self._refused(option, *errors)
        elif option == LIST:
            while (found := self.reply(option))[0] == SERVER:
                _counted(found[1], 0)
            check(found == (ACK, b""), "a list that does not end with an ACK")
        elif option == START:
            self._acknowledged(option)
            self.starttls = True
        elif option in (STRUCTURED, EXTENDED):
            self._acknowledged(option)
            self.structured = True
            self.extended = self.extended or option == EXTENDED
        elif option in (INFO, GO):
            try:
                name, infos = read_query(payload)
            except Bad:
                self._refused(option, INVALID, TOO_BIG)
                return None
            if name == self.secret and not self.secure:
                self._refused(option, TLS_REQD if switches.tls == "on" else POLICY)
            elif not self._has(name):
                self._refused(option, UNKNOWN)
            else:
                self._infos(option, name, infos)
                if option == GO:
                    return self._terms(name)
        else:
            self._meta_context(option, payload)
        return None

    def _refusals(self, option: int, length: int) -> tuple[int, ...]:
        """The errors that an option deserves whatever its payload says."""
        switches = self.switches
        if switches.stopping:
            return (SHUTDOWN,)
        if not self.flags & 1:
            return (INVALID,)
        if switches.tls == "require" and not self.secure and option != START:
            return (TLS_REQD,)
        known = {LIST: True, START: switches.tls != "off", INFO: True, GO: True}
        known[STRUCTURED] = switches.structured
        known[EXTENDED] = switches.structured and switches.extended
        known[LIST_MC] = known[SET_MC] = switches.structured and switches.meta
        if not known.get(option):
            return (UNSUP,)
        if length and option in (LIST, START, STRUCTURED, EXTENDED):
            return (INVALID,)
        if option == START and self.secure:
            return (INVALID,)
        if option == STRUCTURED and self.extended:
            return (EXT_REQD,)
        if option == SET_MC and not self.structured:
            return (INVALID, TOO_BIG)
        return (TOO_BIG,) if length > MAX_OPTION_DATA else ()

    def _export_name(self, payload: bytes) -> Terms | None:
        try:
            name = _string(payload)
        except Bad:
            self.closed = True
            return None
        if not self._has(name) or (name == self.secret and not self.secure):
            self.closed = True
            return None
        length = 10 if self.flags & 2 else 134
        answer = self.sent[self.out : self.out + length]
        check(len(answer) == length, "EXPORT_NAME is not answered")
        check(not any(answer[10:]), "the reserved zeroes are not zero")
        self._export(name, answer[:10])
        self.out += length
        return self._terms(name)

    def _export(self, name: str, data: bytes) -> None:
        """Check size and flags of an export."""
        export = self.exports[name if name != self.secret else ""]
        selected = self.extended and self.contexts and self.contexts_for == name
        flags = export.flags & ~(DF | FILTER) | HAS_FLAGS
        flags |= (DF if self.structured else 0) | (FILTER if selected else 0)
        wanted = export.size.to_bytes(8, "big") + flags.to_bytes(2, "big")
        check(data == wanted, f"size and flags {data.hex()}, expected {wanted.hex()}")

    def _infos(self, option: int, name: str, infos: list[int]) -> None:
        found = {}
        while (reply := self.reply(option))[0] == REP_INFO:
            number = int.from_bytes(reply[1][:2], "big")
            check(number not in found, f"info {number} twice")
            check(number == 0 or number in infos, f"info {number} was not asked for")
            found[number] = reply[1][2:]
        check(reply == (ACK, b""), "infos that do not end with an ACK")
        check(0 in found, "no export info")
        self._export(name, found[0])
        if 3 in found:
            check(len(found[3]) == 12, "a block size info of another length")
        for number in (1, 2):
            check(len(found.get(number, b"")) <= 4096, "a string that is too long")
            found.get(number, b"").decode()

    def _meta_context(self, option: int, payload: bytes) -> None:
        try:
            name, queries = read_contexts(payload)
        except Bad:
            self._refused(option, INVALID, TOO_BIG)
            return
        if not self._has(name):
            if self._knows_without_export(queries):
                self._take_contexts(option, name, queries)
            else:
                self._refused(option, UNKNOWN)
            return
        self._take_contexts(option, name, queries)

    def _knows_without_export(self, queries: list[str]) -> bool:
        """Whether the server need not open an export to answer."""
        return False

    def _take_contexts(self, option: int, name: str, queries: list[str]) -> None:
        contexts = []
        while (reply := self.reply(option))[0] == META:
            contexts.append((int.from_bytes(reply[1][:4], "big"), reply[1][4:].decode()))
        check(reply == (ACK, b""), "contexts that do not end with an ACK")
        names = tuple(context for _, context in contexts)
        wildcards = {query.partition(":")[0] + ":" for query in queries if query.endswith(":")}
        wanted = tuple(
            context
            for context in self.available(name, queries)
            if context in queries
            or (
                option == LIST_MC
                and (not queries or context.partition(":")[0] + ":" in wildcards & {*queries})
            )
        )
        check(names == wanted, f"contexts {names}, expected {wanted}")
        if option == SET_MC:
            check(len(dict(contexts)) == len(contexts), "an ID twice")
            self.contexts_for, self.contexts = name, names

    def _terms(self, name: str) -> Terms:
        contexts = self.contexts if name == self.contexts_for else ()
        zeroes = bool(self.flags & 2)
        return Terms(name, self.structured, self.extended, contexts, zeroes, self.at, self.out)


def converse(machine: ServerHandshake, exports: Exports, data: list[bytes], over: bool) -> bytes:
    """Feed pieces until the machine wants no more, as the server does; returns what it says."""
    sent = bytearray()
    for piece in data:
        if machine.state in (CLOSED, TRANSMISSION) or (machine.state == STARTTLS and not over):
            if machine.state == TRANSMISSION:
                sent += machine.receive(piece)
            continue
        reply = machine.receive(piece)
        while reply:
            check(len(reply) <= 2 * MAX_REPLY_BATCH, f"{len(reply)} bytes in one go")
            sent += reply
            reply = machine.receive(b"")
        stored = len(machine._input)
        check(machine.state != OPTIONS or stored <= MAX_OPTION_DATA, f"{stored} bytes are stored")
    return bytes(sent)


def make_option(random: Random) -> bytes:
    """An option that is likely to be good."""
    option = random.choice((*range(1, 12), INFO, GO, GO, SET_MC, SET_MC, STRUCTURED, EXTENDED))
    if option in (EXPORT_NAME, ABORT, GO) and random.randrange(4):
        option = INFO  # those end everything
    if random.randrange(24) == 0:
        option = random.choice((0, 12, 99, ERR, 0xFFFFFFFF))
    name = random.choice(
        (b"", b"", b"", b"a", b"odd", b"secret", b"none", b"\xff", b"n\0", b"\xc3")
    )
    if random.randrange(64) == 0:
        name = b"z" * random.choice((4095, 4096, 4097))
    counted = len(name).to_bytes(4, "big") + name
    payload = b""
    if option == EXPORT_NAME:
        payload = name
    elif option in (INFO, GO):
        infos = [random.choice((0, 1, 2, 3, 3, 4, 77)) for _ in range(random.randrange(4))]
        payload = counted + len(infos).to_bytes(2, "big")
        payload += b"".join([info.to_bytes(2, "big") for info in infos])
    elif option in (LIST_MC, SET_MC):
        known = (
            b"base:allocation",
            b"base:",
            b"test:page",
            b"test:wide",
            b"test:",
            b"x:y",
            b"b",
            b":",
        )
        queries = [random.choice(known) for _ in range(random.randrange(4))]
        if random.randrange(4):
            queries = [query for query in queries if len(query) > 1]
        payload = counted + len(queries).to_bytes(4, "big")
        payload += b"".join([len(query).to_bytes(4, "big") + query for query in queries])
    if random.randrange(16) == 0:
        payload = havoc(payload, random)
    length = len(payload)
    if random.randrange(32) == 0:
        length = random.choice(INTERESTING) & 0xFFFFFFFF
    return HEAD.pack(IHAVEOPT, option, length) + payload


def split_options(data: bytes) -> list[bytes]:
    """Cut a stream into options, as far as it consists of such; the rest is one piece."""
    frames = []
    at = 0
    while len(data) - at >= HEAD.size:
        length = HEAD.size + int.from_bytes(data[at + 12 : at + 16], "big")
        frames.append(data[at : at + length])
        at += length
    if at < len(data):
        frames.append(data[at:])
    return frames


def change_option(frame: bytes, random: Random) -> bytes:
    """Set a number in an option to something else."""
    start = random.choice((8, 12, 16, max(len(frame) - 4, 0)))
    number = random.choice(INTERESTING) & 0xFFFFFFFF
    return frame[:start] + number.to_bytes(4, "big") + frame[start + 4 :]


def mutate_options(data: bytes, random: Random) -> bytes:
    """Change a stream of options."""
    return reframe(
        split_options(data),
        random,
        lambda: make_option(random),
        lambda frame: change_option(frame, random),
    )


class Handshake(Target):
    """The options that a client sends to a server."""

    name = "handshake"
    modules = ("pynbdkit.protocol.handshake_server", "pynbdkit.protocol.options")
    share = 5.0
    longest = 8192

    def one(self, data: bytes) -> None:
        """Negotiate, and look at what the server has said."""
        head, stream = (data + bytes(4))[:4], data[4:]
        switches = Switches.of(head[0])
        over = min(int.from_bytes(head[2:4], "big"), len(stream))
        plain, secure = stream[: len(stream) - over], stream[len(stream) - over :]
        seen = [self._run(switches, plain, secure, 0)]
        if head[1]:
            seen.append(self._run(switches, plain, secure, head[1]))
            check(seen[0] == seen[1], f"another split, another answer: {seen}")

    @staticmethod
    def _run(
        switches: Switches, plain: bytes, secure: bytes, split: int
    ) -> tuple[bytes, str, str | None, Negotiated | None]:
        exports = Exports(switches.tls)
        machine = switches.machine(exports)
        flags = machine.greeting()[16:]
        check(flags == bytes((0, switches.fixed | switches.no_zeroes << 1)), "the greeting's flags")
        sent = converse(machine, exports, pieces(plain, split), False)
        started = machine.state == STARTTLS
        if started:
            check(machine.leftover in plain, "what TLS is given")
            exports.secure = True
            machine.tls_started()
            check(machine.leftover == b"", "what came in the clear is still there after TLS began")
            sent += converse(machine, exports, pieces(secure, split), True)
        oracle = Oracle(switches, plain, secure if started else b"", sent)
        terms = oracle.run()
        check(oracle.out == len(sent), f"{len(sent) - oracle.out} bytes that answer no option")
        check(oracle.secure == machine.secure == started, "whether TLS was begun")
        check((machine.state == CLOSED) == oracle.closed, f"the state is {machine.state}")
        check((machine.state == TRANSMISSION) == (terms is not None), f"state {machine.state}")
        if terms is None:
            return sent, machine.state, machine.error, None
        negotiated = machine.negotiated
        check(exports.opened[-1] == terms.name, "another export was opened last")
        found = (negotiated.structured_replies, negotiated.extended_headers, negotiated.no_zeroes)
        check(found == (terms.structured, terms.extended, terms.no_zeroes), f"agreed: {found}")
        names = tuple(name for _, name in negotiated.contexts)
        check(names == terms.contexts, f"contexts {names}, expected {terms.contexts}")
        rest = (secure if started else plain)[terms.at :]
        check(machine.leftover == rest, "what came behind the handshake is not what is left over")
        return sent, machine.state, machine.error, negotiated

    def mutate(self, data: bytes, random: Random) -> bytes:
        """Another sequence of options, some of them over TLS, now and then to another server."""
        data += bytes(max(8 - len(data), 0))
        head = data[:4]
        over = min(int.from_bytes(head[2:4], "big"), len(data) - 8)
        flags, plain, secure = data[4:8], data[8 : len(data) - over], data[len(data) - over :]
        what = random.randrange(8)
        if what == 0:
            head = (havoc(head[:2], random) + bytes(2))[:2]
        elif what == 1:
            flags = random.choice((b"\0\0\0\3", b"\0\0\0\1", b"\0\0\0\2", bytes(4), b"\0\0\0\7"))
        elif what <= 5 or not head[0] & 3:
            plain = mutate_options(plain, random)
        else:
            secure = mutate_options(secure, random)
            if random.randrange(2):
                plain = HEAD.pack(IHAVEOPT, START, 0)
        secure = secure[:2000]
        return head[:2] + len(secure).to_bytes(2, "big") + flags + plain[:8000] + secure
