"""Transmission: one connection's requests, from bytes to replies.

Theory. A reader receives into the parser's buffer, parses every complete request at once, runs
each (`_run_batch`), and answers the batch with one gather write. Nothing is locked, queued or
logged per request. That is the whole story where calls do not wait, and under the serialized
thread models.

Where calls may wait and the thread model is parallel, three things are added:

- *dispatch*: the reader hands requests to the connection's worker threads (at most `threads`),
  which answer as they end. It is used when a layer declares `blocking = True`, and when calls that
  declare nothing turn out to wait (wall time, but no processor time); it is left again when they
  turn out not to.
- *take-over*: a call that runs for over a tick of the `Watch` while its reader has more to do is
  left behind with its thread; another thread becomes the reader. So an undeclared plugin may wait
  for another request of the same connection, and a slow request does not hold up quick ones.
- *a budget*: requests in flight are bounded by number and by the bytes of their payloads, so a
  client that pipelines without reading replies makes the server wait, not grow.

Replies gather in `_ready`; whoever holds `_send_lock` sends all of them.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections import deque
from struct import Struct
from time import perf_counter, thread_time

from .. import log
from ..complete import exactly
from ..errors import errno_of, nbd_errno
from ..flags import Flag, Fua, ThreadModel
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
from ..protocol.requests import RequestParser
from .crew import Crew, Disconnect
from .rules import Rules
from .watch import GATE_PATIENCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any, Final

    from ..complete import Layer
    from ..protocol.negotiated import Negotiated
    from ..protocol.requests import Request
    from ..session import Session
    from .watch import Watch

GATHER: Final = 1 << 20
"""Replies of a batch are sent when they have this many bytes."""
IOV_MAX: Final = min(os.sysconf("SC_IOV_MAX"), 1024)
SLOW_CALL: Final = 60e-6
"""Seconds per call over which calls that declare nothing are suspected to wait."""
WORTH_WAITING: Final = 16 << 10
"""When more of a write's payload is missing, it is received in one go, not as it trickles in."""
SMALL_REQUEST: Final = 32 << 10
"""Requests of up to this many bytes run one batch at a time (see `Watch.gate`)."""
LONG_SILENCE: Final = 5.0
"""Seconds after which a client that sends nothing is idle: it needs no large buffer."""
TIMEVAL: Final = Struct("ll")
NO_MEMORY: Final = "out of memory for a client's requests: its connection is closed"
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


