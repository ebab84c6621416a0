"""Watch: notices a request that holds up a connection's other requests.

One thread for the whole server. It looks every few milliseconds at the connections whose calls
declare nothing about waiting, and only while they are busy: when nothing has happened for a while
it sleeps until a reader wakes it.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from .transmission import Transmission

GATE_PATIENCE: Final = 0.002
"""Seconds that a batch waits for its turn at most."""
TICK: Final = 0.005
"""Seconds between looks: a call that lasts over one to two of them is left behind."""
PATIENCE: Final = 40
"""Looks without any progress to see before the watch sleeps."""


class Watch:
    """Calls `take_over` of a transmission whose reader is in one call for over a tick."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[Transmission, tuple[int, int]] = {}
        self._wakeup = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.several = False
        """Whether more than one connection is watched."""
        self.gate = threading.Lock()
        """Held while a batch of small requests runs, when there are several connections.

        A call that goes into the kernel gives up the interpreter's lock, another thread takes it,
        and to get it back costs more than the call. At the gate the others wait without wanting
        the interpreter. It is a matter of speed alone: whoever waits too long goes on without.
        """
        self.asleep = True
        """A reader that begins to work while this is true calls `wake`."""

    def add(self, transmission: Transmission) -> None:
        """Look at this connection too."""
        with self._lock:
            self._seen[transmission] = (-1, 0)
            self.several = len(self._seen) > 1
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
                self._thread.start()

    def remove(self, transmission: Transmission) -> None:
        """This connection has ended."""
        with self._lock:
            self._seen.pop(transmission, None)
            self.several = len(self._seen) > 1

    def wake(self) -> None:
        """Something has begun."""
        self.asleep = False
        self._wakeup.set()

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._wakeup.set()
        if thread is not None:
            thread.join()

    def _anyone_busy(self) -> bool:
        with self._lock:
            return any(transmission.busy for transmission in self._seen)

    def _run(self) -> None:
        quiet = 0
        pause = threading.Event()
        while not self._closed:
            if quiet >= PATIENCE:
                self._wakeup.clear()
                self.asleep = True
                # One may have begun before it could see us asleep; `close` may have been quicker.
                if not self._closed and not self._anyone_busy():
                    self._wakeup.wait()
                self.asleep = False
                quiet = 0
            pause.wait(TICK)
            quiet += 1
            with self._lock:
                seen = list(self._seen.items())
            for transmission, before in seen:
                now = transmission.progress
                if now != before:
                    quiet = 0
                    with self._lock:
                        if transmission in self._seen:
                            self._seen[transmission] = now
                elif transmission.busy:
                    quiet = 0
                    self.gate = threading.Lock()  # it may hold the old one
                    transmission.take_over()
