"""What a service needs: another user, the background, a pidfile, signals, the parent's end."""

from __future__ import annotations

import os
import signal
import sys

from .. import log
from ..errors import ConfigError, PynbdkitError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
KEYBOARD_SIGNALS: Final = (signal.SIGINT, signal.SIGQUIT)
LOOK_AT_PARENT: Final = 0.2
"""Seconds between looks at the parent, where the kernel cannot tell of its end."""


# -- privileges ------------------------------------------------------------------------------------


class Identity:
    """The user and group to become (-u, -g). Raises ConfigError for names that are unknown.

    With a group, that is the only one. With a user alone, the groups are the user's, so that none
    of root's is left; a user by a number that nobody has leaves the group as it is.
    """

    def __init__(self, user: str | None, group: str | None) -> None:
        self.uid = user_id(user) if user is not None else -1
        self.gid = group_id(group) if group is not None else -1
        self._user = user
        self._group = group

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.uid >= 0 or self.gid >= 0

    def take(self) -> None:
        """Become them, for good. Raises ConfigError where that fails."""
        option = f"-g {self._group}" if self._group is not None else f"-u {self._user}"
        try:
            self._take_groups()
            if self.uid >= 0:
                option = f"-u {self._user}"
                os.setuid(self.uid)
        except OSError as error:
            raise ConfigError(f"{option}: {error.strerror}") from None

    def _take_groups(self) -> None:
        groups, gid = [self.gid], self.gid
        if gid < 0:
            import pwd

            try:
                entry = pwd.getpwuid(self.uid)
                gid = entry.pw_gid
                groups = os.getgrouplist(entry.pw_name, gid)
            except KeyError:
                groups = []
        if os.geteuid() == 0:
            os.setgroups(groups)
        if gid >= 0 and (self.gid >= 0 or os.geteuid() == 0):
            os.setgid(gid)


def user_id(name: str) -> int:
    """The number of a user (-u). Raises ConfigError."""
    import pwd

    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return _number("user", name)


def group_id(name: str) -> int:
    """The number of a group (-g). Raises ConfigError."""
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return _number("group", name)


def _number(what: str, text: str) -> int:
    from ..parse import parse_int

    try:
        return parse_int(what, text, 0, (1 << 32) - 2)
    except ValueError:
        raise ConfigError(f"-{what[0]} {text}: no such {what}") from None


# -- the background --------------------------------------------------------------------------------


class Background:
    """The way into the background. The parent waits until the server is ready, so that it can
    tell a start that fails: its exit status is 0 only when clients can connect.
    """

    def __init__(self) -> None:
        self._tell = -1

    def fork(self, when_ready: Callable[[int], None]) -> None:
        """Go on in a child, in a session of its own, in "/", without stdin and stdout.

        The parent never returns: it ends with 0 after ``when_ready(child)``, or with 1. stderr
        stays until `ready`. Threads must not exist yet. Raises ConfigError.
        """
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # we may have been started with it ignored
        flush()
        hear, self._tell = os.pipe2(os.O_CLOEXEC)
        try:
            child = os.fork()
        except OSError as error:
            raise ConfigError(f"cannot go into the background: {error.strerror}") from None
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # see `HeldSignals`
            os.close(self._tell)
            status = 1
            try:
                status = _wait_until_ready(hear, child, when_ready)
                flush()
            finally:
                os._exit(status)  # what else a plugin has registered is for the child to do
        os.close(hear)
        os.setsid()
        os.chdir("/")
        _to_null(0, 1)

    def leave(self) -> None:
        """In a child of our own: it is not the one to tell."""
        os.close(self._tell)

    def drop_stderr(self) -> None:
        """Let go of stderr, which is whoever's who started us."""
        flush()
        _to_null(2)

    def ready(self, keep_stderr: bool) -> None:
        """Tell the parent that clients can connect. Raises ConfigError where it has gone."""
        if not keep_stderr:
            self.drop_stderr()
        try:
            os.write(self._tell, b"1")
        except OSError:
            raise ConfigError("whoever started the server has ended meanwhile") from None
        finally:
            os.close(self._tell)


def _wait_until_ready(hear: int, child: int, when_ready: Callable[[int], None]) -> int:
    try:
        if os.read(hear, 1):
            when_ready(child)
            return 0
        _, status = os.waitpid(child, 0)
    except PynbdkitError as error:
        log.error(str(error))
        os.kill(child, signal.SIGTERM)
        return 1
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        return 130
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        log.error(f"the server was killed by signal {-code} while it started")
    return code if code > 0 else 1


def _to_null(*fds: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def open_missing_stdio() -> None:
    """Open /dev/null in place of stdin, stdout and stderr where they are closed.

    Else the server's own descriptors would get their numbers, and be taken for them.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: this one
            os.set_inheritable(fd, True)


def flush() -> None:
    """Write out what was printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            pass  # nobody is left to read it


def write_pidfile(path: str, pid: int) -> None:
    """Write a process id. Raises ConfigError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, f"{pid}\n".encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(f"-P {path}: {error.strerror}") from None


# -- signals ---------------------------------------------------------------------------------------


class HeldSignals:
    """Where signals wait until we are ready for them."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers

    def __enter__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


def on_signals(stop: Callable[[int], bool], at_once: Callable[[], None]) -> None:
    """Have SIGINT, SIGTERM and SIGQUIT call ``stop(number)``; a second one ends the process.

    A signal for which `stop` is False does not count. `at_once` tidies up before the sudden end,
    which is a death by the signal.
    """
    stopping = False

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = stop(number)
            return
        at_once()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)


def from_keyboard(number: int) -> bool:
    """Whether a signal came from a terminal, which has sent it to our whole process group."""
    if number not in KEYBOARD_SIGNALS:
        return False
    try:
        fd = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False  # we have no terminal
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(fd)


class Parent:
    """The process that started us (--exit-with-parent); make it as early as possible."""

    def __init__(self) -> None:
        self._pid = os.getppid()
        try:
            self.fd = os.pidfd_open(self._pid)
            """Can be read when it has ended; -1 where only `has_ended` tells."""
        except (AttributeError, OSError):
            self.fd = -1  # an old kernel, or another one than Linux

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return os.getppid() != self._pid

    def close(self) -> None:
        """Forget about it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def watch(self) -> None:
        """Send ourselves SIGTERM when the parent has ended.

        PR_SET_PDEATHSIG would do that too, but also when only the parent's thread has ended, and
        the kernel forgets it when we change the user.
        """
        import threading

        threading.Thread(target=self._watch, name="parent", daemon=True).start()

    def _watch(self) -> None:
        import select
        import time

        if self.fd >= 0:
            poll = select.poll()
            poll.register(self.fd, select.POLLIN)
            while not self.has_ended:
                poll.poll()
        while not self.has_ended:
            time.sleep(LOOK_AT_PARENT)
        os.kill(os.getpid(), signal.SIGTERM)
