"""The command `pynbdkit`: options → plugin and filters → key=value → a server, or a text.

Nothing is imported before it is needed: ``pynbdkit --version`` is about as quick as Python itself.
"""

from __future__ import annotations

import gc
import sys

from .._version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..chain import Chain
    from .options import CommandLine


def run() -> None:
    """The console command: `main` on this process's arguments."""
    gc.disable()  # what the start makes stays: looking for garbage finds none (see `_load`)
    status = main(sys.argv[1:])
    for fd, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _discard(fd)  # nobody can be told, and the exit status is to be ours
    gc.freeze()  # nor does it pay at the end: the system takes all of it back at once
    sys.exit(status)


def main(arguments: Sequence[str]) -> int:
    """Run the server to its end; returns the exit status.

    A user's mistake, and whatever the system refuses, is one line on stderr and the status 1.
    """
    if list(arguments) in (["--version"], ["-V"]):
        return show([f"pynbdkit {__version__}"])
    from .. import log
    from ..errors import PynbdkitError

    try:
        return _main(arguments)
    except PynbdkitError as error:
        log.error(str(error))
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of the system: no memory, no more processes
        if log.verbose:
            log.exception("pynbdkit", error)
        else:
            log.error(log.describe(error))
    return 1


def _main(arguments: Sequence[str]) -> int:
    from .. import log
    from . import options

    line = options.parse(arguments)
    if line.dump_config:
        from . import dump

        return show(f"{key}={value}" for key, value in dump.config())
    if line.plugin is None:
        if line.help:
            return show([options.usage()])
        if line.version:
            return show([f"pynbdkit {__version__}"])
        hint = " (for the server itself: --dump-config)" if line.dump_plugin else ""
        raise options.UsageError(f"no plugin given on the command line{hint}")

    log.verbose = bool(line.verbose)
    service = None
    if not (line.help or line.version or line.dump_plugin):
        from .serve import Service

        service = Service(line)
    log.debug(f"pynbdkit {__version__}")
    chain = _load(line)
    _debug_flags(line.debug, chain)
    if line.help or line.version:
        from . import dump

        if line.help:
            return show([options.usage(), *dump.help(chain)])
        return show([f"pynbdkit {__version__}", *dump.versions(chain)])

    from .step import step

    try:
        step(chain.name, "load", chain.load)
        for pair in _parameters(chain, line.parameters):
            step(chain.name, "config", lambda pair=pair: chain.config(*pair))  # type: ignore[misc]
        if service is None:
            from . import dump

            return show(f"{key}={value}" for key, value in dump.plugin(chain))
        step(chain.name, "config_complete", chain.complete)
        return service.run(chain)
    finally:
        for failure in chain.unload():
            log.exception("unload", failure)


def show(lines: Iterable[str]) -> int:
    """Print; returns the exit status. Who stops reading is no news; a full disk is."""
    out = sys.stdout
    try:
        if out is None:
            raise OSError(9, "it is closed")
        # A path may have bytes, or the user's locale miss characters, that cannot be written.
        getattr(out, "reconfigure", lambda **_: None)(errors="backslashreplace")
        for line in lines:
            out.write(line + "\n")
        out.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            from .. import log

            log.error(f"stdout: {error.strerror}")
        return 1
    return 0


def _discard(fd: int) -> None:
    """stdout or stderr cannot be written to: Python must not try it again at exit."""
    import os

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def _load(line: CommandLine) -> Chain:
    from ..chain import Chain
    from ..loader import load_filter, load_plugin

    gc.freeze()
    gc.enable()
    assert line.plugin is not None
    filters = [load_filter(name) for name in line.filter]
    return Chain(load_plugin(line.plugin, line.plugin_path), filters)


def _parameters(chain: Chain, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The key=value pairs; a value alone is for the magic key (nbdkit(1), "Magic parameters")."""
    from ..errors import ConfigError

    for index, word in enumerate(words):
        key, equals, value = word.partition("=")
        if not (equals and _is_key(key)):
            key, value = chain.plugin.magic_config_key(), word
            if not key and index == 0:
                key = "script"
            if not key:
                raise ConfigError(f"expecting key=value on the command line but got: {word}")
        yield key, value


def _is_key(text: str) -> bool:
    return (
        text[:1].isascii()
        and text[:1].isalpha()
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in text)
    )


def _debug_flags(flags: Sequence[str], chain: Chain) -> None:
    from .. import log
    from ..parse import parse_int
    from .options import UsageError

    names = {"nbdkit", "pynbdkit", chain.name, *(filter.name for filter in chain.filters)}
    for flag in flags:
        name, equals, value = flag.partition("=")
        layer, dot, rest = name.partition(".")
        if not (equals and layer and dot and rest):
            raise UsageError(f"-D {flag}: must have the form NAME.FLAG=N")
        try:
            log.flags[name] = parse_int(f"-D {name}", value)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if layer not in names:
            log.warning(f"-D {name} is not used: there is no {layer} on the command line")
