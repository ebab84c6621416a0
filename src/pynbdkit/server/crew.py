"""Crew: a connection's worker threads, for requests whose calls may wait.

The reader hands requests over with `dispatch`; the workers run them and answer as they end.
Threads start when there is work for them. What is in flight is bounded by number and by the bytes
of its payloads: beyond that `dispatch` waits, and so does the client.
"""

from __future__ import annotations

import threading
from time import perf_counter

from .. import log
from ..protocol.constants import CMD_DISC, CMD_READ, MAX_PAYLOAD
from ..session import set_current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

    from ..protocol.requests import Request
    from ..session import Session
    from .transmission import Transmission

BUDGET: Final = 32 << 20
"""Bytes of payload in flight per connection, when requests are dispatched (one may be larger)."""
QUICK_CALL: Final = 50e-6
"""Seconds per call under which dispatching stops paying."""
SMALL_REPLY: Final = 16 << 10
"""A worker may leave replies up to this many bytes to the thread that is sending."""
MANY_REPLIES: Final = 512
"""A worker waits to send when this many pieces are ready."""
SAMPLE: Final = 256
"""Calls after which it is judged whether dispatching pays."""


class Disconnect(Exception):
    """The client has gone, or asked to end (its text: why; "" where it did as it should)."""


class Crew:
    """A connection's worker threads: started when there is work, at most `limit` of them."""

    def __init__(self, transmission: Transmission, session: Session, name: str, limit: int) -> None:
        """`session` and `name` (for messages) are those of the connection."""
        from queue import SimpleQueue

        self._transmission = transmission
        self._session = session
        self._name = name
        self._limit = limit
        self._queue: Any = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Condition(threading.Lock())
        self._workers = 0
        self._bytes = 0
        self._inflight = 0
        self._closed = False
        self._calls = 0
        self._seconds = 0.0

    def dispatch(self, requests: Sequence[Request | None]) -> None:
        """Queue requests, waiting while too much is in flight. Raises Disconnect for DISC.

        None marks the end of a batch that another reader has left behind, and is passed over.
        """
        for request in requests:
            if request is None:
                continue
            flags, kind, cookie, offset, count, payload = request
            if kind == CMD_DISC:
                raise Disconnect("")
            weight = 0
            if payload is not None:
                weight = count
                request = (flags, kind, cookie, offset, count, memoryview(bytes(payload)))
            elif kind == CMD_READ and count <= MAX_PAYLOAD:
                weight = count
            with self._lock:
                while self._inflight and (
                    self._bytes + weight > BUDGET or self._inflight >= 4 * self._limit + 64
                ):
                    if self._closed:
                        raise Disconnect("")
                    self._lock.wait(1.0)
                self._bytes += weight
                self._inflight += 1
                wanted = self._inflight > self._workers and self._workers < self._limit
                if wanted:
                    self._workers += 1
            self._queue.put((request, weight))
            if wanted:
                self.start(self._work)

    def start(self, target: Callable[[], None]) -> None:
        """Run `target` in a thread that works for this connection."""
        thread = threading.Thread(target=self._in_thread, args=(target,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _in_thread(self, target: Callable[[], None]) -> None:
        set_current(self._session)
        log.set_name(self._name)
        target()

    def _work(self) -> None:
        transmission = self._transmission
        get = self._queue.get
        while True:
            item = get()
            if item is None:
                self._queue.put(None)
                return
            (flags, kind, cookie, offset, count, payload), weight = item
            started = perf_counter()
            try:
                transmission.run_request(flags, kind, cookie, offset, count, payload)
                seconds = perf_counter() - started
                if weight > SMALL_REPLY or transmission.pieces_ready > MANY_REPLIES:
                    transmission.send()  # waits when the client does not read: so do we
                else:
                    transmission.send_ready()
            except (OSError, MemoryError) as error:
                transmission.end(str(error))
                transmission.hang_up()
                seconds = 0.0
            with self._lock:
                self._bytes -= weight
                self._inflight -= 1
                self._seconds += seconds
                self._calls += 1
                if self._calls >= SAMPLE:
                    if self._seconds < QUICK_CALL * self._calls:
                        transmission.calls_are_quick()
                    self._calls, self._seconds = 0, 0.0
                self._lock.notify()

    def close(self) -> None:
        """No more requests will come: workers end when the queue is empty."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify_all()
        self._queue.put(None)

    def join(self) -> None:
        """Wait until every thread has ended."""
        while self._threads:
            self._threads.pop().join()
