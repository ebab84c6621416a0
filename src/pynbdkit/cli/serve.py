"""From a configured chain of layers to the server's end: `Service`.

The order is the peer's: TLS's files → get_ready → sockets → background → memory locked →
privileges dropped → after_fork → pidfile and URI → clients are served (nbdkit(1),
nbdkit-service(1)). With --workers, these are forked before after_fork. Until clients are served,
what goes wrong is said on stderr, and the exit status is 1: also of a server in the background.
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
    from collections.abc import Sequence
    from typing import Any, Final

    from ..chain import Chain
    from .captive import Captive
    from .options import CommandLine
    from .workers import Supervisor

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
        self._workers = 1
        if line.workers not in (None, "1"):
            from .workers import number_of

            self._workers = number_of(line.workers)
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
        if line.single and line.workers not in (None, "1"):
            raise UsageError("-s and --workers exclude each other: -s serves one client")
        if line.unix_mode is not None and line.unix is None:
            raise UsageError("--unix-mode is for a Unix socket: it needs -U")

    def run(self, chain: Chain) -> int:
        """Serve to the end; returns the exit status. Raises what a step of the start raises."""
        line = self._line
        os.umask(0o022)
        if line.workers not in (None, "1"):
            chain.check_workers()  # also where there is one processor: elsewhere there are more
        step(chain.name, "get_ready", lambda: chain.get_ready(self._workers))
        where = Where(line, self._activated, self._tls)
        captive: Captive | None = None
        serving: OneProcess | Supervisor | None = None
        try:
            # Who sees the socket may stop us at once.
            with background.HeldSignals(background.STOP_SIGNALS):
                sockets = [] if self._client is not None else where.listen(self._identity)
                log.debug(f"listening on {where.uri('')}" if sockets else "the client is on stdin")
                if line.run is not None:
                    from .captive import Captive

                    captive = Captive(line.run, where.variables(line.exportname or ""))
                daemon = None if self._stays else background.Background()
                if self._workers > 1:
                    serving = self._supervisor(chain, sockets, captive, daemon)
                else:
                    server = Server(chain, sockets, **self._options())
                    serving = OneProcess(server, self._client, captive, self._parent)
                if daemon is not None:
                    daemon.fork(lambda pid: self._announce(where, pid))
                _on_signals(serving, captive, where)
            if self._credentials is not None:
                signal.signal(signal.SIGHUP, lambda number, frame: serving.reload())
            if line.swap:
                from .system import lock_memory

                lock_memory(line.user)
            if self._identity.changes:
                from .preload import preload

                preload()
                self._identity.take()
            serving.start()
            if daemon is None:
                self._announce(where, os.getpid())
            else:
                daemon.ready(self._keeps_stderr)
            log.use(self._log(daemon))
            sys.setswitchinterval(SWITCH_INTERVAL)
            status = serving.run()
            return captive.finish() if captive is not None else status
        except BaseException:
            if captive is not None:
                captive.abandon()
            if serving is not None:
                serving.abandon()
            raise
        finally:
            where.remove()

    def _options(self) -> dict[str, Any]:
        """Those of the Server."""
        line = self._line
        return {
            "readonly": bool(line.readonly),
            "threads": self._threads,
            "structured_replies": not line.no_sr,
            "meta_contexts": not line.no_mc,
            "extended_headers": not line.no_eh,
            "handshake_mask": self._mask,
            "oldstyle": bool(line.oldstyle),
            "handshake_timeout": self._timeout,
            "tls": self._tls,
            "credentials": self._credentials,
        }

    @property
    def _keeps_stderr(self) -> bool:
        """Whether a server in the background writes to stderr."""
        return log.verbose or self._line.log == "stderr"

    def _log(self, daemon: background.Background | None) -> str:
        """Where messages go when clients can connect."""
        here = daemon is None and self._stderr_is_ours
        return self._line.log or ("stderr" if here else "syslog")

    def _supervisor(
        self,
        chain: Chain,
        sockets: Sequence[socket.socket],
        captive: Captive | None,
        daemon: background.Background | None,
    ) -> Supervisor:
        """For --workers."""
        from .workers import Supervisor, Work

        def close_in_worker() -> None:
            if captive is not None:
                captive.close_gate()
            if daemon is not None:
                daemon.leave()
            if self._parent is not None:
                self._parent.close()

        def settled() -> None:
            if daemon is not None and not self._keeps_stderr:
                daemon.drop_stderr()
            log.use(self._log(daemon))
            sys.setswitchinterval(SWITCH_INTERVAL)

        work = Work(chain, self._options(), bool(self._line.swap), settled)
        return Supervisor(
            sockets,
            self._workers,
            work,
            close_in_worker,
            credentials=self._credentials,
            captive=captive,
            parent=self._parent,
        )

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


class OneProcess:
    """A server that serves in this process. What it has in common with `Supervisor`: see there."""

    def __init__(
        self,
        server: Server,
        client: socket.socket | None,
        captive: Captive | None,
        parent: background.Parent | None,
    ) -> None:
        """`client`: the only one (-s)."""
        self._server = server
        self._client = client
        self._captive = captive
        self._parent = parent
        self._needs_cleanup = False
        self.stop = server.stop
        self.reload = server.reload

    def start(self) -> None:
        """Do what is left to do for the plugin. Raises ConfigError."""
        self._needs_cleanup = True
        chain = self._server.chain
        step(chain.name, "after_fork", chain.after_fork)

    def run(self) -> int:
        """Serve to the end."""
        if self._parent is not None:
            self._parent.watch()
        if self._captive is not None:
            self._captive.go(self.stop)
        self._needs_cleanup = False  # the server does it
        if self._client is not None:
            self._server.serve_one(self._client)
        else:
            self._server.run()
        return 0

    def kill(self) -> None:
        """There is nobody to take along."""

    def abandon(self) -> None:
        """The start has failed."""
        if self._needs_cleanup:
            for failure in self._server.chain.cleanup():
                log.exception("cleanup", failure)


def _on_signals(serving: OneProcess | Supervisor, captive: Captive | None, where: Where) -> None:
    def end_at_once() -> None:
        serving.kill()
        where.remove()

    background.on_signals(lambda number: _stop(number, serving, captive), end_at_once)


def _stop(number: int, serving: OneProcess | Supervisor, captive: Captive | None) -> bool:
    """A signal: the server ends, or the command that it lives for is told; False: it is not ours.

    What is typed at a terminal (Ctrl-C) reaches the command, too: whether that is its end is for
    the command to say, as with system(3).
    """
    if captive is None or captive.has_ended:
        serving.stop()
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
