"""cc: a plugin that is source code in C, or in what compiles to the same (nbdkit-cc-plugin(3)).

The file is compiled when its plugin is first needed: after the last parameter, for CC= and CFLAGS=
may come late. What it is compiled to is a file for as long as it takes to load it. The compiler
finds our own nbdkit-plugin.h by itself, behind the folders that the user names.
"""

from __future__ import annotations

import os

from .. import parameters
from ..errors import ConfigError, LoadError
from ..flags import ThreadModel
from ._inner import InnerPlugin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from ..native.plugin import NativePlugin

PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HEADERS: Final = os.path.join(PACKAGE, "include")
STDIN: Final = "-"
_OURS: Final = ("CC", "CFLAGS", "EXTRA_CFLAGS")


class Cc(InnerPlugin):
    """A plugin that is compiled first."""

    name = "cc"
    longname = "nbdkit C compiler plugin"
    description = "Compile a plugin written in C, and run it"
    wanted = "the first parameter must be the source: script=FILE, FILE alone, or - for stdin"

    script = parameters.text(
        "The source, - for stdin; other parameters are its plugin's",
        required=True,
        magic=True,
        metavar="FILE",
    )
    compiler = parameters.text("The compiler", key="CC", default="cc", metavar="COMMAND")
    flags = parameters.text(
        "Its flags", key="CFLAGS", default="-g -O2 -fPIC -shared", metavar="FLAGS"
    )
    extra_flags = parameters.text("More flags, behind those", key="EXTRA_CFLAGS", metavar="FLAGS")

    _inner: NativePlugin | None = None

    def __init__(self, **values: object) -> None:
        self._kept: list[tuple[str, str]] = []
        super().__init__(**values)

    def config(self, key: str, value: str) -> None:
        """Take what is ours; keep everything else for the plugin. Raises ConfigError."""
        if key in _OURS or (key == "script" and not self.script):
            if self._inner is not None:
                raise ConfigError(f"{key}= must come before a parameter without a key")
            if key == "script" and value != STDIN:
                value = _readable(value)
            self.take_parameter(key, value)
        elif not self.script:
            raise ConfigError(self.wanted)
        elif self._inner is None:
            self._kept.append((key, value))
        else:
            self._inner.config(key, value)

    @property
    def known(self) -> NativePlugin | None:
        """The plugin, compiled and configured so far. Raises ConfigError, LoadError."""
        if self._inner is None and self.script:
            inner = self._compiled()
            inner.load()
            self._inner = inner
            for key, value in self._kept:
                inner.config(key, value)
        return self._inner

    def _compiled(self) -> NativePlugin:
        """Compile the source, and load that. The compiler's own words are on stderr by then."""
        import subprocess
        import tempfile

        from ..native.plugin import NativePlugin

        shown = "stdin" if self.script == STDIN else self.script
        with tempfile.TemporaryDirectory(prefix="pynbdkit-cc-") as folder:
            source = self.script
            if source == STDIN:
                source = os.path.join(folder, "stdin.c")
                with open(source, "wb") as stream:
                    stream.write(_stdin())
            made = os.path.join(folder, "plugin.so")
            command = f'{self.compiler} {self.flags} {self.extra_flags or ""} "$1" -o "$2"'
            path = os.pathsep.join(filter(None, (os.environ.get("CPATH"), HEADERS)))
            status = subprocess.run(
                ["sh", "-c", command, "sh", source, made],
                stdin=subprocess.DEVNULL,
                stdout=2,  # our own stdout may be the client's
                env={**os.environ, "CPATH": path},
            ).returncode
            if status or not os.path.exists(made):
                how = f"failed with exit status {status}" if status else "has made no file"
                raise ConfigError(f"{shown}: not compiled: {self.compiler} {how}")
            try:
                return NativePlugin(made)
            except LoadError as error:
                raise LoadError(str(error).replace(made, shown)) from None

    # -- for --dump-plugin -------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """The source; our own file where there is none."""
        return __file__ if self.script in (None, STDIN) else self.script

    @property
    def struct_size(self) -> int | None:
        """The plugin's; None before there is one."""
        return None if self.known is None else self.known.struct_size

    @property
    def errno_is_preserved(self) -> int:
        """The plugin's."""
        return 1 if self.known is None else self.known.errno_is_preserved

    @property
    def max_thread_model(self) -> int:
        """The plugin's; the laxest before there is one."""
        return ThreadModel.PARALLEL if self.known is None else self.known.max_thread_model

    def ask_thread_model(self) -> None:
        """Let the plugin narrow its thread model. Raises ConfigError."""
        if self.known is not None:
            self.known.ask_thread_model()

    def dump_plugin(self) -> Iterable[tuple[str, str]]:
        """How it is compiled; then what the plugin has to say."""
        yield "CC", self.compiler
        yield "CFLAGS", self.flags
        if self.known is not None:
            yield from self.known.dump_plugin()


def _readable(path: str) -> str:
    """The file behind a path: "…" includes are looked for beside it. Raises ConfigError."""
    real = os.path.realpath(path)
    try:
        open(real, "rb").close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return real


def _stdin() -> bytes:
    """All that is on stdin. Raises ConfigError where it is not for us."""
    import sys

    from .. import session

    if session.stdio_is_taken or sys.stdin is None:
        raise ConfigError("the source cannot be read from stdin: it is the client's, or closed")
    return sys.stdin.buffer.read()
