"""--workers: several processes serve one disk, so that several processors do.

This process, the supervisor, is the one that the user sees: it has the sockets, the pidfile's
number, the signals and the exit status. It makes everything ready, then forks the workers, and
forks another one where one has died. It accepts clients and hands each to the worker with the
fewest (`handover.py`): were the workers to accept for themselves, whoever is awake would take two
where another has none, and a client's connections would share a processor after all.

It has no threads, because a fork copies only one of them; what else threads would do, waiting for
the command of --run or for the parent's end, is done in its loop. A worker learns from the end of
its channel that it is to end, however the supervisor has come to its own end.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import threading
import time

from .. import log
from ..errors import ConfigError
from ..processors import usable
from ..server import handover
from ..server.handover import NUMBER, Channel, WorkerServer
from ..server.listen import Complaints, accept
from ..server.server import SLICE
from . import background
from .step import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType
    from typing import Any, Final

    from ..chain import Chain
    from ..tls import Credentials
    from .captive import Captive

MOST: Final = 1024
"""Workers that can be asked for."""
MOST_HANDED: Final = 32
"""Clients that a worker may have been handed and not taken as yet: they fit into its channel."""
AT_ONCE: Final = 1.0
"""Seconds: a worker that lives for less has died at once."""
TOO_OFTEN: Final = 10
"""Workers in a row that died at once, after which there is no sense in trying on."""
SIGNALS: Final = (*background.STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD)


def number_of(text: str | None) -> int:
    """What --workers says. Raises UsageError."""
    from ..parse import parse_int
    from .options import UsageError

    if text is None:
        return 1
    if text == "auto":
        return min(usable(), MOST)
    try:
        return parse_int("--workers", text, 0, MOST) or min(usable(), MOST)
    except ValueError as error:
        raise UsageError(f"{error}: expecting a number, or auto") from None


# -- a worker --------------------------------------------------------------------------------------


class Work:
    """What a worker does, from the fork to its exit status.

    Arguments: the chain, which is ready but for after_fork; `swap` (--swap); `options` of its
    Server; `settled` is called when it can serve (where its messages go from then on).
    """

    def __init__(
        self, chain: Chain, options: Mapping[str, Any], swap: bool, settled: Callable[[], None]
    ) -> None:
        self._chain = chain
        self._options = options
        self._swap = swap
        self._settled = settled

    def run(self, channel: Channel) -> int:
        """Serve to the end; signals are blocked when it is called. Returns the exit status."""
        server = WorkerServer(self._chain, channel, **self._options)

        def end(number: int, _frame: FrameType | None) -> None:
            if not background.from_keyboard(number):  # which the supervisor has, too
                server.end()

        for number in background.STOP_SIGNALS:
            signal.signal(number, end)
        if server.credentials is not None:
            signal.signal(signal.SIGHUP, lambda number, frame: server.reload())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            if self._swap:
                from .system import lock_memory

                lock_memory()  # a child does not inherit it
            step(self._chain.name, "after_fork", self._chain.after_fork)
        except Exception as failure:
            channel.tell(handover.FAILED + log.describe(failure).encode(errors="replace"))
            for other in self._chain.cleanup():
                log.exception("cleanup", other)
            return 1
        channel.tell(handover.READY)
        self._settled()
        server.run()
        return 0


class _Worker:
    """A worker, as the supervisor knows it."""

    def __init__(self, number: int, pid: int, link: socket.socket) -> None:
        self.number = number
        self.pid = pid
        self.link: socket.socket | None = link
        """None: it takes no more clients."""
        self.begun = time.monotonic()
        self.ready = False
        self.failure = ""
        """Why it cannot serve."""
        self.handed: dict[int, socket.socket] = {}
        """The clients that it has been sent, until it says that it has them."""
        self.open = 0
        self.total = 0
        self.rests_until = 0.0

    @property
    def load(self) -> tuple[int, int]:
        """The fewest clients; of those alike, the fewest until now."""
        return self.open + len(self.handed), self.total


# -- the supervisor --------------------------------------------------------------------------------


class Supervisor:
    """The process that has the sockets, and the workers.

    `start` comes first; when it has returned, and `run` is called, clients are served. `abandon` is
    for a start that fails. `close_in_worker` is called in each worker, for what is the supervisor's
    alone.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        count: int,
        work: Work,
        close_in_worker: Callable[[], None],
        *,
        credentials: Credentials | None = None,
        captive: Captive | None = None,
        parent: background.Parent | None = None,
    ) -> None:
        self._listeners = list(listeners)
        self._count = count
        self._work = work
        self._close_in_worker = close_in_worker
        self._credentials = credentials
        self._captive = captive
        self._parent = parent
        self._workers: list[_Worker] = []
        self._missing: dict[int, float] = {}
        """Numbers of workers that there should be, and since when (or from when on)."""
        self._waiting: list[tuple[int, socket.socket]] = []
        """Clients that were accepted and have no worker."""
        self._clients = 0
        self._rests_until = 0.0
        self._complain = Complaints()
        self._early = 0
        self._status = 0
        self._asked = self._reload = self._child_ended = False
        self._started = self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def start(self) -> None:
        """Fork the workers; return when all are ready. Raises ConfigError where one cannot be."""
        if threading.active_count() > 1:
            raise ConfigError(
                "--workers: a thread runs already, which the workers would not have: it has to be"
                " started in after_fork"
            )
        from ..server import connection  # noqa: F401 (loaded once: the workers share its memory)

        signal.signal(signal.SIGCHLD, self._on_child)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in range(1, self._count + 1):
            self._fork(number)
        while not all(worker.ready for worker in self._workers):
            self._turn()
        self._started = True

    def run(self) -> int:
        """Accept clients until `stop`, and end everything in order; returns the exit status.

        Where there is a command (--run), it has ended, too.
        """
        if self._captive is not None:
            self._captive.let_run()
            self._child_ended = True  # it may have been killed while it waited
            self._wake()
        try:
            while True:
                if self._asked and not self._stopping:
                    self._begin_to_stop()
                if self._reload:
                    self._reload_credentials()
                captive = self._captive
                over = self._stopping and not self._workers
                if over and (captive is None or captive.has_ended):
                    return self._status
                self._turn()
        finally:
            self._close()

    def stop(self) -> None:
        """Ask for the end; safe in a signal handler."""
        self._asked = True
        self._wake()

    def reload(self) -> None:
        """Have the credentials read again, for new connections; safe in a signal handler."""
        self._reload = True
        self._wake()

    def kill(self) -> None:
        """End the workers at once; safe in a signal handler."""
        for worker in self._workers:
            try:
                os.kill(worker.pid, signal.SIGKILL)
            except OSError:
                pass  # it has just been reaped

    def abandon(self) -> None:
        """The start has failed: end the workers in order, and wait for that."""
        self._begin_to_stop()
        for worker in self._workers:
            self._disconnect(worker)
            os.waitpid(worker.pid, 0)
        self._workers.clear()
        self._close()

    # -- one turn of the loop --------------------------------------------------------------------

    def _turn(self) -> None:
        """Wait for something to happen, and see to it."""
        now = time.monotonic()
        for number in [number for number, when in self._missing.items() if when <= now]:
            del self._missing[number]
            self._fork(number)
        self._place(now)
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        for worker in self._workers:
            if worker.link is not None:
                poll.register(worker.link, select.POLLIN)
        accepting = self._listeners if self._can_accept(now) else []
        for listener in accepting:
            poll.register(listener, select.POLLIN)
        events = dict(poll.poll(self._patience(poll, now)))
        if self._wake_read in events:
            os.read(self._wake_read, 4096)
        for worker in self._workers:
            if worker.link is not None and worker.link.fileno() in events:
                self._hear(worker)
        self._look_at_children()
        self._look_at_parent()
        for listener in accepting:
            if listener.fileno() in events:
                self._accept(listener)

    def _patience(self, poll: select.poll, now: float) -> float | None:
        """How long to wait at most, in milliseconds; the parent is another thing to wait for."""
        parent = self._parent
        wait = None
        if parent is not None and not self._asked:
            if parent.fd >= 0:
                poll.register(parent.fd, select.POLLIN)
            else:
                wait = background.LOOK_AT_PARENT
        if self._missing or self._waiting or self._rests_until > now:
            wait = SLICE
        return None if wait is None else wait * 1000

    def _look_at_parent(self) -> None:
        if self._parent is not None and not self._asked and self._parent.has_ended:
            os.kill(os.getpid(), signal.SIGTERM)
            self._parent = None

    def _look_at_children(self) -> None:
        if not self._child_ended:
            return
        self._child_ended = False
        for worker in list(self._workers):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                self._buried(worker, os.waitstatus_to_exitcode(status))
        if self._captive is not None and not self._captive.has_ended and self._captive.look():
            self.stop()

    def _on_child(self, _number: int, _frame: FrameType | None) -> None:
        self._child_ended = True

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"x")
        except OSError:
            pass  # it was told before, or has ended

    def _begin_to_stop(self) -> None:
        """No more clients; the workers finish what they have, and end."""
        self._stopping = True
        self._missing.clear()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for _, client in self._waiting:
            client.close()
        self._waiting.clear()
        for worker in self._workers:
            if worker.link is not None:
                try:
                    worker.link.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it has ended itself

    def _reload_credentials(self) -> None:
        self._reload = False
        # Whatever is wrong is said here, once.
        if self._credentials is None or not self._credentials.reload():
            return
        for worker in self._workers:
            if worker.link is not None:
                try:
                    worker.link.send(handover.RELOAD)
                except OSError:
                    pass  # it has ended: the next one has them from us

    def _close(self) -> None:
        signal.set_wakeup_fd(-1)
        fds = self._wake_read, self._wake_write
        self._wake_read = self._wake_write = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    # -- clients ---------------------------------------------------------------------------------

    def _can_accept(self, now: float) -> bool:
        return (
            self._started
            and not self._asked
            and not self._waiting
            and self._rests_until <= now
            and self._freest(now) is not None
        )

    def _freest(self, now: float) -> _Worker | None:
        """The worker for the next client; None while none can take it."""
        found = [
            worker
            for worker in self._workers
            if worker.ready
            and worker.link is not None
            and len(worker.handed) < MOST_HANDED
            and worker.rests_until <= now
        ]
        return min(found, key=lambda worker: worker.load) if found else None

    def _accept(self, listener: socket.socket) -> None:
        client, able = accept(listener, self._complain)
        if not able:
            self._rests_until = time.monotonic() + SLICE  # connections that end make room
        if client is None:
            return
        self._clients += 1
        self._waiting.append((self._clients, client))
        self._place(time.monotonic())

    def _place(self, now: float) -> None:
        """Hand the clients that wait to workers."""
        while self._waiting:
            worker = self._freest(now)
            if worker is None or worker.link is None:
                return
            number, client = self._waiting[0]
            if handover.hand(worker.link, client, number):
                del self._waiting[0]
                worker.handed[number] = client
                worker.total += 1
            else:
                worker.rests_until = now + SLICE

    # -- workers ---------------------------------------------------------------------------------

    def _fork(self, number: int) -> None:
        """Fork a worker. Raises ConfigError for the first ones; later ones are tried again."""
        try:
            link, channel = handover.pair()
        except OSError as error:
            self._cannot_fork(number, error)
            return
        background.flush()  # or it would be printed by both
        try:
            with background.HeldSignals(SIGNALS):
                pid = os.fork()
                if pid == 0:
                    self._be_a_worker(link, channel)
        except OSError as error:
            link.close()
            self._cannot_fork(number, error)
            return
        finally:
            channel.close()
        self._workers.append(_Worker(number, pid, link))

    def _be_a_worker(self, link: socket.socket, channel: Channel) -> None:
        """The child's part: it does not return."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            atexit._clear()  # what was registered before is for the supervisor to do
            link.close()
            for worker in self._workers:
                if worker.link is not None:
                    worker.link.close()
                for client in worker.handed.values():
                    client.close()
            for _, client in self._waiting:
                client.close()
            for listener in self._listeners:
                listener.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._close_in_worker()
            status = self._work.run(channel)
        except BaseException as failure:
            log.exception("worker", failure)
        finally:
            try:
                atexit._run_exitfuncs()
                background.flush()
            finally:
                os._exit(status)

    def _cannot_fork(self, number: int, error: OSError) -> None:
        text = f"--workers: cannot fork worker {number}: {error.strerror}"
        if not self._started:
            raise ConfigError(text)
        self._replace(number, text, early=True)

    def _hear(self, worker: _Worker) -> None:
        """Read all that a worker has told."""
        while worker.link is not None:
            try:
                message = worker.link.recv(handover.LONGEST)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it has ended with clients unread; what it told before is there still
            except OSError:
                message = b""
            if not message:
                self._disconnect(worker)
                return
            self._told(worker, message[:1], message[1:])

    def _told(self, worker: _Worker, kind: bytes, rest: bytes) -> None:
        if kind == handover.READY:
            worker.ready = True
            log.debug(f"worker {worker.number} is ready: process {worker.pid}")
        elif kind == handover.FAILED:
            worker.failure = rest.decode(errors="replace")
        elif kind == handover.SHUTDOWN:
            self.stop()
        elif kind == handover.OPEN:
            (worker.open,) = NUMBER.unpack(rest)
        else:
            (number,) = NUMBER.unpack(rest)
            client = worker.handed.pop(number)
            if kind == handover.TAKEN:
                client.close()
                worker.open += 1
            else:
                worker.rests_until = time.monotonic() + SLICE
                self._take_back([(number, client)])

    def _disconnect(self, worker: _Worker) -> None:
        """A worker takes no more clients: those that it has not taken are for the others."""
        if worker.link is not None:
            worker.link.close()
            worker.link = None
        handed, worker.handed = worker.handed, {}
        self._take_back(list(handed.items()))

    def _take_back(self, clients: list[tuple[int, socket.socket]]) -> None:
        if self._stopping:
            for _, client in clients:
                client.close()
        else:
            self._waiting = sorted(clients + self._waiting, key=lambda pair: pair[0])

    def _buried(self, worker: _Worker, code: int) -> None:
        """A worker has ended, by itself or because it was told to."""
        self._hear(worker)
        self._disconnect(worker)
        self._workers.remove(worker)
        who = f"worker {worker.number} (process {worker.pid})"
        if worker.failure:
            text = worker.failure
        elif code < 0:
            text = f"{who} was killed by signal {-code}"
        else:
            text = f"{who} has ended with status {code}"
        if code and worker.open:
            text += f", and with it {worker.open} connection(s)"
        if self._asked or self._stopping:
            if code:
                log.error(text)
                self._status = 1
        elif not self._started:
            raise ConfigError(text)
        else:
            self._replace(worker.number, text, time.monotonic() - worker.begun < AT_ONCE)

    def _replace(self, number: int, text: str, early: bool) -> None:
        """Have another worker with this number, unless that has been tried too often."""
        self._early = self._early + 1 if early else 0
        if self._early >= TOO_OFTEN:
            log.error(f"{text}: the last {TOO_OFTEN} workers have ended at once; giving up")
            self._status = 1
            self.stop()
            return
        log.error(f"{text}: another worker takes its place")
        self._missing[number] = time.monotonic() + (SLICE if early else 0)
