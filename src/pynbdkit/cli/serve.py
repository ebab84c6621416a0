"""From a configured chain of layers to the server's end: `Service`.

The order is the peer's: TLS's files → get_ready → sockets → background → memory locked →
privileges dropped → after_fork → pidfile and URI → clients are served (nbdkit(1),
nbdkit-service(1)). Until clients are served, what goes wrong is said on stderr, and the exit status
is 1: also of a server in the background.
"""

from __future__ import annotations

import os
import signal
import sys

from .. import log
from ..errors import ConfigError
from ..server.listen import inherited
from ..server.server import Server
from . import background
from .encryption import encryption
from .options import UsageError
from .step import step
from .where import Where, unix_mode

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Final

    from ..chain import Chain
    from .captive import Captive
    from .options import CommandLine

TIMEOUT: Final = 120.0
"""Seconds for a client's handshake: a person who types one has them, and what is forgotten or
hostile does not keep its thread for good."""
MAX_TIMEOUT: Final = 1_000_000
"""Seconds; the system's calls count milliseconds with 31 bits."""
SWITCH_INTERVAL: Final = 0.001
"""A thread that computes gives way this often (seconds): others wait that long, not 5 ms."""

EXCLUDE_EACH_OTHER: Final = (
    ("-s", "-U"),
    ("-s", "-p"),
    ("-s", "--run"),
    ("-s", "--vsock"),
    ("-U", "-p"),
    ("-U", "--vsock"),
)


class Service:
    """What a command line asks for, apart from plugin and filters.

    Made before plugin and filters are loaded: it takes what was inherited (sockets, the client on
    stdin), and refuses options that contradict each other. Raises ConfigError.
    """

    def __init__(self, line: CommandLine) -> None:
        self._line = line
        self._activated = inherited()
        self._check_combination()
        self._threads = _number("--threads", line.threads, 16, 10_000)
        self._timeout = _seconds("--timeout", line.timeout, TIMEOUT)
        if line.unix_mode is not None:
            unix_mode(line.unix_mode)  # a mistake is said early
        self._mask = _number("--mask-handshake", line.mask_handshake, 0xFFFF, (1 << 32) - 1)
        self._identity = background.Identity(line.user, line.group)
        self._pidfile = os.path.abspath(line.pidfile) if line.pidfile else None
        self._parent = background.Parent() if line.exit_with_parent else None
        self._stderr_is_ours = True
        self._client: socket.socket | None = None
        if line.single:
            from ..server.single import stdin_stdout

            self._client, self._stderr_is_ours = stdin_stdout()
        background.open_missing_stdio()
        self._tls, self._credentials = encryption(line)
        self._stays = bool(
            line.foreground
            or line.run is not None
            or line.single
            or self._parent
            or self._activated
        )

    def _check_combination(self) -> None:
        line = self._line
        names = {
            "ipaddr": "-i",
            "port": "-p",
            "run": "--run",
            "single": "-s",
            "unix": "-U",
            "vsock": "--vsock",
        }
        given = [name for key, name in names.items() if line.options.get(key) is not None]
        if self._activated and given:
            raise UsageError(f"socket activation (LISTEN_FDS) excludes {given[0]}")
        for first, second in EXCLUDE_EACH_OTHER:
            if first in given and second in given:
                raise UsageError(f"{first} and {second} exclude each other")
        if line.unix_mode is not None and line.unix is None:
            raise UsageError("--unix-mode is for a Unix socket: it needs -U")

    def run(self, chain: Chain) -> int:
        """Serve to the end; returns the exit status. Raises what a step of the start raises."""
        line = self._line
        os.umask(0o022)
        step(chain.name, "get_ready", chain.get_ready)
        where = Where(line, self._activated, self._tls)
        captive: Captive | None = None
        needs_cleanup = False
        try:
            sockets = [] if self._client is not None else where.listen(self._identity)
            log.debug(f"listening on {where.uri('')}" if sockets else "the client is on stdin")
            server = Server(
                chain,
                sockets,
                readonly=bool(line.readonly),
                threads=self._threads,
                structured_replies=not line.no_sr,
                meta_contexts=not line.no_mc,
                extended_headers=not line.no_eh,
                handshake_mask=self._mask,
                oldstyle=bool(line.oldstyle),
                handshake_timeout=self._timeout,
                tls=self._tls,
                credentials=self._credentials,
            )
            if line.run is not None:
                from .captive import Captive

                captive = Captive(line.run, where.variables(line.exportname or ""))
            daemon = None
            if not self._stays:
                daemon = background.Background()
                daemon.fork(lambda pid: self._announce(where, pid))
            background.on_signals(lambda number: _stop(number, server, captive), where.remove)
            if self._credentials is not None:
                signal.signal(signal.SIGHUP, lambda number, frame: server.reload())
            if line.swap:
                from .system import lock_memory

                lock_memory(line.user)
            if self._identity.changes:
                from .preload import preload

                preload()
                self._identity.take()
            needs_cleanup = True
            step(chain.name, "after_fork", chain.after_fork)
            if daemon is None:
                self._announce(where, os.getpid())
            else:
                daemon.ready(keep_stderr=log.verbose or line.log == "stderr")
            log.use(line.log or ("stderr" if daemon is None and self._stderr_is_ours else "syslog"))
            if self._parent is not None:
                self._parent.watch()
            sys.setswitchinterval(SWITCH_INTERVAL)
            if captive is not None:
                captive.go(server.stop)
            needs_cleanup = False  # the server does it
            if self._client is not None:
                server.serve_one(self._client)
            else:
                server.run()
            return captive.finish() if captive is not None else 0
        except BaseException:
            if captive is not None:
                captive.abandon()
            if needs_cleanup:
                for failure in chain.cleanup():
                    log.exception("cleanup", failure)
            raise
        finally:
            where.remove()

    def _announce(self, where: Where, pid: int) -> None:
        """Say that clients can connect. Raises ConfigError."""
        if self._pidfile is not None:
            background.write_pidfile(self._pidfile, pid)
        uri = where.uri(self._line.exportname or "")
        if self._line.print_uri and uri and sys.stdout is not None:
            try:
                print(uri, flush=True)
            except OSError as error:
                raise ConfigError(f"--print-uri: {error.strerror}") from None


def _stop(number: int, server: Server, captive: Captive | None) -> bool:
    """A signal: the server ends, or the command that it lives for is told; False: it is not ours.

    What is typed at a terminal (Ctrl-C) reaches the command, too: whether that is its end is for
    the command to say, as with system(3).
    """
    if captive is None or captive.has_ended:
        server.stop()
    elif background.from_keyboard(number):
        return False
    else:
        captive.stop()
    return True


def _seconds(option: str, text: str | None, default: float) -> float:
    from ..parse import parse_delay

    if text is None:
        return default
    try:
        seconds = parse_delay(option, text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if seconds > MAX_TIMEOUT:
        raise UsageError(f"{option}: {text} is more than {MAX_TIMEOUT} seconds (0: no limit)")
    return seconds


def _number(option: str, text: str | None, default: int, high: int) -> int:
    from ..parse import parse_int

    if text is None:
        return default
    try:
        return parse_int(option, text, 0, high)
    except ValueError as error:
        raise UsageError(str(error)) from None
