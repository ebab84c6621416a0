"""Fuzzing of the server's transmission phase: requests to replies, on disks that watch.

The input: a byte for the disk, one for what was negotiated, one for how the bytes come and go; the
rest is what the client sends. It goes through the real Transmission, with a socket that makes no
system calls. The oracle is a second, slow and simple reading of the specification:

- each request that is complete gets exactly one reply (of one or more chunks), in order, with its
  cookie, and of the form that was negotiated; what is not complete, and what stands behind a wrong
  magic number or a DISC, gets none;
- a request that must be refused is, with an error that fits; every other one does what it should:
  what is read is what was written, whatever stands between;
- the disk sees only what is valid (fuzz_disks.py);
- our own client understands every reply.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from random import Random
from struct import Struct
from typing import Any, NamedTuple

import fuzz_disks
from fuzz_base import INTERESTING, FakeSocket, Finding, Target, check, havoc, read_seeds, reframe
from fuzz_disks import PAGE

from pynbdkit.complete import Layer
from pynbdkit.flags import ThreadModel
from pynbdkit.protocol.negotiated import ExportInfo, Negotiated
from pynbdkit.protocol.replies import ReplyParser
from pynbdkit.server.carousel import Carousel
from pynbdkit.server.transmission import Transmission
from pynbdkit.server.watch import Watch
from pynbdkit.session import Session

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 108
MOST = 64 << 20
"""Bytes of the largest read or write."""
SIMPLE_HEAD = Struct(">IIQ")
CHUNK_HEAD = Struct(">IHHQI")
LONG_CHUNK_HEAD = Struct(">IHHQQQ")
HEAD = Struct(">IHHQQI")
LONG_HEAD = Struct(">IHHQQQ")
SLOW = 77
"""Inputs with this third byte may make the server take a buffer of many MiB, which takes long."""
CONTEXTS = ("base:allocation", "test:page", "test:wide")


class Terms(NamedTuple):
    """What was negotiated; `contexts` by ID."""

    structured: bool
    extended: bool
    contexts: dict[int, str]

    @classmethod
    def of(cls, byte: int) -> Terms:
        """Those that a byte of the input stands for."""
        form = byte % 3
        names = [name for bit, name in enumerate(CONTEXTS) if byte >> (2 + bit) & 1 and form]
        return cls(form > 0, form == 2, dict(enumerate(names, 1)))


class Asked(NamedTuple):
    """A request, as this module reads it; `payload` None where none came, or too much."""

    flags: int
    kind: int
    cookie: int
    offset: int
    length: int
    payload: bytes | None


def read_requests(data: bytes, extended: bool) -> Iterator[Asked]:
    """Every request that has to be answered (DISC among them, and nothing behind it)."""
    head, magic = (LONG_HEAD, 0x21E41C71) if extended else (HEAD, 0x25609513)
    at = 0
    while at + head.size <= len(data):
        found, flags, kind, cookie, offset, count = head.unpack_from(data, at)
        if found != magic:
            return
        at += head.size
        payload = None
        if count and (kind == WRITE or (extended and flags & PAYLOAD_LEN)):
            if count > MOST:  # no input is so long: nothing can come behind it
                yield Asked(flags, kind, cookie, offset, count, None)
                return
            if at + count > len(data):
                return
            payload = data[at : at + count]
            at += count
        yield Asked(flags, kind, cookie, offset, count, payload)
        if kind == DISC:
            return


def announces_much(data: bytes, extended: bool) -> bool:
    """Whether a request has a large payload, which does not come."""
    for frame in split_requests(data, extended):
        if len(frame) >= 32:
            count = int.from_bytes(frame[24 : 32 if extended else 28], "big")
            if 1 << 20 < count <= MOST:
                return True
    return False


class Model:
    """What a disk holds, and what a server has to say."""

    def __init__(self, disk: Any, layer: Layer, terms: Terms) -> None:
        self.disk = disk
        self.layer = layer
        self.terms = terms
        self.content = bytearray(disk.content)

    def check_replies(self, stream: bytes, sent: bytes) -> int:
        """Check all that was sent; returns the number of requests."""
        at = 0
        asked = 0
        for request in read_requests(stream, self.terms.extended):
            if request.kind == DISC:
                break
            asked += 1
            try:
                at = self.check_reply(request, sent, at)
            except Finding as finding:
                raise Finding(f"{finding}\n  request {asked}: {request}") from None
        check(at == len(sent), f"{len(sent) - at} bytes that answer no request")
        return asked

    # -- what must be ----------------------------------------------------------------------------

    def refusals(self, asked: Asked) -> set[int]:
        """Every error that fits; none: it must not be refused."""
        layer, kind, count, flags = self.layer, asked.kind, asked.length, asked.flags
        offset = asked.offset
        errors: set[int] = set()
        if kind > STATUS or kind == DISC:
            return {EINVAL}
        if self.terms.extended and kind == WRITE:
            flags &= ~PAYLOAD_LEN
        if self.terms.extended and kind == STATUS and flags & PAYLOAD_LEN:
            payload = asked.payload or b""
            ids = self.ids(payload)
            if len(payload) < 12 or len(payload) % 4 or len({*ids}) < len(ids):
                return {EINVAL}
            if not {*ids} <= {*self.terms.contexts}:
                return {EINVAL}
            flags &= ~PAYLOAD_LEN
            count = int.from_bytes(payload[:8], "big")
        if kind in (WRITE, TRIM, ZEROES) and not layer.can_write():
            errors.add(EPERM)
        may = {
            READ: (True, DF if self.terms.structured else 0),
            WRITE: (True, 0),
            FLUSH: (layer.can_flush(), 0),
            TRIM: (layer.can_trim() or not layer.can_write(), 0),
            CACHE: (layer.can_cache(), 0),
            ZEROES: (
                layer.can_zero() or not layer.can_write(),
                NO_HOLE | (FAST_ZERO if layer.can_fast_zero() else 0),
            ),
            STATUS: (self.terms.contexts, REQ_ONE),
        }
        possible, allowed = may[kind]
        if not possible or flags & ~(allowed | (FUA if layer.can_fua() else 0)):
            errors.add(EINVAL)
        if kind == FLUSH:
            return errors | ({EINVAL} if offset or count else set())
        minimum, _, maximum = self.disk.block_size() if hasattr(self.disk, "block") else (0, 0, 0)
        if not count or (kind in (READ, WRITE) and count > min(maximum or MOST, MOST)):
            errors.add(EINVAL)
        end = offset + count
        if end > self.disk.get_size():
            errors.add(ENOSPC if kind in (WRITE, ZEROES) else EINVAL)
        if minimum > 1 and (offset % minimum or (end % minimum and end != self.disk.get_size())):
            errors.add(EINVAL)
        return errors

    def failures(self, asked: Asked) -> tuple[set[int], bool]:
        """The errors that a valid request may come to, and whether it may also succeed."""
        disk, offset, kind = self.disk, asked.offset, asked.kind
        count = asked.length
        wide: set[int] = set()
        if kind == STATUS:
            if asked.flags & PAYLOAD_LEN and asked.payload:
                count = int.from_bytes(asked.payload[:8], "big")
            if not self.terms.extended and "test:wide" in self.wanted(asked).values():
                wide = {EOVERFLOW, EIO}
        if isinstance(disk, fuzz_disks.Failing):
            number = disk.fails("flush" if kind == FLUSH else "", count, offset)
            if number:
                known = {errno.ENOSPC: ENOSPC, errno.EPERM: EPERM, errno.EFBIG: ENOSPC}
                known |= {errno.ENOMEM: ENOMEM, errno.ESHUTDOWN: ESHUTDOWN}
                return {known.get(number, EIO), *wide}, False
        if wide:
            return wide, False
        if isinstance(disk, fuzz_disks.Odd) and PAGE <= offset < 2 * PAGE:
            if kind == READ:
                good = offset % 6 in (1, 3, 4)  # too long is cut
                return (set(), True) if good else ({EIO}, False)
            if kind == STATUS and "base:allocation" in self.wanted(asked).values():
                return {EIO}, True
        return set(), True

    @staticmethod
    def ids(payload: bytes) -> tuple[int, ...]:
        """The contexts that a block status names."""
        return tuple(
            int.from_bytes(payload[at : at + 4], "big") for at in range(8, len(payload) - 3, 4)
        )

    def wanted(self, asked: Asked) -> dict[int, str]:
        """The contexts that a valid block status is about."""
        contexts = self.terms.contexts
        if self.terms.extended and asked.flags & PAYLOAD_LEN:
            return {number: contexts[number] for number in self.ids(asked.payload or b"")}
        return contexts

    # -- what is ---------------------------------------------------------------------------------

    def check_reply(self, asked: Asked, sent: bytes, at: int) -> int:
        """Check the reply to a request, which begins at `at`; returns where it ends."""
        errors = self.refusals(asked)
        good = not errors
        if good:
            errors, good = self.failures(asked)
        error, data, status, at = self.take(asked, sent, at)
        if error:
            check(error in errors, f"error {error}, expected one of {sorted(errors)} ({good})")
            return at
        check(good, f"success instead of one of the errors {sorted(errors)}")
        offset, count = asked.offset, asked.length
        end = min(offset + count, len(self.content))
        if asked.kind == READ:
            there = bytes(self.content[offset : max(end, offset)])
            check(data == there + bytes(count - len(there)), "what was read is not what is there")
        elif asked.kind == WRITE:
            assert asked.payload is not None
            if offset + count <= len(self.content):
                self.content[offset : offset + count] = asked.payload
        elif asked.kind in (TRIM, ZEROES):
            self.content[offset:end] = bytes(max(end - offset, 0))
        elif asked.kind == STATUS:
            self._check_status(asked, status)
        return at

    def take(
        self, asked: Asked, sent: bytes, at: int
    ) -> tuple[int, bytes, dict[int, list[tuple[int, int]]], int]:
        """Read one whole reply: error, data, extents by context, where it ends."""
        structured, extended, _ = self.terms
        magic = int.from_bytes(sent[at : at + 4], "big")
        check(len(sent) - at >= 16, "a request that is not answered")
        if magic == 0x67446698:
            _, error, cookie = SIMPLE_HEAD.unpack_from(sent, at)
            check(cookie == asked.cookie, f"a reply to {cookie:#x}")
            check(not extended, "a simple reply, headers are extended")
            if structured:
                check(asked.kind != READ, "a simple reply to a read")
                check(asked.kind != STATUS or error, "a simple reply to a block status")
            at += 16
            size = asked.length if asked.kind == READ and not error else 0
            check(len(sent) - at >= size, "a reply that is cut short")
            return error, sent[at : at + size], {}, at + size
        data = bytearray(asked.length if asked.kind == READ and asked.length <= MOST else 0)
        covered: list[tuple[int, int]] = []
        status: dict[int, list[tuple[int, int]]] = {}
        error = 0
        head = LONG_CHUNK_HEAD if extended else CHUNK_HEAD
        done = False
        while not done:
            check(len(sent) - at >= head.size, "a reply without its last chunk")
            magic, flags, kind, cookie, *rest = head.unpack_from(sent, at)
            check(structured, "a chunk, but structured replies were not negotiated")
            check(magic == (0x6E8A278C if extended else 0x668E33EF), f"magic number {magic:#x}")
            check(cookie == asked.cookie, f"a chunk for {cookie:#x}")
            check(flags in (0, 1), f"flags {flags:#x} of a chunk")
            if extended:
                check(rest[0] == asked.offset, "a chunk that tells another offset")
            at += head.size
            body = sent[at : at + rest[-1]]
            check(len(body) == rest[-1], "a chunk that is cut short")
            at += len(body)
            done = bool(flags)
            if kind == 0:
                check(done and not body, "a chunk NONE with data, or that is not the last")
            elif kind in (1, 2):
                check(asked.kind == READ, f"a chunk of type {kind}")
                start = int.from_bytes(body[:8], "big") - asked.offset
                check(kind == 1 or len(body) == 12, "a hole of another length")
                size = len(body) - 8 if kind == 1 else int.from_bytes(body[8:12], "big")
                check(size > 0 and 0 <= start <= len(data) - size, "a chunk outside of the read")
                covered.append((start, size))
                data[start : start + size] = body[8:] if kind == 1 else bytes(size)
            elif kind == (6 if extended else 5):
                check(asked.kind == STATUS, f"a chunk of type {kind}")
                number = int.from_bytes(body[:4], "big")
                check(number not in status, f"two chunks for context {number}")
                pair = Struct(">QQ" if extended else ">II")
                pairs = body[8:] if extended else body[4:]
                check(pairs and not len(pairs) % pair.size, "extents of an odd length")
                status[number] = [(first, second) for first, second in pair.iter_unpack(pairs)]
                if extended:
                    there = int.from_bytes(body[4:8], "big")
                    check(there == len(status[number]), "another number of extents")
            else:
                check(kind in (0x8001, 0x8002), f"a chunk of type {kind:#x}")
                error = int.from_bytes(body[:4], "big")
                length = int.from_bytes(body[4:6], "big")
                check(error, "an error chunk without an error")
                check(length <= 4096, "a message that is too long")
                body[6 : 6 + length].decode()
                check(len(body) == 6 + length + (8 if kind == 0x8002 else 0), "an odd error chunk")
        if error:
            return error, b"", {}, at
        if asked.kind == READ:
            whole = sum(size for _, size in covered) == len(data)
            check(whole and len(set(covered)) == len(covered), "not each byte exactly once")
        if asked.kind == STATUS:
            check(status.keys() == self.wanted(asked).keys(), "not each context exactly once")
        return 0, bytes(data), status, at

    def _check_status(self, asked: Asked, status: dict[int, list[tuple[int, int]]]) -> None:
        count = asked.length
        if self.terms.extended and asked.flags & PAYLOAD_LEN:
            count = int.from_bytes((asked.payload or b"")[:8], "big")
        for number, extents in status.items():
            name = self.terms.contexts[number]
            at, end = asked.offset, asked.offset + count
            check(len(extents) == 1 or not asked.flags & REQ_ONE, "more than one extent")
            for length, flags in extents:
                check(0 < length <= end - at, f"{name}: an extent of {length} bytes")
                if name != "base:allocation":
                    page = asked.offset // PAGE & 0xFFFF
                    check(flags == page | (1 << 40 if "wide" in name else 0), f"{name}: {flags:#x}")
                elif type(self.disk) is fuzz_disks.Strict:
                    for page in range(at // PAGE, (at + length - 1) // PAGE + 1):
                        check(flags == page % 2 * 3, f"status {flags} of page {page}")
                at += length


def make_request(random: Random, extended: bool) -> bytes:
    """A request that is likely to be good, and if not, then because of one thing."""
    kind = random.choice((READ, READ, WRITE, WRITE, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS))
    offset = random.choice((0, 0, 1, 512, PAGE, PAGE + 16 * random.randrange(8), 2 * PAGE))
    count = random.choice((1, 2, 16, 100, 512, PAGE, PAGE + 1, 9 * PAGE))
    flags = 0 if random.randrange(2) else FUA
    if kind in (READ, WRITE, CACHE) and random.randrange(2):
        flags = 0
    payload = b""
    if random.randrange(16) == 0:
        kind = random.choice((DISC, 8, 9, 0xFFFF, random.randrange(8)))
    if random.randrange(8) == 0:
        flags ^= 1 << random.choice((0, 1, 2, 3, 4, 5, 5, 15))
    if random.randrange(8) == 0:
        offset = random.choice((*INTERESTING, 1000, 999, 10 * PAGE, 10 * PAGE + 99, (1 << 63) - 2))
    if random.randrange(8) == 0:
        count = random.choice((*INTERESTING, 10 * PAGE + 100))
        if MOST >= count > 1 << 20:  # such a buffer takes its time
            count = random.choice((1 << 16, MOST + 1))
    if kind == FLUSH and random.randrange(8):
        offset = count = 0
    if kind == ZEROES:
        flags |= random.choice((0, 0, NO_HOLE, FAST_ZERO, NO_HOLE | FAST_ZERO))
    if kind == STATUS:
        flags |= random.choice((0, 0, REQ_ONE))
        if extended and random.randrange(2):
            flags |= PAYLOAD_LEN
            ids = random.choice(((1,), (1, 2), (2, 1), (1, 2, 3), (3,), (1, 1), (4,), ()))
            payload = count.to_bytes(8, "big")
            payload += b"".join([number.to_bytes(4, "big") for number in ids])
            count = len(payload)
    elif kind == WRITE:
        if extended:
            flags |= PAYLOAD_LEN
        if count <= PAGE + 1:
            count = min(count, 600)
            payload = random.randbytes(4) * (count // 4 + 1)
            payload = payload[:count]
    elif flags & PAYLOAD_LEN and count < 100:
        payload = bytes(count)
    cookie = random.getrandbits(random.choice((1, 8, 64)))
    if extended:
        return LONG_HEAD.pack(0x21E41C71, flags, kind, cookie, offset, count) + payload
    return HEAD.pack(0x25609513, flags, kind, cookie, offset, count & 0xFFFFFFFF) + payload


def split_requests(data: bytes, extended: bool) -> list[bytes]:
    """Cut a stream into requests, as far as it consists of such; the rest is one piece."""
    size = 32 if extended else 28
    frames = []
    at = 0
    while len(data) - at >= size:
        flags, kind = data[at + 5], int.from_bytes(data[at + 6 : at + 8], "big")
        count = int.from_bytes(data[at + 24 : at + size], "big")
        if not (kind == WRITE or (extended and flags & PAYLOAD_LEN)):
            count = 0
        frames.append(data[at : at + size + count])
        at += size + count
    if at < len(data):
        frames.append(data[at:])
    return frames


_FIELDS = ((4, 2), (6, 2), (8, 8), (16, 8), (24, 4))


def change_request(frame: bytes, random: Random, extended: bool) -> bytes:
    """Set one field of a request to something else."""
    start, size = random.choice(_FIELDS)
    if extended and start == 24:
        size = 8
    number = random.choice(INTERESTING) if random.randrange(2) else 1 << random.randrange(8 * size)
    number &= (1 << 8 * size) - 1
    return frame[:start] + number.to_bytes(size, "big") + frame[start + size :]


def mutate_requests(data: bytes, random: Random, extended: bool) -> bytes:
    """Change a stream of requests."""
    return reframe(
        split_requests(data, extended),
        random,
        lambda: make_request(random, extended),
        lambda frame: change_request(frame, random, extended),
    )


class Requests(Target):
    """Requests to a server."""

    thread_model = ThreadModel.SERIALIZE_REQUESTS
    name = "requests"
    modules: Sequence[str] = (
        *("pynbdkit.server.runner", "pynbdkit.server.rules", "pynbdkit.protocol.requests"),
        *("pynbdkit.protocol.replies", "pynbdkit.complete", "pynbdkit.extents"),
    )
    share = 6.0

    def __init__(self) -> None:
        self._session = Session()
        self._disks = [kind() for kind in fuzz_disks.KINDS]
        self._layers = [Layer(disk, self._session, "disk") for disk in self._disks]
        self._watch = Watch()
        self._carousel = Carousel()

    def one(self, data: bytes) -> None:
        """Send the requests, and look at the replies."""
        disk_byte, terms_byte, wire = (data + bytes(3))[:3]
        stream = data[3:]
        terms = Terms.of(terms_byte)
        if wire != SLOW and announces_much(stream, terms.extended):
            return
        disk = self._disks[disk_byte % len(self._disks)]
        layer = self._layers[disk_byte % len(self._disks)]
        if layer.device.__class__.__dict__.get("contexts") is None and not layer.contexts():
            names = [name for name in terms.contexts.values() if name == CONTEXTS[0]]
            terms = terms._replace(contexts=dict(enumerate(names, 1)))
        with fuzz_disks.no_surprises():
            model = Model(disk, layer, terms)
            disk.fresh()
            model.content[:] = disk.content
            first = len(stream) * (wire % 5) // 8  # what came with the end of the handshake
            sock = FakeSocket(stream[first:], wire)
            negotiated = Negotiated(
                ExportInfo("", disk.size, 1),
                terms.structured,
                True,
                tuple(terms.contexts.items()),
                terms.extended,
            )
            transmission = Transmission(
                sock,  # type: ignore[arg-type]
                layer,
                negotiated,
                stream[:first],
                self._session,
                name="disk",
                thread_model=self.thread_model,
                threads=3,
                lock=None,
                watch=self._watch,
                carousel=self._carousel,
            )
            transmission.run()
            fuzz_disks.nothing_wrong()
            sent = bytes(sock.sent)
            self.judge(model, stream, sent)
            check(
                transmission.goodbye
                == any(request.kind == DISC for request in read_requests(stream, terms.extended)),
                "whether the client has said goodbye",
            )
            check(sock.largest <= MOST + 32, f"a buffer of {sock.largest} bytes")

    def judge(self, model: Model, stream: bytes, sent: bytes) -> None:
        """Compare what was sent with what had to be."""
        model.check_replies(stream, sent)
        understand(stream, sent, model.terms)

    def mutate(self, data: bytes, random: Random) -> bytes:
        """Another sequence of requests, now and then for another disk or another agreement."""
        data += bytes(max(3 - len(data), 0))
        head = data[:3] if random.randrange(4) else havoc(data[:3], random)
        head = (head + bytes(3))[:3]
        return head + mutate_requests(data[3:], random, head[1] % 3 == 2)


class Workers(Requests):
    """Requests that run in a connection's threads: answered in any order, but each once."""

    name = "workers"
    modules = ("pynbdkit.server.transmission", "pynbdkit.server.crew")
    share = 0.3
    thread_model = ThreadModel.PARALLEL

    def __init__(self) -> None:
        super().__init__()
        for disk in self._disks:
            disk.blocking = True

    def seeds(self) -> dict[str, bytes]:
        """Those of the requests that are answered in order."""
        return read_seeds(Requests.name, False)

    def judge(self, model: Model, stream: bytes, sent: bytes) -> None:
        """Each request that is complete has got one reply that may be."""
        left: dict[int, list[Asked]] = {}
        for asked in read_requests(stream, model.terms.extended):
            if asked.kind != DISC:
                left.setdefault(asked.cookie, []).append(asked)
        at = 0
        while at < len(sent):
            cookie = int.from_bytes(sent[at + 8 : at + 16], "big")
            check(left.get(cookie), f"a reply to {cookie:#x}, which waits for none")
            if len(left[cookie]) > 1:
                return  # which of them is answered cannot be told
            (asked,) = left.pop(cookie)
            errors = model.refusals(asked)
            good = not errors
            if good:
                errors, good = model.failures(asked)
            error, _, _, at = model.take(asked, sent, at)
            check(error in errors if error else good, f"{asked}: {error}, not one of {errors}")
        check(not left, f"not answered: {left}")


def understand(stream: bytes, sent: bytes, terms: Terms) -> None:
    """Have our own client read the replies, where it could have sent these requests."""
    asked = list(read_requests(stream, terms.extended))
    if len({request.cookie for request in asked}) < len(asked):
        return
    parser = ReplyParser(terms.structured, terms.extended)
    for request in asked:
        if request.kind != DISC:
            count = request.length if request.kind != STATUS else 0
            parser.expect(request.cookie, request.kind, request.offset, count)
    done = sum(reply.done for reply in parser.receive(sent))
    check(parser.waiting == 0, f"our client has found {done} replies, and waits for more")
