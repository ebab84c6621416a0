"""-s: one client on stdin and stdout, a socket (inetd, libnbd) or two pipes."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import sys

from .. import session
from ..errors import ConfigError
from .listen import tune

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class _Direction:
    """One end of a pipe, which can be shut down while another thread waits for it."""

    def __init__(self, fd: int, event: int) -> None:
        self.fd = fd
        self.open = True
        self._event = event
        self._hear, self._tell = os.pipe2(os.O_CLOEXEC)

    def wait(self, seconds: float | None) -> None:
        """Return when the descriptor is ready, or the direction is shut down.

        Raises as a socket does when neither happens in time: TimeoutError, or BlockingIOError
        where no time is given at all.
        """
        poll = select.poll()
        poll.register(self.fd, self._event)
        poll.register(self._hear, select.POLLIN)
        if not poll.poll(None if seconds is None else seconds * 1000):
            if seconds:
                raise TimeoutError("timed out")
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def shutdown(self) -> None:
        """Let `wait` return from now on."""
        if self.open:
            self.open = False
            os.close(self._tell)

    def close(self) -> None:
        """Close the descriptor."""
        self.shutdown()
        os.close(self._hear)
        os.close(self.fd)


class Pipes:
    """Two descriptors with the few methods of a socket that a connection uses."""

    family = socket.AF_UNSPEC

    def __init__(self, read: int, write: int) -> None:
        """Take over two descriptors."""
        # Others may have the same pipe: `close` leaves it as it was.
        self._was_blocking = os.get_blocking(write)
        os.set_blocking(write, False)
        self._read = _Direction(read, select.POLLIN)
        self._write = _Direction(write, select.POLLOUT)
        self._closed = False
        self._timeout: float | None = None

    def settimeout(self, seconds: float | None) -> None:
        """How long one `recv_into` or `sendmsg` may wait; None: as long as it takes."""
        if seconds is not None and seconds < 0:
            raise ValueError("Timeout value out of range")
        self._timeout = seconds

    def gettimeout(self) -> float | None:
        """What `settimeout` was told."""
        return self._timeout

    def fileno(self) -> int:
        """The descriptor to wait for requests on."""
        return -1 if self._closed else self._read.fd

    def recv_into(self, buffer: memoryview | bytearray, nbytes: int = 0, flags: int = 0) -> int:
        """Read what there is; 0 at the end. Raises OSError, which TimeoutError is one of."""
        while self._read.open:
            self._read.wait(self._timeout)
            if self._read.open:
                try:
                    return os.readv(self._read.fd, [buffer])
                except BlockingIOError:
                    pass
        return 0

    def sendmsg(self, buffers: Sequence[bytes | bytearray | memoryview]) -> int:
        """Write; returns how many bytes were taken. Raises OSError, also TimeoutError."""
        while self._write.open:
            try:
                return os.writev(self._write.fd, buffers)
            except BlockingIOError:
                self._write.wait(self._timeout)
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def getpeername(self) -> None:
        """Pipes have no names."""
        return

    def shutdown(self, how: int) -> None:
        """Let nothing more be read (SHUT_RD), or nothing at all happen (SHUT_RDWR)."""
        self._read.shutdown()
        if how == socket.SHUT_RDWR:
            self._write.shutdown()

    def close(self) -> None:
        """Close both."""
        if not self._closed:
            self._closed = True
            os.set_blocking(self._write.fd, self._was_blocking)
            self._read.close()
            self._write.close()


def _same(first: os.stat_result, second: os.stat_result) -> bool:
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


def stdin_stdout() -> tuple[socket.socket, bool]:
    """The client on our stdin and stdout, and whether stderr is to be used for messages.

    From now on stdin is empty, and what anybody prints goes to stderr. Under inetd(8) stderr is
    the client's socket, too: it is closed then. Raises ConfigError.
    """
    try:
        ends = [os.fstat(0), os.fstat(1)]
    except OSError:
        raise ConfigError(
            "-s: the client is on stdin and stdout, but one of them is closed"
        ) from None
    session.stdio_is_taken = True
    if sys.stdout is not None:
        sys.stdout.flush()
    read, write = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    try:
        err = os.fstat(2)
        streams = stat.S_ISSOCK(err.st_mode) or stat.S_ISFIFO(err.st_mode)
        stderr_is_ours = not (streams and any(_same(err, end) for end in ends))
    except OSError:
        stderr_is_ours = False
    if not stderr_is_ours:
        os.dup2(null, 2)
    os.dup2(2, 1)
    os.close(null)
    if not (stat.S_ISSOCK(ends[0].st_mode) and _same(*ends)):
        return Pipes(read, write), stderr_is_ours  # type: ignore[return-value]
    os.close(write)
    sock = socket.socket(fileno=read)
    sock.setblocking(True)
    tune(sock)
    return sock, stderr_is_ours
