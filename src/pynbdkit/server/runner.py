"""Runner: from one connection's requests to their replies.

It knows no sockets and no threads: requests go in, calls of the layer are made, replies gather in
`ready`, where whoever may send finds them. Every call's outcome, also an exception, becomes a
reply; only the client's goodbye (`Disconnect`) and bugs of ours come out as exceptions.

Writes with FUA that follow each other are held until something else comes, and made stable
together (`_run_held`).
"""

from __future__ import annotations

import errno
from time import perf_counter

from .. import log
from ..complete import exactly
from ..errors import errno_of, nbd_errno
from ..flags import Flag, Fua
from ..protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    CONTEXT_BASE_ALLOCATION,
    EXTENDED_REPLY_MAGIC,
    MAX_PAYLOAD,
    NBD_EINVAL,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from ..protocol.replies import (
    DATA,
    EXTENDED_CHUNK,
    EXTENDED_DATA,
    SIMPLE,
    encode_data,
    encode_error,
    encode_hole,
    encode_status,
)
from .receiver import Disconnect
from .rules import Rules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any, Final

    from ..complete import Layer
    from ..extents import Extent
    from ..protocol.negotiated import Negotiated
    from ..protocol.requests import Request
    from .crew import Crew

GATHER: Final = 1 << 20
"""Replies of a batch are sent when they have this many bytes."""
HOLE_PAYS: Final = 32 << 10
"""Reads of at least this many bytes are looked at for zeros, to be sent as a hole."""
_NAMES: Final = {
    CMD_READ: "pread",
    CMD_WRITE: "pwrite",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_CACHE: "cache",
    CMD_WRITE_ZEROES: "zero",
    CMD_BLOCK_STATUS: "extents",
}
ZEROS_AT_ONCE: Final = 64 << 10
_ZEROS: Final = bytes(ZEROS_AT_ONCE)


