"""--run: the server lives as long as a shell command (nbdkit-captive(1))."""

from __future__ import annotations

import os
import signal
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Captive:
    """A shell command that runs beside the server."""

    def __init__(self, command: str, variables: Mapping[str, str]) -> None:
        """`variables` are shell variables that the command sees."""
        from shlex import quote

        lines = [f"{name}={quote(value)}" for name, value in variables.items()]
        self._script = "\n".join([*lines, command])
        self._pid = 0
        self._status = 1
        self._ended = threading.Event()

    def start(self, ended: Callable[[], None]) -> None:
        """Start the command; `ended` is called when it has ended."""
        self._pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", self._script],
            os.environ,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )

        def wait() -> None:
            _, status = os.waitpid(self._pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self._status = code if code >= 0 else 128 - code
            self._ended.set()
            ended()

        threading.Thread(target=wait, name="run", daemon=True).start()

    def finish(self) -> int:
        """The command's exit status; it is told to end if the server has ended first."""
        if not self._ended.is_set():
            try:
                os.kill(self._pid, signal.SIGTERM)
            except ProcessLookupError:
                pass  # it has just ended
        self._ended.wait()
        return self._status
