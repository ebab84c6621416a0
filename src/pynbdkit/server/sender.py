"""Sender: one connection's replies, to the client, in the order in which they became ready.

Replies gather in a list that others append to; whoever holds the lock here sends all of them, many
with one gather write.
"""

from __future__ import annotations

import os
import socket
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

LARGE_REPLY: Final = 16 << 10
"""Where data of so many bytes is sent, the socket is given more room."""
ROOM: Final = 512 << 10
"""How much a Unix socket takes that sends large replies: with what it takes by default (208 KiB,
socket(7)) the server waits within a reply of 256 KiB, and the client for what comes next."""
IOV_MAX: Final = min(os.sysconf("SC_IOV_MAX"), 1024)
"""Pieces of one send."""


class Sender:
    """Sends for one connection, from any thread."""

    def __init__(self, sock: socket.socket, ready: list[Any]) -> None:
        """`ready`: where replies are put, at the end; they are taken from its beginning."""
        self.sock = sock
        self._ready = ready
        self.lock = threading.Lock()
        """Whoever has it may send."""
        self._narrow = type(sock) is socket.socket and sock.family == socket.AF_UNIX

    @property
    def sending(self) -> bool:
        """Whether replies are on their way to the client, or stuck there."""
        return self.lock.locked()

    def send(self, wait: bool = True) -> None:
        """Send every reply that is ready. Raises OSError when the client is gone.

        `wait` is False: leave it to the thread that is sending already, if there is one.
        """
        ready = self._ready
        lock = self.lock
        while ready and lock.acquire(wait):
            try:
                pieces = self._take()
                if pieces:
                    self._send(pieces)
            finally:
                lock.release()

    def send_ready(self) -> None:
        """As `send`, without waiting for another thread that sends."""
        self.send(wait=False)

    def send_without_waiting(self) -> bool:
        """Send what the client takes now; False: there is more. Raises OSError. (Plain sockets.)"""
        ready = self._ready
        lock = self.lock
        while ready:
            if not lock.acquire(blocking=False):
                return False
            try:
                pieces = self._take()
                try:
                    sent = self.sock.sendmsg(pieces, (), socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                if sent < sum(map(len, pieces)):
                    ready[:0] = after(pieces, sent)  # others append only: this stays the beginning
                    return False
            finally:
                lock.release()
        return True

    def _take(self) -> list[Any]:
        """Take what is sent at once from what is ready (call it with the lock)."""
        ready = self._ready
        pieces = ready[:IOV_MAX]
        del ready[: len(pieces)]
        if self._narrow and pieces and len(pieces[-1]) >= LARGE_REPLY:
            self._widen()
        return pieces

    def _widen(self) -> None:
        """Have the socket take more at a time (of TCP's the kernel itself takes care)."""
        self._narrow = False
        if self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < ROOM:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)

    def _send(self, pieces: list[Any]) -> None:
        sent = self.sock.sendmsg(pieces)
        total = sum(map(len, pieces))
        while sent < total:  # a signal, or a socket that takes less
            total -= sent
            pieces = after(pieces, sent)
            sent = self.sock.sendmsg(pieces)


def after(pieces: list[Any], sent: int) -> list[Any]:
    """What is left of pieces after `sent` bytes."""
    for number, piece in enumerate(pieces):
        size = len(piece)
        if sent < size:
            rest = pieces[number:]
            if sent:
                rest[0] = memoryview(piece)[sent:]
            return rest
        sent -= size
    return []