class Runner:
    """Runs the requests of one connection."""

    def __init__(self, layer: Layer, negotiated: Negotiated, name: str) -> None:
        """`name` is the plugin's, for messages."""
        self._layer = layer
        self._name = name
        self._extended = negotiated.extended_headers
        self._structured = negotiated.structured_replies
        self.contexts = dict(negotiated.contexts)
        """The metadata contexts, by ID."""
        self._size = layer.get_size()
        self._can_write = layer.can_write()
        self._can_fua = layer.can_fua() != Fua.NONE
        self._rules = Rules(layer, self._structured, self.contexts)
        self._group = layer.pwrite_group()
        self.ready: list[Any] = []
        """Replies that are to be sent: headers and payloads, in order."""
        self.crew: Crew | None = None
        """Threads that writes with FUA may be given to, when they cannot be made stable at once."""
        self.goodbye = False
        """The client has sent DISC: it has not just gone."""
        self.waited = 0.0
        """Seconds that writes with FUA took, which wait by nature (who measures sets it to 0)."""

    def run_batch(self, batch: Iterator[Request]) -> bool:
        """Run requests in order; replies go to `ready`.

        Returns True, before the batch's end, when they are many bytes: send, and call again. The
        two common requests are done here; `run_request` knows all the others, and all that is odd.
        """
        ready = self.ready
        size = self._size
        pread = self._layer.unchecked_pread
        any_block_size = self._rules.any_block_size
        longest = MAX_PAYLOAD if any_block_size else 0
        pwrite = self._layer.pwrite if self._can_write and any_block_size else None
        pack_data = DATA.pack
        pack_simple = SIMPLE.pack
        pack_chunk = EXTENDED_CHUNK.pack
        structured = self._structured
        extended = self._extended
        group = self._group
        held: list[Request] = []  # writes with FUA, to be made stable together
        gathered = 0
        try:
            for flags, kind, cookie, offset, count, payload in batch:
                if kind == 0 and not flags and 0 < count <= longest and offset + count <= size:
                    if held:  # what comes next may take long, and replies may have an order
                        self._run_held(held)
                    try:
                        data = pread(count, offset, 0)
                        kind_of = type(data)
                        if kind_of is memoryview:
                            if (
                                data.shape != (count,)
                                or data.nbytes != count
                                or not data.contiguous
                            ):
                                data = exactly(data, count)
                        elif (kind_of is not bytes and kind_of is not bytearray) or len(
                            data
                        ) != count:
                            data = exactly(data, count)
                    except BaseException as failure:  # a script may even call sys.exit()
                        self.fail(kind, cookie, offset, count, failure)
                        continue
                    if not structured:
                        ready += (pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie), data)
                    elif count >= HOLE_PAYS and kind_of is not memoryview and _is_zero(data, count):
                        ready.append(
                            encode_hole(cookie, offset, count, at=offset if extended else None)
                        )
                        continue
                    elif extended:
                        ready += (
                            EXTENDED_DATA.pack(
                                EXTENDED_REPLY_MAGIC, 1, 1, cookie, offset, count + 8, offset
                            ),
                            data,
                        )
                    else:
                        ready += (
                            pack_data(STRUCTURED_REPLY_MAGIC, 1, 1, cookie, count + 8, offset),
                            data,
                        )
                    gathered += count
                    if gathered >= GATHER:
                        return True
                elif (
                    kind == 1
                    and payload is not None
                    and flags & ~1 == 0
                    and (flags == 0 or self._can_fua)
                    and offset + count <= size
                    and pwrite is not None
                ):
                    if flags and group is not None:
                        held.append((flags, kind, cookie, offset, count, payload))
                        continue
                    if held:
                        self._run_held(held)
                    try:
                        pwrite(payload, offset, flags << 1)  # CMD_FLAG_FUA is 1, Flag.FUA is 2
                    except BaseException as failure:  # a script may even call sys.exit()
                        self.fail(kind, cookie, offset, count, failure)
                        continue
                    if extended:
                        ready.append(pack_chunk(EXTENDED_REPLY_MAGIC, 1, 0, cookie, offset, 0))
                    else:
                        ready.append(pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))
                else:
                    if held:
                        self._run_held(held)
                    gathered += self.run_request(flags, kind, cookie, offset, count, payload)
                    if gathered >= GATHER:
                        return True
        finally:
            if held:  # also when another thread has taken over the rest of the batch
                self._run_held(held)
        return False

    def _run_held(self, requests: list[Request]) -> None:
        """Run writes with FUA: as a group, or each in a thread, or one by one; none is left."""
        held = requests[:]
        requests.clear()
        crew = self.crew
        begun = perf_counter()
        several = len(held) > 1 or (crew is not None and crew.working)
        if several and self.run_group(held):
            pass
        elif several and crew is not None:
            crew.dispatch(held, grouped=False)
        else:
            for request in held:
                self.run_request(*request)
        self.waited += perf_counter() - begun

    @property
    def groups(self) -> bool:
        """Whether `run_group` is of any use."""
        return self._group is not None

    def run_group(self, held: Sequence[Request]) -> bool:
        """Make writes with FUA stable together; False: none was answered, run each by itself.

        Not if one of them must be refused, nor after a failure: each then gets its own answer.
        """
        group = self._group
        assert group is not None
        if any(self._rules.check(r[0], r[1], r[3], r[4], r[5]) for r in held):
            return False
        try:
            if not group([(request[5], request[3]) for request in held]):
                return False
        except BaseException as failure:  # a script may even call sys.exit()
            log.debug(f"{self._name}: {len(held)} writes with FUA: {log.describe(failure)}")
            return False
        self.ready += [self._done(request[2], request[3]) for request in held]
        return True

    # -- one request, whatever it is -------------------------------------------------------------

    def run_request(
        self,
        flags: int,
        kind: int,
        cookie: int,
        offset: int,
        count: int,
        payload: memoryview | None,
    ) -> int:
        """Run one request and put its reply on `ready`; returns the bytes of data in it."""
        accepted = self.accept(flags, kind, cookie, offset, count, payload)
        if accepted is None:
            return 0
        flags, count, contexts = accepted
        try:
            if kind == CMD_BLOCK_STATUS:
                return self._status(flags, cookie, offset, count, contexts)
            return self._call(flags, kind, cookie, offset, count, payload)
        except BaseException as failure:
            self.fail(kind, cookie, offset, count, failure)
            return 0

    def accept(
        self,
        flags: int,
        kind: int,
        cookie: int,
        offset: int,
        count: int,
        payload: memoryview | None,
    ) -> tuple[int, int, Iterable[int]] | None:
        """Check a request: its flags, its length, and the contexts that it asks for (a status).

        None where it must be refused, and is. Raises Disconnect for DISC.
        """
        contexts: Iterable[int] = self.contexts
        if flags & CMD_FLAG_PAYLOAD_LEN and kind == CMD_BLOCK_STATUS and self._extended:
            found = self._rules.filtered(payload)
            if found is None:
                self._refuse(kind, cookie, offset, count, NBD_EINVAL, "no valid list of contexts")
                return None
            flags &= ~CMD_FLAG_PAYLOAD_LEN
            count, contexts = found
        refused = self._rules.check(flags, kind, offset, count, payload)
        if refused is not None:
            if kind == CMD_DISC:
                self.goodbye = True
                raise Disconnect("")
            error, why = refused
            log.debug(
                f"refused {_NAMES.get(kind, f'command {kind}')} of {count} at {offset}"
                f" flags {flags:#x}: {why}"
            )
            self._refuse(kind, cookie, offset, count, error, why)
            return None
        return flags, count, contexts

    def _call(
        self,
        flags: int,
        kind: int,
        cookie: int,
        offset: int,
        count: int,
        payload: memoryview | None,
    ) -> int:
        """Do a request that was checked, and put its reply on `ready`."""
        layer = self._layer
        if kind == CMD_READ:
            return self.put_data(cookie, offset, count, layer.unchecked_pread(count, offset, 0))
        name, arguments = operation_of(flags, kind, offset, count, payload)
        getattr(layer, name)(*arguments)
        self.put_done(cookie, offset)
        return 0

    def put_data(self, cookie: int, offset: int, count: int, found: Any) -> int:
        """Put a read's reply on `ready`; returns the bytes of data in it. Raises OSError."""
        data = exactly(found, count)
        at = offset if self._extended else None
        if not self._structured:
            header = SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
        elif count >= HOLE_PAYS and type(found) is not memoryview and _is_zero(data, count):
            self.ready.append(encode_hole(cookie, offset, count, at=at))
            return 0
        else:
            header = encode_data(cookie, offset, count, at=at)
        self.ready += (header, data)
        return count

    def put_done(self, cookie: int, offset: int) -> None:
        """Put the reply on `ready` that says no more than that it is done."""
        self.ready.append(self._done(cookie, offset))

    def _status(
        self, flags: int, cookie: int, offset: int, count: int, contexts: Iterable[int]
    ) -> int:
        """Put a block status on `ready`: a chunk for each context; returns its bytes."""
        found: list[tuple[int, Sequence[Extent]]] = []
        for number in contexts:
            name, arguments = self.question_of(number, flags, offset, count)
            found.append((number, getattr(self._layer, name)(*arguments)))
        return self.put_status(cookie, offset, found)

    def question_of(
        self, number: int, flags: int, offset: int, count: int
    ) -> tuple[str, tuple[Any, ...]]:
        """The operation that answers for a context, by ID, and its arguments."""
        one = Flag.REQ_ONE if flags & CMD_FLAG_REQ_ONE else 0
        name = self.contexts[number]
        if name == CONTEXT_BASE_ALLOCATION:
            return "extents", (count, offset, one)
        return "block_status", (name, count, offset, one)

    def put_status(
        self, cookie: int, offset: int, found: Sequence[tuple[int, Sequence[Extent]]]
    ) -> int:
        """Put on `ready` what was found for each context, by ID; returns its bytes."""
        at = offset if self._extended else None
        chunks: list[bytes] = []
        for number, extents in found:
            pairs = [(extent[1], extent[2]) for extent in extents]
            last = number == found[-1][0]
            try:
                chunks.append(encode_status(cookie, number, pairs, last, at))
            except OverflowError:
                raise OSError(
                    errno.EOVERFLOW,
                    f"{self.contexts[number]}: its flags need extended headers (64 bits)",
                ) from None
        self.ready.append(b"".join(chunks))
        return len(self.ready[-1])

    def _done(self, cookie: int, offset: int) -> bytes:
        """The reply that says no more than that the request at `offset` is done."""
        if self._extended:
            return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, 1, 0, cookie, offset, 0)
        return SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def fail(self, kind: int, cookie: int, offset: int, count: int, failure: BaseException) -> None:
        """A plugin's call failed: the client gets an errno, the log what happened."""
        error = nbd_errno(errno_of(failure))
        what = _NAMES.get(kind, "request")
        if not (error == 95 and kind == CMD_WRITE_ZEROES):  # a fast zero that is not: no news
            log.exception(f"{self._name}: {what}: offset {offset}, count {count}", failure)
        text = log.describe(failure) if isinstance(failure, OSError) else "the plugin failed"
        self._refuse(kind, cookie, offset, count, error, f"{what}: {text}")

    def _refuse(
        self, kind: int, cookie: int, offset: int, count: int, error: int, why: str
    ) -> None:
        if self._structured:
            where = offset if kind == CMD_READ and count else None  # it has to lie in the request
            at = offset if self._extended else None
            self.ready.append(encode_error(cookie, error, why, where, at))
        else:
            self.ready.append(SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, cookie))


