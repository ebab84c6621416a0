"""-s: one client on stdin and stdout, a socket (inetd) or two pipes."""

from __future__ import annotations

import os
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Pipes:
    """Two descriptors with the few methods of a socket that a connection uses."""

    family = socket.AF_UNSPEC

    def __init__(self, read: int, write: int) -> None:
        self._read = read
        self._write = write

    def fileno(self) -> int:
        """The descriptor to wait for requests on."""
        return self._read

    def recv_into(self, buffer: memoryview | bytearray) -> int:
        """Read what there is; 0 at the end."""
        return os.readv(self._read, [buffer])

    def sendmsg(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Write; returns how many bytes were taken."""
        return os.writev(self._write, buffers)

    def getpeername(self) -> None:
        """Pipes have no names."""
        return

    def shutdown(self, how: int) -> None:
        """A pipe cannot be shut down: the client's end decides."""
        del how

    def close(self) -> None:
        """Close both."""
        for fd in {self._read, self._write}:
            try:
                os.close(fd)
            except OSError:
                pass


def stdin_stdout() -> socket.socket:
    """The client on our stdin and stdout; what anybody prints from now on goes to stderr."""
    sys.stdout.flush()
    read, write = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    try:
        sock = socket.socket(fileno=read)
        sock.getsockname()
    except OSError:
        return Pipes(read, write)  # type: ignore[return-value]
    os.close(write)
    return sock
