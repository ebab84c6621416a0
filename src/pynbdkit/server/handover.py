"""How clients get from the process that accepts them to the one of several that serves them.

Between the two is a socket pair that keeps messages whole (SOCK_SEQPACKET). To the worker go
clients, each a number and a descriptor, and the word that credentials are to be read again; its end
means that the worker is to end in order, or that the sender has gone. Back come the worker's state,
and what it has taken: until then the sender keeps the client, and can hand it to another worker if
this one dies.

A message is one byte of kind, and then a number (`NUMBER`) or a text.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading

from .server import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from ..chain import Chain
    from .connection import Connection

CLIENT: Final = b"c"
"""To the worker: a client; its number, and the descriptor beside the message."""
RELOAD: Final = b"r"
"""To the worker: have the credentials read again."""
READY: Final = b"y"
"""From the worker: it can serve."""
FAILED: Final = b"f"
"""From the worker: it cannot; why."""
TAKEN: Final = b"t"
"""From the worker: it serves this client (a number) from now on."""
NOT_TAKEN: Final = b"n"
"""From the worker: it had no descriptor for this client (a number)."""
OPEN: Final = b"o"
"""From the worker: so many (a number) of its connections are open."""
SHUTDOWN: Final = b"s"
"""From the worker: a plugin or filter wants the whole server to stop."""
NUMBER: Final = struct.Struct("=Q")
LONGEST: Final = 4096
"""Bytes of a message; longer texts are cut."""
_DESCRIPTOR: Final = struct.Struct("=i")


def pair() -> tuple[socket.socket, Channel]:
    """The two ends: the sender's, which never waits, and the worker's. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, Channel(fileno=theirs.detach())


def hand(link: socket.socket, client: socket.socket, number: int) -> bool:
    """Send a client to a worker; False where that is not possible (now, or any more)."""
    message = CLIENT + NUMBER.pack(number)
    descriptor = _DESCRIPTOR.pack(client.fileno())
    try:
        link.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)])
    except OSError:
        return False
    return True


class Channel(socket.socket):
    """The worker's end: to a `Server`, a listening socket whose clients were accepted elsewhere.

    `number` is that of the last client. `on_end` and `on_reload` are called, in `accept`, for what
    is no client.
    """

    number: int
    on_end: Callable[[], None]
    on_reload: Callable[[], None]

    def accept(self) -> tuple[socket.socket, Any]:
        """A client. Raises BlockingIOError where it was none, OSError where it has no room."""
        room = socket.CMSG_SPACE(_DESCRIPTOR.size)
        try:
            message, extra, _, _ = self.recvmsg(LONGEST, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            message, extra = b"", []  # the sender has gone before it had read what we have told
        if message[:1] != CLIENT:
            if not message:
                self.on_end()
            elif message == RELOAD:
                self.on_reload()
            raise BlockingIOError
        for _, _, data in extra:
            if len(data) >= _DESCRIPTOR.size:
                (self.number,) = NUMBER.unpack(message[1:])
                self.tell(TAKEN + message[1:])
                return socket.socket(fileno=_DESCRIPTOR.unpack(data[: _DESCRIPTOR.size])[0]), None
        # The kernel has thrown the descriptor away: we have too many.
        self.tell(NOT_TAKEN + message[1:])
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def tell(self, message: bytes) -> None:
        """Send a message to whoever accepts; nothing happens where it has gone."""
        while True:
            try:
                self.send(message[:LONGEST])
                return
            except BlockingIOError:  # it never waits for us: so it will read
                poll = select.poll()
                poll.register(self, select.POLLOUT)
                poll.poll()
            except OSError:
                return


class WorkerServer(Server):
    """The server of one worker.

    What a plugin or filter ends is the whole server: `stop` tells it. `end` is for this worker
    alone. Connections have the numbers that they got where they were accepted.
    """

    def __init__(self, chain: Chain, channel: Channel, **options: Any) -> None:
        """`options`: those of `Server`."""
        super().__init__(chain, [channel], **options)
        self._channel = channel
        self._telling = threading.Lock()
        channel.on_end = self.end
        channel.on_reload = self.reload

    def stop(self) -> None:
        """Have all workers stop; safe in any thread."""
        self._channel.tell(SHUTDOWN)
        super().stop()

    def end(self) -> None:
        """Have this worker stop; safe in a signal handler and in any thread."""
        super().stop()

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        super().forget(connection)
        self._tell_open()

    def _accept(self, listener: socket.socket) -> bool:
        accepted = super()._accept(listener)
        self._tell_open()  # also where it was no use
        return accepted

    def _admit(self, sock: socket.socket) -> Connection:
        self._count = self._channel.number - 1
        return super()._admit(sock)

    def _tell_open(self) -> None:
        with self._telling:  # the last one is to be the last one
            self._channel.tell(OPEN + NUMBER.pack(self.connections))

    def _unload(self) -> None:
        """What was loaded before the fork is unloaded where it was loaded."""