def operation_of(
    flags: int, kind: int, offset: int, count: int, payload: memoryview | None
) -> tuple[str, tuple[Any, ...]]:
    """The operation that does a command which returns no data, and its arguments."""
    fua = Flag.FUA if flags & CMD_FLAG_FUA else 0
    if kind == CMD_WRITE:
        return "pwrite", (payload, offset, fua)
    if kind == CMD_FLUSH:
        return "flush", (0,)
    if kind == CMD_TRIM:
        return "trim", (count, offset, fua)
    if kind == CMD_CACHE:
        return "cache", (count, offset, 0)
    may_trim = 0 if flags & CMD_FLAG_NO_HOLE else Flag.MAY_TRIM
    fast = Flag.FAST_ZERO if flags & CMD_FLAG_FAST_ZERO else 0
    return "zero", (count, offset, fua | may_trim | fast)


def _is_zero(data: bytes | bytearray | memoryview, count: int) -> bool:
    """Whether data is zeros throughout: comparisons that end at the first other byte."""
    if data[0] or data[count >> 1] or data[count - 1]:
        return False
    if isinstance(data, memoryview):
        data = data.tobytes()
    for start in range(0, count - ZEROS_AT_ONCE + 1, ZEROS_AT_ONCE):
        if not data.startswith(_ZEROS, start):
            return False
    return data.endswith(_ZEROS[: count % ZEROS_AT_ONCE])
