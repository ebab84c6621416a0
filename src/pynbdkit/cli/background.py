"""What a daemon needs: privileges dropped, the background, a pidfile, signals, the parent's end."""

from __future__ import annotations

import os
import signal

from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


def change_user(user: str | None, group: str | None) -> None:
    """Become another user and group, for good. Raises ConfigError where that fails.

    Arguments: names or numbers (-u, -g). Without a group, the user's own stays as it is now.
    """
    if group is not None:
        gid = _number("group", group)
        try:
            os.setgroups([])
            os.setgid(gid)
        except OSError as error:
            raise ConfigError(f"-g {group}: {error.strerror}") from None
    if user is not None:
        uid = _number("user", user)
        try:
            if group is None and os.geteuid() == 0:
                os.setgroups([])
            os.setuid(uid)
        except OSError as error:
            raise ConfigError(f"-u {user}: {error.strerror}") from None


def _number(what: str, name: str) -> int:
    import grp
    import pwd

    try:
        return pwd.getpwnam(name).pw_uid if what == "user" else grp.getgrnam(name).gr_gid
    except KeyError:
        if name.isascii() and name.isdigit():
            return int(name)
        raise ConfigError(f"-{what[0]} {name}: no such {what}, and not a number") from None


def fork_into_background(keep_stderr: bool) -> None:
    """Go on in a child of init; the parent exits 0. Threads must not exist yet."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if not keep_stderr:
        os.dup2(null, 2)
    if null > 2:
        os.close(null)


def write_pidfile(path: str) -> None:
    """Write our process id. Raises ConfigError."""
    try:
        with open(path, "w", encoding="ascii") as stream:
            stream.write(f"{os.getpid()}\n")
    except OSError as error:
        raise ConfigError(f"-P {path}: {error.strerror}") from None


def exit_with_parent() -> None:
    """Have the kernel send us SIGTERM when the parent ends (Linux). Raises ConfigError."""
    import ctypes

    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(1, signal.SIGTERM, 0, 0, 0) != 0:  # PR_SET_PDEATHSIG
        raise ConfigError(f"--exit-with-parent: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise SystemExit(0)  # it ended before we could ask


def on_signals(stop: Callable[[], None]) -> None:
    """SIGINT, SIGTERM and SIGQUIT call `stop`; a second one ends the process at once."""

    def first(number: int, _frame: FrameType | None) -> None:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(other, second)
        del number
        stop()

    def second(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, first)
