"""Server: one chain of layers, its listening sockets, and the connections that are open.

The same object serves the command line (which calls `run` in the main thread) and somebody's own
program (which calls `start`). Start and stop have an order: listeners open → `start`/`run` →
connections; `stop` → listeners closed → connections end → cleanup → unload.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time

from .. import log
from ..flags import ThreadModel
from ..session import stops
from .carousel import Carousel
from .listen import Complaints, accept, tune
from .watch import Watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from ..chain import Chain
    from ..tls import Credentials
    from .connection import Connection

SLICE = 0.1
"""Seconds between looks for a signal, while connections end; and between two attempts to accept,
where the system refuses: a connection that ends makes room, and networks come back."""
LEISURE = 5
"""Milliseconds without a client, after the start, until what clients need is loaded."""
STOP_PATIENCE = 10.0
"""Seconds that clients get, after `stop`, to take the replies that are due. Requests that run are
waited for, however long they take."""


class _NoLock:
    """In place of a lock, where none is needed."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _locks(thread_model: int) -> tuple[AbstractContextManager[Any], Any, Any]:
    """The locks of a thread model: (connection, request or None, control)."""
    nothing = _NoLock()
    if thread_model == ThreadModel.SERIALIZE_CONNECTIONS:
        return threading.Lock(), None, nothing
    if thread_model == ThreadModel.SERIALIZE_ALL_REQUESTS:
        lock = threading.RLock()
        return nothing, lock, lock
    return nothing, None, nothing


