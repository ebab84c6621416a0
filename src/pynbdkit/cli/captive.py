"""--run: the server lives as long as a shell command (nbdkit-captive(1)).

The shell is started before the server gives up its privileges, so the command has those of the
user who called us; it waits at a gate until clients can connect, and ends there when the server's
start fails.
"""

from __future__ import annotations

import os
import signal
import threading

from .. import log
from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Final

SLICE: Final = 0.5
"""Seconds that a wait lasts at most, so that Python can run the handlers of signals."""


def quote(text: str) -> str:
    """A text as one word of a shell command."""
    return "'" + text.replace("'", "'\\''") + "'"


def script(command: str, variables: Mapping[str, str | None], gate: int) -> str:
    """What the shell runs: the gate (a descriptor), variables (None: unset), the command."""
    lines = [f"read -r _ <&{gate} || exit 1", f"exec {gate}<&-"]
    lines += [
        f"unset {name}" if value is None else f"{name}={quote(value)}"
        for name, value in variables.items()
    ]
    return "\n".join([*lines, command])


def _family(pid: int) -> list[int]:
    """A process and its descendants (where the kernel tells them)."""
    found = [pid]
    for each in found:
        try:
            with open(f"/proc/{each}/task/{each}/children", encoding="ascii") as stream:
                found += map(int, stream.read().split())
        except OSError:
            pass  # it has ended, or this is not Linux
    return found


def _free_digit() -> int:
    """A descriptor for the gate that the command does not get from whoever called us.

    A POSIX shell knows descriptors of one digit.
    """
    for fd in range(9, 2, -1):
        try:
            if not os.get_inheritable(fd):
                return fd
        except OSError:
            return fd
    return 9


class Captive:
    """A shell command that runs beside the server."""

    def __init__(self, command: str, variables: Mapping[str, str | None]) -> None:
        """Start the shell; `variables` are what the command sees. Raises ConfigError."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the exit status
        self._status = 1
        self._ended = threading.Event()
        gate = _free_digit()
        hear, self._open_gate = os.pipe2(os.O_CLOEXEC)
        try:
            self._pid = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", script(command, variables, gate)],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, hear, gate)],
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them
                setsigmask=[],  # ours wait (`HeldSignals`)
            )
        except OSError as error:
            raise ConfigError(f"--run: /bin/sh: {error.strerror}") from None
        finally:
            os.close(hear)

    def go(self, ended: Callable[[], None]) -> None:
        """Let the command run; `ended` is called, in another thread, when it has ended."""
        self.let_run()

        def wait() -> None:
            self._take(os.waitpid(self._pid, 0)[1])
            ended()

        threading.Thread(target=wait, name="run", daemon=True).start()

    def let_run(self) -> None:
        """Let the command run; `look` is to be called when a child has ended."""
        try:
            os.write(self._open_gate, b"\n")
        except OSError:
            pass  # a signal has ended the shell already
        self.close_gate()

    def look(self) -> bool:
        """Whether the command has ended, for who has no thread to wait for it."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self._take(status)
        return bool(pid)

    def _take(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            log.error(f"--run: the command was killed by signal {-code}")
        self._status = code if code >= 0 else 128 - code
        self._ended.set()

    @property
    def has_ended(self) -> bool:
        """Whether the command has ended."""
        return self._ended.is_set()

    def stop(self) -> None:
        """Tell the command to end: the shell, and whatever that waits for.

        By SIGTERM, whatever signal we got ourselves: a shell may miss a SIGINT while it forks.
        """
        if not self._ended.is_set():
            for pid in _family(self._pid):
                try:
                    os.kill(pid, signal.SIGTERM)
                except OSError:
                    pass  # it has just ended, or become another user

    def finish(self) -> int:
        """Wait for the command's end; returns its exit status (128 + signal, as shells have it)."""
        while not self._ended.wait(SLICE):
            pass  # a signal that came just before the wait is noticed now
        return self._status

    def abandon(self) -> None:
        """The server cannot serve: the command does not run, or is told to end."""
        if self._open_gate >= 0:
            self.close_gate()
            os.waitpid(self._pid, 0)
        else:
            self.stop()

    def close_gate(self) -> None:
        """Close our end of the gate: opened by no one, it lets nothing pass."""
        gate, self._open_gate = self._open_gate, -1
        if gate >= 0:
            os.close(gate)
