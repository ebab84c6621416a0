"""Tasks: a connection's requests as tasks on the event loop, where the plugin is asynchronous.

It stands where a `Crew` stands, with the same methods. The loop receives what there is, makes a
task of each request, gathers replies, and sends them once per round: one thread for all
connections, and none that has to wake another, which would cost more than all the rest. Neither
receiving nor sending ever waits. What the client does not take stays, with the right to send, until
its socket takes more: such a client hurts nobody else.

TLS and pipes have nothing that never waits. There the connection's reader receives, and hands over
whole batches (`dispatch`), and another thread of the connection sends (`Courier`).

What is in flight is bounded by number and by bytes; beyond that the reader waits. A request is in
flight until its reply is sent, so a client that reads nothing makes the server wait, not grow. The
counts need no lock: each has one writer, and they only grow.

Operations that a filter above changes are functions that wait for the loop: their requests go to
worker threads, to a `Crew`, and the reader is a thread then, too.

Tasks are never cancelled: a client that has gone may have left a write half done.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections import deque
from itertools import count as counter

from .. import log
from ..asynchronous import ASKED, AsyncLayer, coroutines
from ..flags import Fua
from ..loop import context_for
from ..protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    MAX_PAYLOAD,
)
from .crew import BUDGET, Crew, keeping_payload, weight_of
from .receiver import LONG_SILENCE, Disconnect
from .runner import operation_of
from .sender import IOV_MAX, after

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

    from ..complete import Layer
    from ..protocol.requests import Request
    from ..session import Session
    from .transmission import Transmission

MOST: Final = 1024
"""Requests of a connection that are in flight at once."""
TURN: Final = 1 << 20
"""Bytes that one connection sends in a round of the loop, before others have their turn."""
LATER: Final = 0.005
"""Seconds until the loop looks again, where another thread is sending."""

OF_COMMAND: Final = {
    CMD_READ: ("pread",),
    CMD_WRITE: ("pwrite",),
    CMD_FLUSH: ("flush",),
    CMD_TRIM: ("trim",),
    CMD_CACHE: ("cache",),
    CMD_WRITE_ZEROES: ("zero",),
    CMD_BLOCK_STATUS: ("extents", "block_status"),
}
EAGER: Final[Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
"""From 3.12 on a task runs at once, up to where it first waits."""


class Tasks:
    """A connection's requests on the event loop; `dispatch` is the reader's."""

    def __init__(
        self, transmission: Transmission, layer: Layer, session: Session, name: str, threads: int
    ) -> None:
        """`name` is the connection's, for messages; `threads`: for what a filter changes."""
        bottom = layer
        while bottom.next is not None:
            bottom = bottom.next
        assert isinstance(bottom, AsyncLayer)
        self._event_loop = bottom.loop
        self._loop = bottom.loop.loop
        self._transmission = transmission
        self._sock, self._ready = transmission.sender.sock, transmission.runner.ready
        self._send_lock = transmission.sender.lock
        self._size = layer.get_size()
        self._can_write = layer.can_write()
        self._fua = CMD_FLAG_FUA if layer.can_fua() != Fua.NONE else 0
        self._any_block_size = not any(layer.block_size())

        operations = coroutines(layer)
        self._operations: dict[str, Any] = {name: operations.get(name) for name in ASKED}
        self._threaded = frozenset(
            kind
            for kind, names in OF_COMMAND.items()
            if not all(name in operations for name in names)
        )
        self._crew = Crew(transmission, session, name, threads) if self._threaded else None
        self._context = context_for(session, log.name() or name)

        # The reader's (which may be the loop itself)
        self.reads = self._crew is None and type(self._sock) is socket.socket
        """Whether the loop receives requests, too: no thread then has to wake another."""
        self._over = threading.Event()
        self._failure: BaseException | None = None  # why nothing more is received
        self._listening = False
        self._heard = 0  # counts what was received
        self._timed = False  # silence will be noticed
        self._pending: deque[Request] = deque()  # for which there is no room yet
        self._handed = 0
        self._handed_bytes = 0
        self._waiting = False  # for room
        self._room = threading.Event()
        self._closed = False
        # The loop's
        self._serial = counter()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._answered = 0
        self._answered_bytes = 0
        self._more_bytes = 0  # of replies that are more than what was asked for
        self._flushing = False  # a flush is due
        self._rest: list[Any] | None = None  # what the client did not take; we may send, then
        self._gone = False
        self._joining = False
        self._ended = threading.Event()
        # The sender's (the loop, or the courier)
        self._sent = 0
        self._sent_bytes = 0
        self._courier = None if type(self._sock) is socket.socket else Courier(self, transmission)

        self._event_loop.start()
        self._event_loop.pulse.add(self)

    # -- for the reader --------------------------------------------------------------------------

    def dispatch(self, requests: Sequence[Request | None], grouped: bool = True) -> None:
        """Hand requests over, waiting while too much is in flight. Raises Disconnect for DISC."""
        batch: list[tuple[Request, int]] = []
        threaded: list[Request] = []
        goodbye = False
        for request in requests:
            if request is None:
                continue
            if request[1] == CMD_DISC:
                goodbye = True
                break
            if request[1] in self._threaded:
                threaded.append(request)
                continue
            weight = weight_of(request)
            if self._is_full(weight):
                self._hand_over(batch)
                batch = []
                self._wait_for_room(weight)
            batch.append(self._admit(request, weight))
        self._hand_over(batch)
        if threaded and self._crew is not None:
            self._crew.dispatch(threaded, grouped=False)
        if goodbye:
            self._transmission.goodbye = True
            raise Disconnect("")

    def _admit(self, request: Request, weight: int) -> tuple[Request, int]:
        """From here on it is in flight, and its payload is its own."""
        self._handed += 1
        self._handed_bytes += weight
        return keeping_payload(request), weight

    def _hand_over(self, batch: list[tuple[Request, int]]) -> None:
        if batch:
            self._event_loop.post(self._begin, batch)
            self._event_loop.pulse.stir()

    def _is_full(self, weight: int) -> bool:
        inflight = self._handed - self._sent
        bytes_inflight = self._handed_bytes + self._more_bytes - self._sent_bytes
        return inflight > 0 and (inflight >= MOST or bytes_inflight + weight > BUDGET)

    def _wait_for_room(self, weight: int) -> None:
        while self._is_full(weight):
            if self._closed:
                raise Disconnect("")
            self._room.clear()
            self._waiting = True
            if self._is_full(weight):
                self._room.wait(1.0)
        self._waiting = False

    # -- where the loop is the reader ------------------------------------------------------------

    def read(self) -> None:
        """Receive and run requests to the end. Raises Disconnect, OSError, MemoryError."""
        self._event_loop.post(lambda _: self._on_readable(), None)
        self._over.wait()
        if self._failure is not None:
            raise self._failure

    def _on_readable(self) -> None:
        if self._over.is_set():
            return
        try:
            requests = self._transmission.receiver.receive_what_is_there()
        except BaseException as failure:
            self._failure = failure
            self._listen(False)
            self._over.set()
            return
        self._pending.extend(requests)
        self._take()
        self._heard += 1
        if not self._timed and self._transmission.receiver.parser.large:
            self._timed = True
            self._loop.call_later(LONG_SILENCE, self._look_for_silence, self._heard)

    def _look_for_silence(self, heard: int) -> None:
        """A client that sends nothing for long needs no large buffer."""
        self._timed = False
        if not self._over.is_set() and not self._pending:
            if self._heard == heard:
                self._transmission.receiver.shrink()
            else:
                self._timed = True
                self._loop.call_later(LONG_SILENCE, self._look_for_silence, self._heard)

    def _take(self) -> None:
        """Begin the requests that there is room for; listen for more when all have begun."""
        pending = self._pending
        batch: list[tuple[Request, int]] = []
        while pending:
            if pending[0][1] == CMD_DISC:
                self._transmission.goodbye = True
                self._failure = Disconnect("")
                pending.clear()
                break
            weight = weight_of(pending[0])
            if self._is_full(weight):
                break
            batch.append(self._admit(pending.popleft(), weight))
        if batch:
            self._begin(batch)
            self._event_loop.pulse.stir()
        self._listen(not pending and self._failure is None)
        if self._failure is not None:
            self._over.set()

    def _listen(self, wanted: bool) -> None:
        if wanted is not self._listening:
            self._listening = wanted
            if wanted:
                self._loop.add_reader(self._sock.fileno(), self._on_readable)
            else:
                self._loop.remove_reader(self._sock.fileno())

    @property
    def working(self) -> bool:
        """Whether any request that was dispatched is not answered yet."""
        return self._handed != self._answered or (self._crew is not None and self._crew.working)

    def leave_behind(self, target: Callable[[], None]) -> bool:
        """The reader makes no calls that it could be left behind in."""
        return False

    def came_back(self) -> None:
        """Nobody was left behind."""

    def close(self) -> None:
        """No more requests will come (from any thread)."""
        self._closed = True
        self._room.set()
        self._over.set()
        if self._crew is not None:
            self._crew.close()

    def join(self) -> None:
        """Wait until every request has ended, and its reply was sent or is in vain."""
        if self._crew is not None:
            self._crew.join()
        self._joining = True
        self._event_loop.post(lambda _: self._flush(), None)
        self._ended.wait()
        if self._courier is not None:
            self._courier.join()
        self._event_loop.pulse.remove(self)

    # -- on the loop -----------------------------------------------------------------------------

    def _begin(self, batch: list[tuple[Request, int]]) -> None:
        loop, running, copy = self._loop, self._running, self._context.copy
        serials = self._serial
        for request, weight in batch:
            serial = next(serials)
            task = asyncio.Task(
                self._run(serial, request, weight),
                loop=loop,
                name="request",
                context=copy(),
                **EAGER,
            )
            if not task.done():
                running[serial] = task  # the loop itself keeps no task alive

    async def _run(self, serial: int, request: Request, weight: int) -> None:
        """One request, from its check to its reply, whatever happens."""
        transmission = self._transmission
        flags, kind, cookie, offset, count, payload = request
        more = 0
        try:
            try:
                plain = self._any_block_size and offset + count <= self._size
                if plain and kind == CMD_READ and not flags and 0 < count <= MAX_PAYLOAD:
                    found = await self._operations["pread"](count, offset, 0)
                    transmission.runner.put_data(cookie, offset, count, found)
                elif (
                    plain
                    and kind == CMD_WRITE
                    and payload is not None
                    and self._can_write
                    and not flags & ~self._fua
                ):
                    # CMD_FLAG_FUA is 1, Flag.FUA is 2
                    await self._operations["pwrite"](payload, offset, flags << 1)
                    transmission.runner.put_done(cookie, offset)
                else:
                    accepted = transmission.runner.accept(*request)
                    if accepted is not None:
                        flags, count, contexts = accepted
                        more = await self._do(flags, kind, cookie, offset, count, payload, contexts)
            except BaseException as failure:  # also what cancels: somebody else's code did
                transmission.runner.fail(kind, cookie, offset, count, failure)
        except BaseException as failure:  # a request that nobody answers is a client that waits
            self.give_up(failure)
        self._running.pop(serial, None)
        self._more_bytes += more
        self._answered_bytes += weight + more
        self._answered += 1
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    async def _do(
        self,
        flags: int,
        kind: int,
        cookie: int,
        offset: int,
        count: int,
        payload: memoryview | None,
        contexts: Any,
    ) -> int:
        """Do a request that was checked, and make its reply; returns the bytes of a status."""
        runner, operations = self._transmission.runner, self._operations
        if kind == CMD_READ:
            found = await operations["pread"](count, offset, 0)
            runner.put_data(cookie, offset, count, found)
            return 0
        if kind == CMD_BLOCK_STATUS:
            answers = []
            for number in contexts:
                name, arguments = runner.question_of(number, flags, offset, count)
                answers.append((number, await operations[name](*arguments)))
            return runner.put_status(cookie, offset, answers)
        name, arguments = operation_of(flags, kind, offset, count, payload)
        await operations[name](*arguments)
        runner.put_done(cookie, offset)
        return 0

    # -- sending ---------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send what is ready, as much as the client takes now."""
        self._flushing = False
        if self._gone:
            self._ready.clear()
        if self._courier is not None:
            self._courier.go()
        elif self._ready and not self._send():
            return
        else:
            self.delivered(*self.counts)
        if self._joining:
            self._listen(False)
            self._pending.clear()
        if self._joining and not self._running and self._rest is None:
            if self._courier is not None:
                self._courier.end()
            self._ended.set()

    @property
    def counts(self) -> tuple[int, int]:
        """How many replies were made, and how many bytes they are (from any thread)."""
        return self._answered, self._answered_bytes

    def delivered(self, answered: int, answered_bytes: int) -> None:
        """So many replies are on their way, since the beginning (for the one who sends)."""
        self._sent, self._sent_bytes = answered, answered_bytes
        if self._waiting:
            self._room.set()
        if self._pending:
            self._take()

    def _send(self) -> bool:
        """Send what is ready; False: not all of it yet, and `_flush` is called again."""
        if self._rest is not None:
            return False  # `_send_rest` goes on
        if not self._send_lock.acquire(blocking=False):
            self._flushing = True
            self._loop.call_later(LATER, self._flush)
            return False
        return self._send_pieces([])

    def _send_pieces(self, pieces: list[Any]) -> bool:
        """Send these, then what is ready; as `_send`. It has the right to send."""
        ready = self._ready
        left = TURN
        try:
            while True:
                if not pieces:
                    if not ready:
                        break
                    pieces = ready[:IOV_MAX]
                    del ready[: len(pieces)]
                sent = self._sock.sendmsg(pieces, (), socket.MSG_DONTWAIT)
                left -= sent
                pieces = after(pieces, sent)
                if left <= 0 and (pieces or ready):
                    self._rest = pieces
                    self._loop.call_soon(self._send_rest)
                    return False
        except BlockingIOError:
            self._rest = pieces
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
            return False
        except OSError as error:
            self.give_up(error)
        self._send_lock.release()
        return True

    def _on_writable(self) -> None:
        self._loop.remove_writer(self._sock.fileno())
        self._send_rest()

    def _send_rest(self) -> None:
        rest, self._rest = self._rest, None
        if rest is not None and self._send_pieces(rest):
            self._flush()

    def give_up(self, failure: BaseException) -> None:
        """The client has gone, or cannot be answered (from any thread)."""
        self._gone = True
        self._ready.clear()
        self._transmission.give_up(failure)


class Courier:
    """A thread that sends, for a connection without a send that never waits."""

    def __init__(self, tasks: Tasks, transmission: Transmission) -> None:
        self._tasks = tasks
        self._transmission = transmission
        self._wake = threading.Event()
        self._ending = False
        self._thread: threading.Thread | None = None

    def go(self) -> None:
        """Something is ready."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
            self._thread.start()
        self._wake.set()

    def end(self) -> None:
        """Nothing will be ready any more."""
        self._ending = True
        self._wake.set()

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            ending = self._ending
            counts = self._tasks.counts  # before: what is counted there is ready by now
            try:
                self._transmission.send()
            except BaseException as error:
                self._tasks.give_up(error)
            self._tasks.delivered(*counts)
            if ending:
                return