class Server:
    """Serves a configured chain on listening sockets.

    Arguments: `readonly` (-r); `threads` per connection (-t); `structured_replies` (False:
    --no-sr); `meta_contexts` (False: --no-mc); `extended_headers` (False: --no-eh);
    `handshake_mask` (--mask-handshake: bit 0 fixed newstyle, bit 1 no zeroes); `oldstyle` (-o);
    `handshake_timeout` in seconds (--timeout; 0: no limit); `tls` ("off", "on" or "require", with
    `credentials`, from which each connection takes the context of its TLS).
    """

    def __init__(
        self,
        chain: Chain,
        listeners: Sequence[socket.socket] = (),
        *,
        readonly: bool = False,
        threads: int = 16,
        structured_replies: bool = True,
        meta_contexts: bool = True,
        extended_headers: bool = True,
        handshake_mask: int = 3,
        oldstyle: bool = False,
        handshake_timeout: float = 0,
        tls: str = "off",
        credentials: Credentials | None = None,
    ) -> None:
        self.chain = chain
        self.readonly = readonly
        self.threads = threads or 16
        self.structured_replies = structured_replies
        self.meta_contexts = meta_contexts
        self.extended_headers = extended_headers
        self.handshake_mask = handshake_mask
        self.oldstyle = oldstyle
        self.handshake_timeout = handshake_timeout
        self.tls = tls
        self.credentials = credentials
        self.thread_model = chain.thread_model()
        self.connection_lock, self.request_lock, self.control_lock = _locks(self.thread_model)
        self.watch = Watch()
        self.carousel = Carousel()
        self.stopping = threading.Event()
        self._asked = False
        self._closes = False
        self._reload = False
        self._complain = Complaints()
        self._listeners = list(listeners)
        self._connections: set[Connection] = set()
        self._none_left = threading.Condition()
        self._count = 0
        self._only_one = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread: threading.Thread | None = None
        stops.append(self.stop)

    # -- starting and stopping -------------------------------------------------------------------

    def start(self) -> None:
        """`run` in a thread of its own; returns at once."""
        self._thread = threading.Thread(target=self.run, name="accept", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Accept connections until `stop`, then end everything in order."""
        # A signal that the kernel hands to another thread has to wake this one all the same.
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False) if in_main else 0
        try:
            self._accept_all()
        finally:
            self.stopping.set()
            try:
                self._end()
            finally:
                if in_main:
                    signal.set_wakeup_fd(before)
                self._close_wake()

    def serve_one(self, sock: socket.socket) -> None:
        """Serve a single connection, then end everything (-s)."""
        self._only_one = True
        self._admit(sock).thread.start()  # this thread waits, so that signals find it awake
        self.run()

    def stop(self) -> None:
        """Ask the server to stop; safe in a signal handler and from any thread."""
        self._asked = True  # a handler must not take the event's lock: we may be holding it
        self._wake()

    def reload(self) -> None:
        """Have the credentials read again, for new connections; safe in a signal handler."""
        self._reload = True
        self._wake()

    def close(self) -> None:
        """Stop, and return when everything has ended (after `start`).

        What was loaded is unloaded here, not in the thread that was started: the interpreters that
        plugins in C bring end only in the thread that they began in, which is most often this one.
        """
        self._closes = self._thread is not None
        self.stop()
        if self._thread is not None:
            self._thread.join()
            self._unload()

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        with self._none_left:
            self._connections.discard(connection)
            self._none_left.notify_all()
        if self._only_one:
            self.stop()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def _end(self) -> None:
        for listener in self._listeners:
            listener.close()
        with self._none_left:
            open_ones = list(self._connections)
        for connection in open_ones:
            connection.stop()
        with self._none_left:
            while not self._wait_for_none(STOP_PATIENCE):
                waiting = [each for each in self._connections if each.waits_for_client]
                self._none_left.wait(SLICE)  # one of them may just have begun to send
                stuck = sum(each.cut_off() for each in waiting if each in self._connections)
                if stuck:
                    log.warning(f"{stuck} client(s) do not take their replies: cut off")
                else:
                    log.debug(f"{len(self._connections)} connection(s) have requests running")
        self.watch.close()
        self.carousel.close()
        stops.remove(self.stop)
        for failure in self.chain.cleanup():
            log.exception("cleanup", failure)
        if not self._closes:
            self._unload()

    def _unload(self) -> None:
        for failure in self.chain.unload():
            log.exception("unload", failure)

    def _wait_for_none(self, seconds: float) -> bool:
        """Wait until no connection is left, in slices: a second signal is to be noticed."""
        deadline = time.monotonic() + seconds
        while self._connections and time.monotonic() < deadline:
            self._none_left.wait(SLICE)
        return not self._connections

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"x")
        except OSError:
            pass  # it was told before, or has ended

    def _close_wake(self) -> None:
        read, write = self._wake_read, self._wake_write
        self._wake_read = self._wake_write = -1  # a later `stop` must not write to a reused one
        os.close(read)
        os.close(write)

    # -- accepting -------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        resting = select.poll()
        resting.register(self._wake_read, select.POLLIN)
        by_fd = {listener.fileno(): listener for listener in self._listeners}
        for listener in self._listeners:
            listener.setblocking(False)
            poll.register(listener, select.POLLIN)
        leisure: int | None = LEISURE
        while not self._asked:
            self._reload_if_asked()
            ready = poll.poll(leisure)
            if not ready:  # nobody waits, and --run's command is none that ends at once
                from . import connection  # noqa: F401 (so that the first client need not wait)

                leisure = None
            for fd, _ in ready:
                if fd == self._wake_read:
                    os.read(fd, 4096)  # of a signal that did not stop us, perhaps
                elif not self._accept(by_fd[fd]):
                    resting.poll(SLICE * 1000)  # the client still waits: poll would not

    def _reload_if_asked(self) -> None:
        if self._reload:
            self._reload = False
            if self.credentials is not None:
                self.credentials.reload()

    def _accept(self, listener: socket.socket) -> bool:
        """Accept a client, if there is one; False if the system cannot at the moment."""
        sock, able = accept(listener, self._complain)
        if sock is None:
            return able
        connection = None
        try:
            sock.setblocking(True)
            tune(sock)
            connection = self._admit(sock)
            connection.thread.start()
        except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no thread
            why = str(error) if isinstance(error, RuntimeError) else log.describe(error)
            self._complain(f"cannot serve a client: {why}")
            sock.close()
            if connection is not None:
                self.forget(connection)
        return True

    def _admit(self, sock: socket.socket) -> Connection:
        self._count += 1
        from .connection import Connection  # after the start: see `_accept_all`

        connection = Connection(self, sock, self._count)
        with self._none_left:
            self._connections.add(connection)
        return connection
