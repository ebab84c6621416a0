"""The command `pynbdkit`: from a command line to a running server, in the peer's order.

options → plugin and filters loaded → key=value → config_complete → get_ready → sockets →
privileges dropped → background → after_fork → pidfile → serve (nbdkit(1), nbdkit-service(1)).
"""

from __future__ import annotations

import sys

from .._version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from ..chain import Chain
    from .options import CommandLine


def run() -> None:
    """The console command: `main` on this process's arguments."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run the server to its end; returns the exit status."""
    if list(arguments) in (["--version"], ["-V"]):
        print(f"pynbdkit {__version__}")
        return 0
    from .. import log
    from ..errors import PynbdkitError
    from .options import UsageError

    try:
        return _main(arguments)
    except UsageError as error:
        print(f"pynbdkit: {error}\nUse 'pynbdkit --help' for the usage.", file=sys.stderr)
    except PynbdkitError as error:
        log.error(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        pass  # whoever read our output has gone
    return 1


def _main(arguments: Sequence[str]) -> int:
    from .. import log
    from . import options

    line = options.parse(arguments)
    _print_and_exit_options(line)
    if line.version:
        print(f"pynbdkit {__version__}")
        return 0
    if line.dump_config:
        from . import dump

        for key, value in dump.config():
            print(f"{key}={value}")
        return 0
    if line.plugin is None:
        if line.help:
            print(options.usage())
            return 0
        raise options.UsageError("no plugins given on the command line.")
    log.verbose = bool(line.verbose)

    chain = _load(line)
    if line.help:
        from . import dump

        print(options.usage())
        for text in dump.help(chain):
            print(text)
        return 0
    _step(chain, "load", chain.load)
    _configure(chain, line.parameters)
    if line.dump_plugin:
        from . import dump

        for key, value in dump.plugin(chain):
            print(f"{key}={value}")
        return 0
    _step(chain, "config_complete", chain.complete)
    return _serve(line, chain)


def _print_and_exit_options(line: CommandLine) -> None:
    """Refuse what is not there yet, and values that are wrong whatever the plugin is."""
    from .options import NOT_SUPPORTED, OPTIONS, UsageError

    for option in OPTIONS:
        if option.key in NOT_SUPPORTED and getattr(line, option.key):
            raise UsageError(f"option '{option.names[-1]}' is not supported by this version")
    if line.tls not in (None, "off"):
        raise UsageError(f"--tls={line.tls} is not supported by this version (only --tls=off)")
    if line.log not in (None, "stderr", "syslog", "null"):
        raise UsageError(f"--log={line.log}: must be stderr, syslog or null")


def _load(line: CommandLine) -> Chain:
    from ..chain import Chain
    from ..loader import load_filter, load_plugin

    assert line.plugin is not None
    filters = [load_filter(name) for name in line.filter]
    return Chain(load_plugin(line.plugin), filters)


def _configure(chain: Chain, parameters: Sequence[str]) -> None:
    """Hand on key=value; a value alone is for the magic key (nbdkit(1), "Magic parameters")."""
    from ..errors import ConfigError

    for index, word in enumerate(parameters):
        key, equals, value = word.partition("=")
        if not (equals and _is_key(key)):
            key, value = chain.plugin.magic_config_key(), word
            if not key and index == 0:
                key = "script"
            if not key:
                raise ConfigError(f"expecting key=value on the command line but got: {word}")
        _step(chain, "config", lambda k=key, v=value: chain.config(k, v))


def _is_key(text: str) -> bool:
    return (
        text[:1].isascii()
        and text[:1].isalpha()
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in text)
    )


def _step(chain: Chain, name: str, call: object) -> None:
    """One step of the plugin's life: whatever it raises is one line, and the end."""
    from .. import log
    from ..errors import ConfigError, PynbdkitError

    try:
        call()  # type: ignore[operator]
    except PynbdkitError:
        raise
    except Exception as failure:
        if not isinstance(failure, (OSError, ValueError)) or log.verbose:
            log.exception(f"{chain.name}: {name}", failure)
            raise ConfigError(f"{chain.name}: {name} failed") from None
        raise ConfigError(f"{chain.name}: {name}: {log.describe(failure)}") from None


def _number(what: str, text: str | None, default: int, low: int, high: int) -> int:
    from ..parse import parse_int
    from .options import UsageError

    if text is None:
        return default
    try:
        return parse_int(what, text, low, high)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _serve(line: CommandLine, chain: Chain) -> int:
    import os

    from .. import log
    from ..server.listen import inherited
    from ..server.server import Server
    from . import background
    from .options import UsageError
    from .where import Where

    threads = _number("--threads", line.threads, 16, 0, 10_000)
    mask = _number("--mask-handshake", line.mask_handshake, 0xFFFF, 0, 0xFFFF)
    activated = inherited()
    if activated:
        for key, names in (
            ("ipaddr", "-i"),
            ("port", "-p"),
            ("run", "--run"),
            ("single", "-s"),
            ("unix", "-U"),
        ):
            if getattr(line, key):
                raise UsageError(f"socket activation (LISTEN_FDS) excludes {names}")
    if line.single and line.run:
        raise UsageError("-s and --run exclude each other")
    if line.unix and (line.port or line.ipaddr):
        raise UsageError("-U excludes -p and -i")
    stays = bool(line.foreground or line.run or line.single or line.exit_with_parent or activated)
    _debug_flags(line.debug)
    if line.exit_with_parent:
        background.exit_with_parent()
    os.umask(0o022)
    _step(chain, "get_ready", chain.get_ready)

    where = Where(line, activated)
    try:
        sockets: list[socket.socket] = [] if line.single else where.listen()
        background.change_user(line.user, line.group)
        pidfile = os.path.abspath(line.pidfile) if line.pidfile else None
        if not stays:
            background.fork_into_background(keep_stderr=log.verbose)
        if not line.verbose:
            log.use(line.log or ("stderr" if stays else "syslog"))
        _step(chain, "after_fork", chain.after_fork)
        server = Server(
            chain,
            sockets,
            readonly=bool(line.readonly),
            threads=threads,
            structured_replies=not line.no_sr,
            handshake_mask=mask,
        )
        background.on_signals(server.stop)
        if pidfile:
            background.write_pidfile(pidfile)
        if line.print_uri and not line.single:
            print(where.uri(line.exportname or ""), flush=True)
        # A thread that computes gives way this often (seconds): others wait that long, not 5 ms.
        sys.setswitchinterval(0.001)
        if line.single:
            from ..server.single import stdin_stdout

            server.serve_one(stdin_stdout())
            return 0
        if line.run is None:
            server.run()
            return 0
        from .captive import Captive

        captive = Captive(line.run, where.variables(line.exportname or ""))
        captive.start(server.stop)
        server.run()
        return captive.finish()
    finally:
        where.remove()


def _debug_flags(flags: Sequence[str]) -> None:
    from .. import log
    from ..parse import parse_int
    from .options import UsageError

    for flag in flags:
        name, equals, value = flag.partition("=")
        if not equals or "." not in name:
            raise UsageError(f"-D {flag}: must have the form NAME.FLAG=N")
        try:
            log.flags[name] = parse_int(f"-D {name}", value)
        except ValueError as error:
            raise UsageError(str(error)) from None
