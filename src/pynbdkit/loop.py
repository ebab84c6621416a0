"""EventLoop: the one event loop of a server, on which the coroutines of its plugin run.

It is made when the first coroutine comes, and asyncio is imported only then; it is uvloop's where
that is installed. It runs in a thread of its own, so that the connections' threads can hand it work
(`post`) and wait for it (`wait`), and so that all connections share it: a plugin's locks, sessions
and pools are those of all clients.

Until the server serves it may still fork, and no thread would survive that. So each `wait` before
`keep` has a thread that ends with it; the loop, and what is left pending in it, stays.

Whatever runs here can find its client: `session.current()` and the log's prefix look into the
running context (`Context`), which each request has of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextvars import ContextVar, copy_context

from . import log, session
from .pulse import Pulse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextvars import Context
    from typing import Any, Final

    from .session import Session

PATIENCE: Final = 5.0
"""Seconds that a plugin's own tasks get to end in, after they were cancelled."""

_client: ContextVar[tuple[Session | None, str]] = ContextVar("client", default=(None, ""))
"""Whom the running code works for, and the name of that in the log."""
session.find_session = lambda: _client.get()[0]
log.find_name = lambda: _client.get()[1]


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def context_for(client: Session | None, name: str) -> Context:
    """A context in which `session.current()` is `client`; each request runs in a copy of it."""
    context = copy_context()
    context.run(_client.set, (client, name))
    return context


class EventLoop:
    """A loop and its thread. All methods may be called from any other thread."""

    def __init__(self) -> None:
        self.loop = _new_loop()
        self.loop.set_exception_handler(_complain)
        self.pulse = Pulse(self)
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._posted = False  # the loop was told, and has not looked yet
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._kept = False
        self._closed = False
        self._calls: set[Any] = set()  # tasks of `wait`: the loop itself keeps none alive
        log.debug(f"event loop: {type(self.loop).__module__.partition('.')[0]}")

    @property
    def ident(self) -> int | None:
        """The identity of the thread that runs it; None where none does."""
        return self._thread.ident if self._thread is not None else None

    @property
    def working(self) -> bool:
        """Whether anybody waits for it."""
        return bool(self._calls)

    def keep(self) -> None:
        """The process will not fork any more: from now on the loop's thread stays."""
        self._kept = True

    def post(self, function: Callable[[Any], None], argument: Any) -> None:
        """Have the loop call function(argument), soon; what is posted together costs one wake-up.

        Only while it is sure to run: between a `wait` or `start` and `close`.
        """
        self._inbox.append((function, argument))
        if not self._posted:
            self._posted = True
            self.loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._posted = False  # first: what comes from now on wakes the loop again
        inbox = self._inbox
        while inbox:
            function, argument = inbox.popleft()
            function(argument)

    def wait(self, awaitable: Awaitable[Any]) -> Any:
        """Run something on the loop, for the client of this thread; returns what it returns.

        Raises what it raises; RuntimeError in the loop's own thread, which would wait for itself.
        """
        what = getattr(awaitable, "__qualname__", None) or type(awaitable).__name__
        if threading.get_ident() == self.ident:
            _discard(awaitable)
            raise RuntimeError(
                f"{what}: called in the event loop's own thread by something that is not"
                " asynchronous: the loop would wait for itself (await it there)"
            )
        context = context_for(session.current(), log.name())
        done = threading.Lock()
        done.acquire()
        result: list[Any] = []
        failure: list[BaseException] = []

        async def run() -> None:
            try:
                result.append(await awaitable)
            except asyncio.CancelledError as cancelled:
                # For us it is no end of our own, but the failure of somebody else's code.
                failure.append(RuntimeError(f"{what} was cancelled"))
                failure[0].__cause__ = cancelled
            except BaseException as error:
                failure.append(error)
            finally:
                done.release()

        if not self._kept:
            self._run_in_passing(run(), context)
        else:
            self.start()
            self.post(self._begin, (run(), context))
            self.pulse.stir()
            done.acquire()
        if failure:
            try:
                raise failure[0]
            finally:
                failure.clear()  # a traceback, this frame and the failure would keep each other
        return result[0]

    def _begin(self, call: tuple[Coroutine[Any, Any, None], Context]) -> None:
        coroutine, context = call
        task = self.loop.create_task(coroutine, context=context)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    def _run_in_passing(self, call: Coroutine[Any, Any, None], context: Context) -> None:
        def run() -> None:
            self.loop.run_until_complete(self.loop.create_task(call, context=context))

        with self._lock:
            self._thread = threading.Thread(target=run, name="event-loop", daemon=True)
            self._thread.start()
            self._thread.join()
            self._thread = None

    def start(self) -> None:
        """Start the thread, if it is not there; the process does not fork any more."""
        self._kept = True
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._closed:
                    thread = threading.Thread(target=self._run, name="event-loop", daemon=True)
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        while not self._closed:
            try:
                self.loop.run_forever()
            except BaseException as failure:  # sys.exit() in a task of the plugin's own
                log.exception("event loop", failure)

    def close(self) -> None:
        """End: the plugin's own tasks are cancelled, and waited for a little."""
        if self._closed:
            return
        self._kept = True
        self.pulse.close()
        for name in self.wait(self._end_tasks()):
            log.error(f"event loop: {name}, which the plugin left running, does not end")
        self.loop.set_exception_handler(lambda *_: None)  # it would say the same again
        self._closed = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        if self._thread is not None:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                log.error("event loop: the plugin holds it up: left behind")
                return
        self.loop.close()

    async def _end_tasks(self) -> list[str]:
        """Cancel what still runs; returns what does not end all the same."""
        tasks = {task for task in asyncio.all_tasks() if task not in self._calls}
        for task in tasks:
            task.cancel()
        if tasks:
            _, tasks = await asyncio.wait(tasks, timeout=PATIENCE)
        await self.loop.shutdown_asyncgens()
        return [getattr(task.get_coro(), "__qualname__", repr(task)) for task in tasks]


def _discard(awaitable: object) -> None:
    """Something is never to be awaited: no warning about that, after the error that says why."""
    close = getattr(awaitable, "close", None)
    if close is not None:
        close()


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What goes wrong in a task that nobody waits for: to the log."""
    failure = context.get("exception")
    message = f"event loop: {context.get('message', 'something went wrong')}"
    if isinstance(failure, BaseException):
        log.exception(message, failure)
    else:
        log.error(message)
