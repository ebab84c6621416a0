"""Crew: a connection's worker threads, for requests whose calls may wait.

The reader hands requests over with `dispatch`; the workers run them and answer as they end.
Threads start when there is work for them. What is in flight is bounded by number and by the bytes
of its payloads: beyond that `dispatch` waits, and so does the client.
"""

from __future__ import annotations

import threading
from time import perf_counter, thread_time

from .. import log
from ..protocol.constants import CMD_DISC, CMD_FLAG_FUA, CMD_READ, CMD_WRITE, MAX_PAYLOAD
from ..session import set_current
from .receiver import Disconnect
from .waiting import quick

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

    from ..protocol.requests import Request
    from ..session import Session
    from .transmission import Transmission

BUDGET: Final = 32 << 20
"""Bytes of payload in flight per connection, when requests are dispatched (one may be larger)."""
SMALL_REPLY: Final = 16 << 10
"""A worker may leave replies up to this many bytes to the thread that is sending."""
MANY_REPLIES: Final = 512
"""A worker waits to send when this many pieces are ready."""
SAMPLE: Final = 256
"""Calls after which it is judged whether dispatching pays; more, where that was wrong lately."""
MAX_SAMPLE: Final = 1 << 14
LASTING: Final = 10.0
"""Seconds after which a judgement was right, if calls have not turned out to wait meanwhile."""


LEAD: Final = "lead"
"""In the queue: a worker is to lead (`Crew._lead`)."""


def weight_of(request: Request) -> int:
    """The bytes that a request keeps: its payload's, or those of what it reads."""
    kind, count = request[1], request[4]
    if request[5] is not None or (kind == CMD_READ and count <= MAX_PAYLOAD):
        return count
    return 0


