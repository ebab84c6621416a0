"""Carousel: one thread that serves every connection that is busy with quick, small requests.

A thread for each connection is right as long as one of them is busy. Several busy ones want the
interpreter's lock all the time, and to hand it over costs more than a request. So when connections
are found busy in turn, their threads get on here (`ride`) and wait, while one thread receives, runs
and answers for all, a batch at a time of whoever has something to do. As it goes round, the
requests of the others gather, and batches grow. Replies that a client does not take at once wait
until it has made room for them, and so do its next requests.

A connection gets off, and its own thread goes on, when anything about it is not quick and small: a
large request, calls that wait, an end; when it is alone; and when nothing comes or goes for long.
"""

from __future__ import annotations

import os
import select
import threading
from time import monotonic

from .. import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from .transmission import Transmission

ALONE: Final = 2000
"""So many batches in turn of one connection: the others are silent, it gets off."""
SWEEP: Final = 2.0
"""Seconds between looks for silent connections."""


class Carousel:
    """The connections that one thread serves, and that thread."""

    def __init__(self) -> None:
        self.last: Transmission | None = None
        """Whose batch was run last, anywhere in the server."""
        self.connections = 0
        """How many are in their transmission phase (about: it is counted without a lock)."""
        self._lock = threading.Lock()
        self._riders: dict[int, Transmission] = {}  # by descriptor
        self._moved: set[int] = set()  # descriptors with something to do since the last sweep
        self._epoll: Any = None
        self._current: Transmission | None = None  # whose turn it is
        self._generation = 0  # grows when the thread is left behind in a call
        self._thread: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None
        self._closed = False
        self.available = hasattr(select, "epoll")

    def ride(self, transmission: Transmission) -> None:
        """Have a connection served here; returns when its thread has to go on by itself."""
        descriptor = transmission.fileno()
        with self._lock:
            if self._closed or not self.available or not self._ready_to_run():
                return
            off = transmission.get_on()
            self._riders[descriptor] = transmission
            try:
                self._epoll.register(descriptor, transmission.awaited)
            except OSError as error:  # the system looks at no more of them
                log.debug(f"a connection is served by its thread: {error}")
                del self._riders[descriptor]
                transmission.get_off()
                return
        off.acquire()

    def leave_behind(self, transmission: Transmission, off: threading.Lock) -> None:
        """The thread is in a call of this connection, for long: another one serves the others.

        `off` is what `Transmission.get_on` returned for this ride.
        """
        with self._lock:
            if transmission.off is not off or not self._take_off(transmission):
                return  # it has got off by itself
            if self._current is not transmission:  # the call has just ended
                transmission.get_off()
                return
            self._generation += 1
            self._thread = self._current = None
            if self._riders and not self._closed and not self._ready_to_run():
                self._let_all_off()

    def forget(self, transmission: Transmission) -> None:
        """A connection has ended."""
        self.connections -= 1
        if self.last is transmission:
            self.last = None

    def close(self) -> None:
        """End the thread; every connection has ended before."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
            if self._wake is not None:
                os.close(self._wake[1])
        if thread is not None:
            thread.join()
        if self._wake is not None:
            os.close(self._wake[0])
        if self._epoll is not None:
            self._epoll.close()

    def _ready_to_run(self) -> bool:
        """Have a thread (call it with the lock); False if the system has none for us."""
        try:
            if self._epoll is None:
                epoll = select.epoll()
                if self._wake is None:  # else it is there from an attempt that failed
                    self._wake = os.pipe2(os.O_CLOEXEC)
                epoll.register(self._wake[0], select.EPOLLIN)
                self._epoll = epoll
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, args=(self._generation,), name="carousel", daemon=True
                )
                thread.start()
                self._thread = thread
        except (OSError, RuntimeError, MemoryError) as error:
            log.debug(f"connections are served by a thread each: {error}")
            return False
        return True

    def _run(self, generation: int) -> None:
        try:
            self._go_round(generation)
        except BaseException as failure:  # a bug of ours: nobody must wait for us for ever
            with self._lock:
                self.available = False
                self._let_all_off()
            log.exception("carousel", failure)

    def _go_round(self, generation: int) -> None:
        poll = self._epoll.poll
        riders = self._riders
        alone, before, sweep = 0, -1, monotonic() + SWEEP
        while True:
            events = poll(SWEEP)
            if self._closed or self._generation != generation:
                return
            for descriptor, _ in events:
                transmission = riders.get(descriptor)
                if transmission is None:
                    continue  # it has got off meanwhile
                self.last = self._current = transmission
                awaited = transmission.turn()
                with self._lock:
                    left_behind = self._generation != generation
                    if not left_behind:
                        self._current = None
                        if not awaited:
                            self._let_off(transmission)
                        elif awaited != transmission.awaited:
                            self._await(transmission, awaited)
                if left_behind:
                    transmission.get_off()  # another thread serves the others; its own one waits
                    return
            if len(events) == 1 and events[0][0] == before:
                alone += 1
            else:
                alone, before = 0, events[0][0] if len(events) == 1 else -1
            if alone >= ALONE:
                alone = 0
                lonely = riders.get(before)
                if lonely is not None:
                    with self._lock:
                        self._let_off(lonely)
            self._moved.update(descriptor for descriptor, _ in events)
            if monotonic() >= sweep:
                sweep = monotonic() + SWEEP
                self._sweep()
                if self._rests(generation):
                    return

    def _sweep(self) -> None:
        """Let off who was silent since the last time."""
        moved, self._moved = self._moved, set()
        with self._lock:
            for transmission in [each for fd, each in self._riders.items() if fd not in moved]:
                self._let_off(transmission)

    def _rests(self, generation: int) -> bool:
        """Whether nobody rides: then nothing is left of us until somebody gets on again."""
        with self._lock:
            if self._riders or self._closed or self._generation != generation:
                return False
            self._thread = None
            self._epoll.close()
            self._epoll = None
            if self._wake is not None:
                for end in self._wake:
                    os.close(end)
                self._wake = None
            return True

    def _let_off(self, transmission: Transmission) -> None:
        """Its own thread goes on (call it with the lock), unless it was taken off before.

        What `leave_behind` has taken off may be on again soon, or not wait at all: with the lock
        nobody is let off who does not ride, and nobody rides who was let off.
        """
        if self._take_off(transmission):
            transmission.get_off()

    def _await(self, transmission: Transmission, awaited: int) -> None:
        """Wait for something else of a connection (call it with the lock), if it is still on."""
        descriptor = transmission.fileno()
        if self._riders.get(descriptor) is transmission:
            self._epoll.modify(descriptor, awaited)
            transmission.awaited = awaited

    def _let_all_off(self) -> None:
        """Nobody runs for them (call it with the lock); it needs no memory."""
        while self._riders:
            descriptor, transmission = self._riders.popitem()
            self._epoll.unregister(descriptor)
            transmission.get_off()

    def _take_off(self, transmission: Transmission) -> bool:
        """Whether it was on (call it with the lock)."""
        descriptor = transmission.fileno()
        if self._riders.get(descriptor) is not transmission:
            return False
        del self._riders[descriptor]
        self._epoll.unregister(descriptor)
        return True