class Transmission:
    """The transmission phase of one connection. `run` returns when it is over."""

    def __init__(
        self,
        sock: socket.socket,
        layer: Layer,
        negotiated: Negotiated,
        leftover: bytes,
        session: Session,
        *,
        name: str,
        thread_model: int,
        threads: int,
        lock: AbstractContextManager[Any] | None,
        watch: Watch,
    ) -> None:
        """`lock` is held around calls (serialize_all_requests); `name` is the plugin's."""
        self._sock = sock
        self._layer = layer
        self._session = session
        self._name = name
        self._lock = lock
        self._watch = watch
        self._threads = threads
        self._extended = negotiated.extended_headers
        self._parser = RequestParser(leftover, extended=self._extended)
        self._first = bool(leftover)
        self._timed = False  # silence is noticed: the parser has a large buffer to give back
        self._structured = negotiated.structured_replies
        self._contexts = dict(negotiated.contexts)

        self._size = layer.get_size()
        self._can_write = layer.can_write()
        self._can_fua = layer.can_fua() != Fua.NONE
        self._rules = Rules(layer, self._structured, self._contexts)
        self._group = layer.pwrite_group()

        self._ready: list[Any] = []
        self._send_lock = threading.Lock()
        self._turn = threading.Lock()  # held by the reader while it receives and parses
        self._batch: deque[Request | None] = deque()  # what the reader still has to run
        self._serial = 0  # counts the batches
        self._epoch = 0  # grows when a reader is left behind
        self._busy = False  # the reader is running a batch
        self.watched = False
        """Whether the watch looks at this connection (it sets this)."""
        self._waited = 0.0  # seconds that a batch's writes with FUA took: they wait by nature
        self._probing = 0  # batches to measure the processor time of, after a slow one
        self.goodbye = False
        """The client has sent DISC: it has not just gone."""
        self._why: str | None = None  # set when the transmission is over
        self._stopping = False

        may_block = layer.may_block()
        parallel = thread_model == ThreadModel.PARALLEL and threads > 1
        self._measured = parallel and may_block is None
        self._dispatching = parallel and may_block is True
        self._crew: Crew | None = None
        if parallel and may_block is not False:
            self._crew = Crew(self, session, name, threads)

    # -- the reader ------------------------------------------------------------------------------

    def run(self) -> str:
        """Serve until the client has gone; returns why ("" for an orderly end)."""
        try:
            self._read(self._epoch)
        finally:
            if self._crew is not None:
                self._crew.join()
            if self._measured:
                self._watch.remove(self)
            self._parser.close()
        return self._why or ""

    def stop(self) -> None:
        """Finish what is running, answer it, and end (from any thread)."""
        self._stopping = True
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # the client was quicker

    def _receive(self) -> list[Request]:
        """The next requests: at least one. Raises Disconnect at the end, OSError."""
        parser = self._parser
        while True:
            if self._first:
                self._first = False
            else:
                if parser.broken:
                    raise Disconnect(parser.broken)
                if self._stopping:
                    raise Disconnect("")
                space, missing = parser.space(), parser.missing
                if parser.large is not self._timed:
                    self._timed = self._note_silence(parser.large)
                try:
                    if missing > WORTH_WAITING:
                        count = self._sock.recv_into(space, missing, socket.MSG_WAITALL)
                    else:
                        count = self._sock.recv_into(space)
                except BlockingIOError:  # it has been silent for long
                    parser.shrink()
                    continue
                if not count:
                    partial = parser.partial
                    raise Disconnect("client has gone within a request" if partial else "")
                parser.received(count)
            requests = parser.requests()
            if requests:
                return requests

    def _note_silence(self, wanted: bool) -> bool:
        """Whether receiving is to end with BlockingIOError after a long silence."""
        if type(self._sock) is socket.socket:
            seconds = LONG_SILENCE if wanted else 0.0
            limit = TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        return wanted

    def _read(self, epoch: int) -> None:
        """Be the reader until the connection ends or another thread has taken over."""
        try:
            if self._crew is None:
                self._read_alone()
            else:
                self._read_with(self._crew, epoch)
        except Disconnect as end:
            self._finish(str(end))
        except OSError as error:
            self.end(error.strerror or str(error))
        except MemoryError:
            log.error(NO_MEMORY)
            self.end("out of memory")
        except BaseException:  # a bug of ours: the crew must not wait for ever
            self.end("")
            raise

    def _read_alone(self) -> None:
        lock = self._lock
        while True:
            batch = iter(self._receive())
            more = True
            while more:
                if lock is None:
                    more = self._run_batch(batch)
                else:
                    with lock:
                        more = self._run_batch(batch)
                self.send()

    def _read_with(self, crew: Crew, epoch: int) -> None:
        while self._epoch == epoch and self._why is None:
            with self._turn:
                if self._epoch != epoch or self._why is not None:
                    break
                requests: list[Request | None] = [*self._receive()]
                if self._dispatching:
                    crew.dispatch(requests)
                    continue
                requests.append(None)
                batch = self._batch = deque(requests)
                self._serial += 1
            more = True
            while more:
                more = self._run_measured(batch)
                self.send()
        if self._epoch != epoch:
            crew.came_back()

    def _finish(self, why: str) -> None:
        """End after sending what is ready."""
        try:
            self.send()
        except OSError:
            pass  # nobody waits for it any more
        self.end(why)

    def end(self, why: str) -> None:
        """The transmission is over (from any thread); the first reason counts."""
        self._busy = False
        if self._why is None:
            self._why = why
        if self._crew is not None:
            self._crew.close()

    def _run_measured(self, batch: deque[Request | None]) -> bool:
        """Run a batch, and find out whether its calls wait; as `_run_batch`."""
        before = len(batch)
        probing = self._probing
        cpu, switches = (thread_time(), _switches()) if probing else (0.0, 0)
        self._busy = True  # first: the watch looks once more after it has said that it sleeps
        if not self.watched:
            self._watch.look_at(self)
        gate = self._enter_gate(batch) if self._watch.several else None
        wall = perf_counter()
        try:
            more = self._run_batch(iter(batch.popleft, None))
        except IndexError:
            more = False  # another thread has taken over what was left, and the None at the end
        finally:
            if gate is not None:
                gate.release()
        wall = perf_counter() - wall - self._waited
        self._waited = 0.0
        if self._batch is batch:  # else another thread is the reader, and may be busy
            self._busy = False
        calls = before - len(batch)
        if calls and wall > SLOW_CALL * calls:
            # Slow by waiting: then threads help. Not so by computing, or because other processes
            # had the processor: that is no switch that the calls have asked for.
            if probing and thread_time() - cpu < wall / 2 and 2 * (_switches() - switches) >= calls:
                log.debug(f"calls take {wall / calls * 1e6:.0f} us: using threads")
                self._dispatching = True
            self._probing = 8
        elif probing:
            self._probing = probing - 1
        return more

    def _enter_gate(self, batch: deque[Request | None]) -> threading.Lock | None:
        """Wait for our turn among the connections, if that pays; returns the lock to release."""
        try:
            first = batch[0]
        except IndexError:
            return None  # another thread has taken over
        gate = self._watch.gate
        if first is None or first[4] > SMALL_REQUEST or not gate.acquire(timeout=GATE_PATIENCE):
            return None
        return gate

    def _run_batch(self, batch: Iterator[Request]) -> bool:
        """Run requests in order; replies go to `_ready`.

        Returns True, before the batch's end, when they are many bytes: send, and call again. The
        two common requests are done here; `run_request` knows all the others, and all that is odd.
        """
        ready = self._ready
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
                        self._fail(kind, cookie, offset, count, failure)
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
                        self._fail(kind, cookie, offset, count, failure)
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
        crew = self._crew
        begun = perf_counter()
        several = len(held) > 1 or (crew is not None and crew.working)
        if several and self.run_group(held):
            pass
        elif several and crew is not None:
            crew.dispatch(held, grouped=False)
        else:
            for request in held:
                self.run_request(*request)
        self._waited += perf_counter() - begun

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
        self._ready += [self._done(request[2], request[3]) for request in held]
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
        """Run one request and put its reply on `_ready`; returns the bytes of data in it."""
        contexts: Iterable[int] = self._contexts
        if flags & CMD_FLAG_PAYLOAD_LEN and kind == CMD_BLOCK_STATUS and self._extended:
            found = self._rules.filtered(payload)
            if found is None:
                self._refuse(kind, cookie, offset, count, NBD_EINVAL, "no valid list of contexts")
                return 0
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
            return 0
        try:
            if kind == CMD_BLOCK_STATUS:
                return self._status(flags, cookie, offset, count, contexts)
            return self._call(flags, kind, cookie, offset, count, payload)
        except BaseException as failure:
            self._fail(kind, cookie, offset, count, failure)
            return 0

    def _call(
        self,
        flags: int,
        kind: int,
        cookie: int,
        offset: int,
        count: int,
        payload: memoryview | None,
    ) -> int:
        """Do a request that was checked, and put its reply on `_ready`."""
        layer = self._layer
        fua = Flag.FUA if flags & CMD_FLAG_FUA else 0
        if kind == CMD_READ:
            found = layer.unchecked_pread(count, offset, 0)
            data = exactly(found, count)
            at = offset if self._extended else None
            if not self._structured:
                header = SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
            elif count >= HOLE_PAYS and type(found) is not memoryview and _is_zero(data, count):
                self._ready.append(encode_hole(cookie, offset, count, at=at))
                return 0
            else:
                header = encode_data(cookie, offset, count, at=at)
            self._ready += (header, data)
            return count
        if kind == CMD_WRITE:
            layer.pwrite(payload, offset, fua)
        elif kind == CMD_FLUSH:
            layer.flush(0)
        elif kind == CMD_TRIM:
            layer.trim(count, offset, fua)
        elif kind == CMD_CACHE:
            layer.cache(count, offset, 0)
        else:
            may_trim = 0 if flags & CMD_FLAG_NO_HOLE else Flag.MAY_TRIM
            fast = Flag.FAST_ZERO if flags & CMD_FLAG_FAST_ZERO else 0
            layer.zero(count, offset, fua | may_trim | fast)
        self._ready.append(self._done(cookie, offset))
        return 0

    def _status(
        self, flags: int, cookie: int, offset: int, count: int, contexts: Iterable[int]
    ) -> int:
        """Put a block status on `_ready`: a chunk for each context; returns its bytes."""
        layer = self._layer
        one = Flag.REQ_ONE if flags & CMD_FLAG_REQ_ONE else 0
        at = offset if self._extended else None
        chunks: list[bytes] = []
        wanted = list(contexts)
        for number in wanted:
            name = self._contexts[number]
            if name == CONTEXT_BASE_ALLOCATION:
                extents = layer.extents(count, offset, one)
            else:
                extents = layer.block_status(name, count, offset, one)
            pairs = [(extent[1], extent[2]) for extent in extents]
            last = number == wanted[-1]
            try:
                chunks.append(encode_status(cookie, number, pairs, last, at))
            except OverflowError:
                raise OSError(
                    errno.EOVERFLOW, f"{name}: its flags need extended headers (64 bits)"
                ) from None
        self._ready.append(b"".join(chunks))
        return len(self._ready[-1])

    def _done(self, cookie: int, offset: int) -> bytes:
        """The reply that says no more than that the request at `offset` is done."""
        if self._extended:
            return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, 1, 0, cookie, offset, 0)
        return SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def _fail(
        self, kind: int, cookie: int, offset: int, count: int, failure: BaseException
    ) -> None:
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
            self._ready.append(encode_error(cookie, error, why, where, at))
        else:
            self._ready.append(SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, cookie))

    # -- sending ---------------------------------------------------------------------------------

    def send(self) -> None:
        """Send every reply that is ready. Raises OSError when the client is gone."""
        ready = self._ready
        lock = self._send_lock
        while ready and lock.acquire():
            try:
                pieces = ready[:IOV_MAX]
                del ready[: len(pieces)]
                if pieces:
                    self._send_pieces(pieces)
            finally:
                lock.release()

    def send_ready(self) -> None:
        """As `send`, but leaves it to the thread that is sending already, if there is one."""
        ready = self._ready
        lock = self._send_lock
        while ready and lock.acquire(blocking=False):
            try:
                pieces = ready[:IOV_MAX]
                del ready[: len(pieces)]
                if pieces:
                    self._send_pieces(pieces)
            finally:
                lock.release()

    def _send_pieces(self, pieces: list[Any]) -> None:
        sent = self._sock.sendmsg(pieces)
        total = sum(map(len, pieces))
        while sent < total:  # a signal, or a socket that takes less
            total -= sent
            while sent >= len(pieces[0]):
                sent -= len(pieces.pop(0))
            if sent:
                pieces[0] = memoryview(pieces[0])[sent:]
            sent = self._sock.sendmsg(pieces)

    def give_up(self, failure: BaseException) -> None:
        """Requests can no longer be answered: end the connection (from any thread)."""
        if isinstance(failure, MemoryError):
            log.error(NO_MEMORY)
        elif not isinstance(failure, OSError):  # a bug of ours
            log.exception("connection", failure)
        self.end(str(failure))
        self.hang_up()

    def hang_up(self) -> None:
        """End at once, whatever is under way (from any thread)."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client was quicker

    # -- being left behind -----------------------------------------------------------------------

    def take_over(self) -> None:
        """The reader's call takes long: another thread goes on (called by the Watch)."""
        crew, batch, serial = self._crew, self._batch, self._serial
        if crew is None or not (len(batch) > 1 or _readable(self._sock)):
            return
        if not self._turn.acquire(blocking=False):
            return  # its call has ended: it receives
        try:
            if not self._busy or self._serial != serial or self._why is not None:
                return
            epoch = self._epoch + 1
            if crew.leave_behind(lambda: self._go_on(epoch, batch)):
                self._epoch = epoch  # from here on, the reader is not the reader any more
                self._busy = False
                self._dispatching = True
        finally:
            self._turn.release()

    def _go_on(self, epoch: int, batch: deque[Request | None]) -> None:
        requests: list[Request | None] = []
        try:
            while True:
                requests.append(batch.popleft())
        except IndexError:
            pass
        try:
            self.send()
            with self._turn:
                self._parser.detach()  # the call that is left behind may still use its payload
                if requests and self._crew is not None:
                    self._crew.dispatch(requests)
        except Disconnect as end:
            self._finish(str(end))
            return
        except OSError as error:
            self.end(error.strerror or str(error))
            return
        self._read(epoch)

    def calls_are_quick(self) -> None:
        """What was dispatched did not wait: run it where it is read, unless a layer declares."""
        if self._measured:
            self._dispatching = False

    @property
    def pieces_ready(self) -> int:
        """How many headers and payloads wait to be sent."""
        return len(self._ready)

    @property
    def sending(self) -> bool:
        """Whether replies are on their way to the client, or stuck there."""
        return self._send_lock.locked()

    @property
    def busy(self) -> bool:
        """Whether the reader is running requests."""
        return self._busy

    @property
    def progress(self) -> tuple[int, int]:
        """Changes whenever the reader begins a request."""
        return self._serial, len(self._batch)


def _switches() -> int:
    """How often this thread has given up the processor to wait for something."""
    from resource import RUSAGE_THREAD, getrusage

    return getrusage(RUSAGE_THREAD).ru_nvcsw


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


def _readable(sock: Any) -> bool:
    import select

    pending = getattr(sock, "pending", None)
    if pending is not None and pending():
        return True  # of a TLS connection: decrypted already

    try:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return False  # closed meanwhile