def keeping_payload(request: Request) -> Request:
    """The request with a payload of its own, which stays when the parser's buffer is used again."""
    flags, kind, cookie, offset, count, payload = request
    if payload is None:
        return request
    return flags, kind, cookie, offset, count, memoryview(bytes(payload))


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
        self._left_behind = 0  # threads that were readers, in calls that take long
        self._bytes = 0
        self._inflight = 0
        self._held: list[tuple[Request, int]] = []  # writes with FUA that wait for the leader
        self._leading = False
        self._closed = False
        self._complained = False  # of threads that cannot be started: once is enough
        self._calls = 0
        self._seconds = 0.0
        self._cpu = 0.0
        self._sample = SAMPLE
        self._found_quick = -LASTING

    @property
    def reads(self) -> bool:
        """Whether it receives requests by itself."""
        return False

    def read(self) -> None:
        """It does not."""

    def dispatch(self, requests: Sequence[Request | None], grouped: bool = True) -> None:
        """Queue requests, waiting while too much is in flight. Raises Disconnect for DISC.

        None marks the end of a batch that another reader has left behind, and is passed over.
        Where the device can make writes with FUA stable together, they wait for the worker that
        leads (`_lead`), unless `grouped` is False.
        """
        grouped = grouped and self._transmission.groups
        for request in requests:
            if request is None:
                continue
            flags, kind, _, _, _, payload = request
            if kind == CMD_DISC:
                self._transmission.goodbye = True
                raise Disconnect("")
            weight = weight_of(request)
            request = keeping_payload(request)
            with self._lock:
                while self._inflight and (
                    self._bytes + weight > BUDGET or self._inflight >= 4 * self._limit + 64
                ):
                    if self._closed:
                        raise Disconnect("")
                    self._lock.wait(1.0)
                self._bytes += weight
                self._inflight += 1
                wanted = self._wants_worker()
            if grouped and kind == CMD_WRITE and flags == CMD_FLAG_FUA and payload is not None:
                with self._lock:
                    self._held.append((request, weight))
                    leads, self._leading = not self._leading, True
                if leads:
                    self._queue.put(LEAD)
            else:
                self._queue.put((request, weight))
            if wanted:
                self._start_worker()

    def leave_behind(self, target: Callable[[], None]) -> bool:
        """The reader stays in its call, `target` goes on in a new thread; False: it cannot."""
        if not self._start(target):
            return False
        with self._lock:
            self._left_behind += 1
        return True

    @property
    def working(self) -> bool:
        """Whether any request that was dispatched is not answered yet."""
        return self._inflight > 0

    def came_back(self) -> None:
        """A call that was left behind has ended: there is room for a worker again."""
        with self._lock:
            self._left_behind -= 1
            wanted = self._wants_worker()
        if wanted:
            self._start_worker()

    def _wants_worker(self) -> bool:
        """Whether to start a worker, which counts from now on (call it with the lock)."""
        threads = self._workers + self._left_behind
        wanted = self._inflight > self._workers and threads < self._limit
        if wanted:
            self._workers += 1
        return wanted

    def _start_worker(self) -> None:
        """Start a worker that counts already; where the system has none at all, work here."""
        if self._start(self._work):
            return
        with self._lock:
            self._workers -= 1
        self._work_here()

    def _start(self, target: Callable[[], None]) -> bool:
        thread = threading.Thread(target=self._in_thread, args=(target,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more of them
            if not self._complained:
                self._complained = True
                log.error(f"a thread cannot be started, fewer requests run at a time: {error}")
            return False
        with self._lock:
            if len(self._threads) > 2 * self._limit:
                self._threads = [other for other in self._threads if other.is_alive()]
            self._threads.append(thread)
        return True

    def _in_thread(self, target: Callable[[], None]) -> None:
        set_current(self._session)
        log.set_name(self._name)
        target()

    def _work(self) -> None:
        get = self._queue.get
        while True:
            item = get()
            if item is None:
                if self._is_last():
                    return
            elif self._left_behind and self._retire(item):
                return
            else:
                self._do(item)

    def _work_here(self) -> None:
        """Do what is queued in this thread, as long as there is no worker for it."""
        from queue import Empty

        while not self._workers:
            try:
                item = self._queue.get_nowait()
            except Empty:
                return
            if item is not None:
                self._do(item)
            elif self._is_last():
                return

    def _is_last(self) -> bool:
        """Put the end of the queue back; False: a leader has handed something back meanwhile."""
        self._queue.put(None)
        return bool(self._queue.qsize() <= 1)

    def _do(self, item: Any) -> None:
        """Run what was queued, and answer."""
        if item is LEAD:
            self._lead()
            return
        transmission = self._transmission
        (flags, kind, cookie, offset, count, payload), weight = item
        started, computed = perf_counter(), thread_time()
        try:
            size = transmission.run_request(flags, kind, cookie, offset, count, payload)
            seconds, cpu = perf_counter() - started, thread_time() - computed
            if size > SMALL_REPLY or transmission.pieces_ready > MANY_REPLIES:
                transmission.send()  # waits when the client does not read: so do we
            else:
                transmission.send_ready()
        except BaseException as error:  # a request that nobody answers is a client that waits
            transmission.give_up(error)
            seconds = cpu = 0.0
        self._done(1, weight, seconds, cpu)

    def _lead(self) -> None:
        """Make writes with FUA stable together, those that came during a sync by the next one."""
        transmission = self._transmission
        while True:
            with self._lock:
                held, self._held = self._held, []
                if not held:
                    self._leading = False
                    return
            started, computed = perf_counter(), thread_time()
            try:
                together = transmission.run_group([request for request, _ in held])
                transmission.send_ready()
            except BaseException as error:  # a request that nobody answers is a client that waits
                transmission.give_up(error)
                together = True
            if together:
                seconds, cpu = perf_counter() - started, thread_time() - computed
                self._done(len(held), sum(weight for _, weight in held), seconds, cpu)
            else:
                for item in held:
                    self._queue.put(item)

    def _done(self, count: int, weight: int, seconds: float, cpu: float) -> None:
        """`count` requests were answered; their calls took `seconds`, and computed for `cpu`."""
        with self._lock:
            self._bytes -= weight
            self._inflight -= count
            self._seconds += seconds
            self._cpu += cpu
            self._calls += count
            self._lock.notify()
            if self._calls < self._sample:
                return
            each, cpu = self._seconds / self._calls, self._cpu / self._calls
            self._calls, self._seconds, self._cpu = 0, 0.0, 0.0
        if quick(each, cpu):
            log.debug(f"calls take {each * 1e6:.0f} us: without threads")
            self._doubt()
            self._transmission.calls_are_quick()

    def _doubt(self) -> None:
        """Take twice as long to find calls quick, if it was found before and did not last."""
        now = perf_counter()
        again = now - self._found_quick < LASTING
        with self._lock:
            self._found_quick = now
            self._sample = min(2 * self._sample, MAX_SAMPLE) if again else SAMPLE

    def _retire(self, item: object) -> bool:
        """Hand `item` back and end: with the calls left behind we are more than the limit."""
        with self._lock:
            if self._closed or self._workers + self._left_behind <= self._limit:
                return False
            self._workers -= 1
            self._queue.put(item)
            return True

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
