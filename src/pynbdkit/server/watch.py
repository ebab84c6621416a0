"""Watch: notices requests that hold up a connection's other requests.

That is one call that takes long, or a batch of calls that wait a little each, one after the other.
One thread for the whole server. It looks every few milliseconds at the connections whose calls
declare nothing about waiting, and only at those that were busy lately: when there is none, it
sleeps until a reader wakes it.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from .transmission import Transmission

TICK: Final = 0.005
"""Seconds between looks: a call that lasts over one to two of them is left behind."""
PATIENCE: Final = 40
"""Looks without anything to see before a connection is not looked at any more."""


class Watch:
    """Calls `take_over` of a transmission whose reader is in one call for over a tick.

    A connection is looked at from its `look_at` until it has done nothing for `PATIENCE` looks: a
    thousand idle ones cost the busy ones nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[Transmission, tuple[tuple[int, int], int]] = {}  # progress, quiet looks
        self._wakeup = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def look_at(self, transmission: Transmission) -> None:
        """This connection, which was not `watched`, is busy (it says so first)."""
        with self._lock:
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="watch", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system has no more of them: the next batch tries again
                    return
                self._thread = thread
            transmission.watched = True
            self._seen[transmission] = ((-1, 0), 0)
            self._wakeup.set()

    def remove(self, transmission: Transmission) -> None:
        """This connection has ended."""
        with self._lock:
            self._seen.pop(transmission, None)

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._wakeup.set()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            self._wakeup.wait()
            if self._closed:
                return
            pause.wait(TICK)
            with self._lock:
                seen = list(self._seen.items())
                if not seen and not self._closed:
                    self._wakeup.clear()
            for transmission, before in seen:
                self._look(transmission, *before)

    def _look(self, transmission: Transmission, before: tuple[int, int], quiet: int) -> None:
        now = transmission.progress
        moves, busy = now != before, transmission.busy
        quiet = 0 if moves or busy else quiet + 1
        with self._lock:
            if transmission not in self._seen:
                return  # it has ended
            self._seen[transmission] = (now, quiet)
            if quiet >= PATIENCE:
                # It may have begun before it could see that nobody looks any more.
                transmission.watched = False
                if transmission.busy:
                    transmission.watched = True
                else:
                    del self._seen[transmission]
        if busy and (not moves or (now[0] == before[0] and transmission.waits())):
            transmission.take_over()
