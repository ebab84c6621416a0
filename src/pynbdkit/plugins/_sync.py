"""SharedSync: many who want a sync, as few syncs as that takes.

A sync makes stable what was written before it *began*. So who comes while one runs must not be
answered by that one: what he speaks of may have been written behind its back. He gathers with all
others who come meanwhile, and the next sync, which begins when this one has ended, is for all of
them. However many they are, nobody waits for more than the rest of one sync and the whole of the
next.

Why a joined sync covers what its joiner speaks of: he comes (call it a), finds a round that gathers
(b), the round stops gathering (c), its sync begins (d), and a < b < c < d: (b) and (c) are ordered
by a lock, (c) and (d) are lines of one thread. What was written before (a) was written before (d).
"""

from __future__ import annotations

import errno
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class _Round:
    """One sync that has not begun, or runs: who waits for it, and how it went."""

    __slots__ = ("failure", "over")

    def __init__(self) -> None:
        self.over: threading.Event | None = None  # made by the first who waits
        self.failure: BaseException | None = None


class SharedSync:
    """Shares one sync among those who ask for it at the same time.

    Call it, from any thread; it returns when a sync that began after the call has succeeded.
    """

    def __init__(self, sync: Callable[[], object]) -> None:
        """`sync` makes stable all that was written before its call, or raises.

        Calls of it never overlap, so it may use one descriptor. What it raises, everybody is told
        for whom that call was, and nobody else: an error that is to last, it has to remember.
        """
        self._sync = sync
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # held while a sync runs
        self._gathering: _Round | None = None

    def __call__(self) -> None:
        """Return when all that was written before is stable. Raises what the sync raises.

        Of an exception of another thread, an OSError with its errno (EIO where it has none).
        """
        with self._lock:
            round_ = self._gathering
            if round_ is None:
                over = None
                round_ = self._gathering = _Round()
            else:
                over = round_.over
                if over is None:
                    over = round_.over = threading.Event()
        if over is None:
            self._lead(round_)
            return
        over.wait()
        if round_.failure is not None:
            raise _retold(round_.failure) from round_.failure

    def _lead(self, round_: _Round) -> None:
        try:
            with self._turn:
                with self._lock:
                    self._gathering = None  # who comes from here on wants the next one
                self._sync()
        except BaseException as failure:
            round_.failure = failure
            raise
        finally:
            if self._gathering is round_:  # interrupted before its turn
                with self._lock:
                    self._gathering = None
            if round_.over is not None:
                round_.over.set()


def _retold(failure: BaseException) -> OSError:
    """The same for another thread: a raised exception is one thread's, its traceback grows."""
    if isinstance(failure, OSError) and failure.errno is not None:
        return OSError(failure.errno, failure.strerror)
    return OSError(errno.EIO, f"the sync failed: {failure or type(failure).__name__}")
