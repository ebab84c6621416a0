"""Pulse: notices code that holds up the event loop, and says once which function that is.

A thread asks the loop for a sign of life every `TICK`, while anybody waits for the loop. Where none
comes, it looks at what the loop's thread is doing; if that is still the same a moment later, it is
no matter of a busy machine, and the log gets a line with the function's name.
"""

from __future__ import annotations

import sys
import threading

from . import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, Final

    from .loop import EventLoop

TICK: Final = 0.1
"""Seconds without a sign of life after which the loop counts as held up; what is slower than the
slowest request ought to be, and quicker than a client's patience."""
AGAIN: Final = 0.05
"""Seconds to the second look."""
MACHINERY: Final = ("asyncio", "uvloop", "threading", "contextvars", "concurrent", "pynbdkit")
"""Packages whose functions are not the plugin's."""


class Pulse:
    """Watches one `EventLoop`; sleeps while nobody waits for it."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._users: set[Any] = {loop}
        self._lock = threading.Lock()
        self._stirred = threading.Event()
        self._pause = threading.Event()  # set at the end
        self._sign = threading.Event()
        self._thread: threading.Thread | None = None
        self._named: set[object] = set()

    def add(self, user: Any) -> None:
        """Someone who has the loop work for him: `user.working` says whether he waits."""
        with self._lock:
            self._users.add(user)

    def remove(self, user: Any) -> None:
        """He does not any more."""
        with self._lock:
            self._users.discard(user)

    def stir(self) -> None:
        """The loop was given work."""
        if not self._stirred.is_set():
            with self._lock:
                if self._thread is None and not self._pause.is_set():
                    self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
                    self._thread.start()
            self._stirred.set()

    def close(self) -> None:
        """End the thread."""
        self._pause.set()
        self._stirred.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._stirred.wait()
            if self._pause.is_set():
                return
            self._sign.clear()
            self._loop.post(lambda _: self._sign.set(), None)
            if self._pause.wait(TICK):
                return
            if not self._sign.is_set():
                self._look()
                if not self._wait_for_sign():
                    return
            self._stirred.clear()  # first: who begins to wait after this says so
            with self._lock:
                if any(user.working for user in self._users) or self._pause.is_set():
                    self._stirred.set()

    def _wait_for_sign(self) -> bool:
        """Until the loop lives again; False: it is to end."""
        while not self._sign.wait(TICK):
            if self._pause.is_set():
                return False
        return True

    def _look(self) -> None:
        frame = self._plugins_frame()
        if frame is None or frame.f_code in self._named:
            return
        if self._sign.wait(AGAIN) or self._plugins_frame() is not frame:
            return
        code = frame.f_code
        self._named.add(code)
        log.warning(
            f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno}) holds up the event loop, and"
            " so all clients: await what takes long, or call it by asyncio.to_thread"
        )

    def _plugins_frame(self) -> FrameType | None:
        """The outermost of the loop's frames that is not of the machinery: None where it is idle.

        A coroutine's frame has those below it that it awaits: the innermost one would be some
        library's. The outermost is what the plugin's author knows.
        """
        found = None
        frame = sys._current_frames().get(self._loop.ident or 0)
        while frame is not None:
            if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in MACHINERY:
                found = frame
            frame = frame.f_back
        return found
