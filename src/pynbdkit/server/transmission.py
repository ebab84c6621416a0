"""Transmission: one connection's requests, from bytes to replies.

Theory. A reader receives into the parser's buffer, parses every complete request at once
(`Receiver`), runs each (`Runner`), and answers the batch with one gather write (`Sender`). Nothing
is locked, queued or logged per request. That is the whole story where calls do not wait, and under
the serialized thread models.

Where calls may wait and the thread model is parallel, some things are added:

- *dispatch*: the reader hands requests to the connection's worker threads (at most `threads`),
  which answer as they end. It is used when a layer declares `blocking = True`, and when calls that
  declare nothing turn out to wait (wall time, but no processor time); it is left again when they
  turn out not to.
- *take-over*: a call that runs for over a tick of the `Watch` while its reader has more to do is
  left behind with its thread; another thread becomes the reader. So an undeclared plugin may wait
  for another request of the same connection, and a slow request does not hold up quick ones.
- *coroutines*: where the plugin is asynchronous, `tasks.Tasks` stands in the crew's place: what is
  dispatched becomes tasks on the server's event loop.
- *a budget*: requests in flight are bounded by number and by the bytes of their payloads, so a
  client that pipelines without reading replies makes the server wait, not grow.

Where several connections are busy, those whose requests are quick and small are served by one
thread, the `Carousel`'s, which is their reader meanwhile (`turn`).
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from time import perf_counter

from .. import log
from ..flags import ThreadModel
from ..session import set_current
from . import waiting
from .company import SMALL_REQUEST, Company
from .crew import Crew
from .receiver import Disconnect, Receiver
from .runner import Runner
from .sender import Sender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import Any, Final

    from ..complete import Layer
    from ..protocol.negotiated import Negotiated
    from ..protocol.requests import Request
    from ..session import Session
    from .carousel import Carousel
    from .tasks import Tasks
    from .watch import Watch

# Their values are the same everywhere that has epoll(7); select has them on Linux only.
EPOLLIN: Final = 1
EPOLLOUT: Final = 4
NO_MEMORY: Final = "out of memory for a client's requests: its connection is closed"


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
        carousel: Carousel,
    ) -> None:
        """`lock` is held around calls (serialize_all_requests); `name` is the plugin's."""
        self._sock = sock
        self._session = session
        self._lock = lock
        self._watch = watch
        self._carousel = carousel
        self.receiver = Receiver(sock, leftover, negotiated.extended_headers)
        self.runner = Runner(layer, negotiated, name)
        self.sender = Sender(sock, self.runner.ready)
        self.run_request = self.runner.run_request
        self.run_group = self.runner.run_group
        self.send = self.sender.send
        self.send_ready = self.sender.send_ready

        self._turn = threading.Lock()  # held by the reader while it receives and parses
        self._batch: deque[Request | None] = deque()  # what the reader still has to run
        self._serial = 0  # counts the batches
        self._epoch = 0  # grows when a reader is left behind
        self._log_name = log.name() or name
        self._busy = False  # the reader is running a batch
        self._reader = 0  # the system's number of the thread that runs it
        self._noted: tuple[float, ...] = (0, 0, 0, 0, 0, 0)  # what `waits` saw last
        self.watched = False
        """Whether the watch looks at this connection (it sets this)."""
        self._waited = False  # the last batch had writes with FUA that waited
        self._evidence = waiting.Evidence()
        self._probing = 0  # batches to measure the processor time of, after a slow one
        self._why: str | None = None  # set when the transmission is over

        may_block = layer.may_block()
        parallel = thread_model == ThreadModel.PARALLEL and threads > 1
        self._measured = parallel and may_block is None
        self._dispatching = parallel and may_block is True
        self._crew: Crew | Tasks | None = None
        if layer.asynchronous and thread_model == ThreadModel.PARALLEL:
            from .tasks import Tasks

            self._dispatching = True
            self._crew = Tasks(self, layer, session, name, threads)
        elif parallel and may_block is not False:
            self._crew = self.runner.crew = Crew(self, session, self._log_name, threads)

        # A call that waits would hold up all that ride together, unless it can be left behind.
        quick = may_block is False or self._measured
        self._may_ride = quick and lock is None and self.receiver.plain and carousel.available
        carousel.connections += 1
        self._company = Company(carousel, self, in_memory=not self._measured)
        self.off: threading.Lock | None = None
        """Held while the carousel serves us (see `get_on`)."""
        self.awaited = 0
        """What the carousel waits for: requests (EPOLLIN), or room for replies (EPOLLOUT)."""
        self._on_epoch = 0  # the epoch in which we got on
        self._unfinished = False  # the batch of our last turn there has more
        self._thrown: BaseException | None = None  # what has ended our last turn there

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
            self._carousel.forget(self)
            self.receiver.parser.close()
        return self._why or ""

    def stop(self) -> None:
        """Finish what is running, answer it, and end (from any thread)."""
        self.receiver.stopping = True
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # the client was quicker

    def _read(self, epoch: int) -> None:
        """Be the reader until the connection ends or another thread has taken over."""
        try:
            if self._crew is None:
                self._read_alone()
            elif self._crew.reads:
                self._crew.read()
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
        receive, run_batch, send = self.receiver.receive, self.runner.run_batch, self.send
        while True:
            requests = receive()
            first = self._look_around(requests)
            batch = iter(requests)
            del requests  # a payload keeps the whole buffer, also while the client is silent
            more = True
            while more:
                if lock is None:
                    more = run_batch(batch)
                else:
                    with lock:
                        more = run_batch(batch)
                send()
            if self._would_ride(first):
                self._ride()

    def _read_with(self, crew: Crew | Tasks, epoch: int) -> None:
        receive, send = self.receiver.receive, self.send
        while self._epoch == epoch and self._why is None:
            with self._turn:
                if self._epoch != epoch or self._why is not None:
                    break
                requests = receive()
                first = self._look_around(requests)
                if self._dispatching:
                    crew.dispatch(requests)
                    continue
                batch = self._begin(requests)
                del requests  # a payload keeps the whole buffer, also while the client is silent
            more = True
            while more:
                more = self._run_measured(batch)
                send()
            if self._epoch == epoch and self._would_ride(first) and self._still_reads(epoch):
                self._ride()
        if self._epoch != epoch:
            crew.came_back()

    def _still_reads(self, epoch: int) -> bool:
        """Whether we are the reader; a take-over that has begun, as our call ended, ends first."""
        with self._turn:
            return self._epoch == epoch

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

    def _begin(self, requests: list[Request]) -> deque[Request | None]:
        """Have requests as the batch that is run, from which another thread may take over."""
        batch: deque[Request | None] = deque(requests)
        batch.append(None)  # the end, also of what was taken over
        self._batch = batch
        self._serial += 1
        return batch

    def _run_measured(self, batch: deque[Request | None]) -> bool:
        """Run a batch, and find out whether its calls wait; as `Runner.run_batch`."""
        before = len(batch)
        probing = self._probing
        self._reader = threading.get_native_id()
        self._busy = True  # first: the watch looks once more after it has said that it sleeps
        if not self.watched:
            self._watch.look_at(self)
        begun = waiting.usage() if probing else None
        wall = perf_counter()
        more = self._run_queue(batch)
        waited = self.runner.waited
        self._waited = waited > waiting.SLOW_CALL
        wall = perf_counter() - wall - waited
        self.runner.waited = 0.0
        if self._batch is batch:  # else another thread is the reader, and may be busy
            self._busy = False
        calls = before - len(batch)
        if begun is not None and self._evidence.end(calls, wall, begun):
            log.debug("calls wait: using threads")
            self._dispatching = True
        if calls and wall > waiting.SLOW_CALL * calls and self._evidence.wanted():
            self._probing = 8
        elif probing:
            self._probing = probing - 1
        return more

    def _run_queue(self, batch: deque[Request | None]) -> bool:
        """Run a batch that another thread may take over; as `Runner.run_batch`."""
        try:
            return self.runner.run_batch(iter(batch.popleft, None))
        except IndexError:
            return False  # what was left has been taken over, and the None at the end

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

    # -- on the carousel -------------------------------------------------------------------------

    def _look_around(self, requests: list[Request]) -> int:
        """Find out, batch by batch, whether others are busy; returns the first request's bytes."""
        count = requests[0][4]
        self._company.look_around(count, requests[0][5] is not None)
        self.receiver.alone = self._company.alone
        return count

    def _would_ride(self, count: int) -> bool:
        """Whether to ride with others that are busy, after a request of `count` bytes."""
        return (
            self._company.found(count)
            and self._may_ride
            and self.off is None
            and not self._dispatching
            and not self._waited
            and not self.receiver.ahead  # it waits for the socket, and that is here already
        )

    def _ride(self) -> None:
        """Let the carousel read for us, until we have to go on by ourselves; raises as `_read`."""
        self._company.forget()
        epoch = self._epoch
        self._carousel.ride(self)
        self.send()
        thrown, self._thrown = self._thrown, None
        if thrown is not None:
            raise thrown
        run = self._run_measured if self._measured else self._run_queue
        while self._unfinished and self._epoch == epoch:
            self._unfinished = run(self._batch)
            self.send()

    def fileno(self) -> int:
        """The socket's descriptor; -1 when it is closed."""
        return self._sock.fileno()

    def get_on(self) -> threading.Lock:
        """The carousel serves us from now on; returns the lock that is free when it has ended."""
        off = self.off = threading.Lock()
        off.acquire()
        self._on_epoch = self._epoch
        self.awaited = EPOLLIN
        return off

    def get_off(self) -> None:
        """The carousel serves us no longer."""
        off, self.off = self.off, None
        if off is not None:
            off.release()

    def turn(self) -> int:
        """Receive, run and answer a batch, for the carousel; what it is to wait for (`awaited`).

        0: our own thread has to go on.
        """
        receiver = self.receiver
        if not self._turn.acquire(blocking=False):
            return self.awaited  # we are being taken over: wait with the others, not for it alone
        try:
            try:
                epoch = self._on_epoch
                if self._epoch != epoch:
                    return 0  # another thread reads by now
                if self.awaited == EPOLLOUT:
                    return self._send_more()
                requests = receiver.receive_what_is_there()
                if not requests:
                    return 0 if receiver.parser.missing > SMALL_REQUEST else EPOLLIN
                first = requests[0][4]
                self._company.weigh(first, requests[0][5] is not None)
                batch = self._begin(requests)
            finally:
                self._turn.release()
            set_current(self._session)
            log.set_name(self._log_name)
            more = self._run_measured(batch) if self._measured else self._run_queue(batch)
            if self._epoch != epoch:
                return 0
            self._unfinished = more
            sent = self.sender.send_without_waiting()
            if more or self._dispatching or self._waited or receiver.parser.broken:
                return 0
            if not self._company.suits(first):
                return 0
            return EPOLLIN if sent else EPOLLOUT
        except BaseException as failure:  # it is for our own thread to say what it is
            self._busy = False
            self._thrown = failure
            return 0

    def _send_more(self) -> int:
        """Send what the client did not take before; as `turn`."""
        ready = self.runner.ready
        first = ready[0] if ready else None
        if self.sender.send_without_waiting():
            return EPOLLIN
        return EPOLLOUT if ready and ready[0] is not first else 0

    # -- being left behind -----------------------------------------------------------------------

    def take_over(self) -> None:
        """The reader's call takes long: another thread goes on (called by the Watch)."""
        crew, batch, serial, off = self._crew, self._batch, self._serial, self.off
        more = off is not None or len(batch) > 1 or self.receiver.ahead or _readable(self._sock)
        if crew is None or not more:
            return
        if not self._turn.acquire(blocking=False):
            return  # its call has ended: it receives
        try:
            if not self._busy or self._serial != serial or self._why is not None:
                return
            epoch = self._epoch + 1
            if crew.leave_behind(lambda: self._go_on(epoch, batch)):
                log.debug("a call takes long: using threads")
                self._epoch = epoch  # from here on, the reader is not the reader any more
                self._busy = False
                self._dispatching = True
                if off is not None:
                    self._carousel.leave_behind(self, off)
        finally:
            self._turn.release()

    def waits(self) -> bool:
        """Whether the calls of a long batch wait, by what was noted last time (for the Watch)."""
        serial, left = self.progress
        now = serial, -left, perf_counter(), *waiting.usage_of(self._reader)
        before, self._noted = self._noted, now
        if before[0] != serial:
            return False
        return waiting.wait(*[new - old for new, old in zip(now[1:], before[1:], strict=True)])

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
                # The call that is left behind may still use its payload.
                self.receiver.parser.detach()
                if requests and self._crew is not None:
                    self._crew.dispatch(requests)
        except Disconnect as end:
            self._finish(str(end))
            return
        except OSError as error:
            self.end(error.strerror or str(error))
            return
        except BaseException as failure:  # nobody would read, and nobody end the crew
            self.give_up(failure)
            return
        self._read(epoch)

    def calls_are_quick(self) -> None:
        """What was dispatched did not wait: run it where it is read, unless a layer declares."""
        if self._measured:
            self._dispatching = False

    @property
    def pieces_ready(self) -> int:
        """How many headers and payloads wait to be sent."""
        return len(self.runner.ready)

    @property
    def sending(self) -> bool:
        """Whether replies are on their way to the client, or stuck there."""
        return self.sender.sending or (self.off is not None and self.awaited == EPOLLOUT)

    @property
    def groups(self) -> bool:
        """Whether `run_group` is of any use."""
        return self.runner.groups

    @property
    def goodbye(self) -> bool:
        """The client has sent DISC: it has not just gone."""
        return self.runner.goodbye

    @goodbye.setter
    def goodbye(self, value: bool) -> None:
        self.runner.goodbye = value

    @property
    def busy(self) -> bool:
        """Whether the reader is running requests."""
        return self._busy

    @property
    def progress(self) -> tuple[int, int]:
        """Changes whenever the reader begins a request."""
        return self._serial, len(self._batch)


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
