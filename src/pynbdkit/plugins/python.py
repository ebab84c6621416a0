"""python: a plugin that is a Python file (nbdkit-python-plugin(3)).

The first parameter names the file; whatever follows is for the plugin in it. That is a script of
functions or a native `Plugin` class; both can as well be named in place of a plugin
(``pynbdkit FILE.py``). This one is for command lines written for nbdkit, for "#!" lines, and for
files with other names.
"""

from __future__ import annotations

import sys

from .. import parameters
from ..errors import ConfigError
from ..flags import ThreadModel
from ..plugin import Plugin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..device import Device
    from ..session import Session


class Python(Plugin):
    """A plugin written as a Python file."""

    name = "python"
    longname = "nbdkit python plugin"
    description = "Run a plugin that is a Python file"

    script = parameters.path(
        "The Python file; all parameters after it are the script's",
        required=True,
        magic=True,
        metavar="FILE",
    )

    _inner: Plugin | None = None

    def __init__(self, **values: object) -> None:
        """As on the command line: `script` first, then the script's parameters."""
        super().__init__()
        for key, value in values.items():
            self.config(key, str(value))

    @property
    def inner(self) -> Plugin:
        """The plugin in the file. Raises ConfigError before the file is known."""
        if self._inner is None:
            raise ConfigError("the first parameter must be the script: script=FILE, or FILE alone")
        return self._inner

    # -- before and after the file is known ------------------------------------------------------

    def config(self, key: str, value: str) -> None:
        """Load the file; hand it everything after that."""
        if self._inner is None and key == "script":
            from ..loader import plugin_from_python_file

            inner = plugin_from_python_file(value)
            inner.load()
            self._inner = inner
            self.script = value
        else:
            self.inner.config(key, value)

    def unload(self) -> None:
        """Unload the plugin in the file."""
        if self._inner is not None:
            self._inner.unload()

    def magic_config_key(self) -> str:
        """`script`; later the one of the plugin in the file."""
        if self._inner is None:
            return super().magic_config_key()
        return self._inner.magic_config_key()

    @property
    def path(self) -> str:
        """The file, for --dump-plugin; our own before it is known."""
        return getattr(self._inner, "path", "") or self.script or __file__

    @property
    def api_version(self) -> int:  # type: ignore[override]
        """The one of the plugin in the file; the newest before it is known."""
        return self._inner.api_version if self._inner is not None else 2

    @property
    def thread_model(self) -> int:  # type: ignore[override]
        """The one of the plugin in the file; a script's default before it is known."""
        if self._inner is None:
            return ThreadModel.SERIALIZE_ALL_REQUESTS
        return self._inner.thread_model

    @property
    def blocking(self) -> bool | None:  # type: ignore[override]
        """What the plugin in the file declares."""
        return self._inner.blocking if self._inner is not None else None

    def callbacks(self) -> list[str]:
        """Those of the plugin in the file."""
        return self._inner.callbacks() if self._inner is not None else super().callbacks()

    def dump_plugin(self) -> Iterable[tuple[str, str]]:
        """The interpreter; then what the plugin in the file has to say."""
        yield "python_version", ".".join(map(str, sys.version_info[:3]))
        yield "python_pep_384_abi_version", "3"
        yield "nbdkit_python_maximum_api_version", "2"
        if self._inner is not None:
            yield from self._inner.dump_plugin()

    # -- the life of the plugin in the file ------------------------------------------------------

    def check_parameters(self) -> None:
        """Check those of the plugin in the file."""
        self.inner.check_parameters()

    def config_complete(self) -> None:
        """As the plugin in the file has it; so are all of the following."""
        self.inner.config_complete()

    def get_ready(self) -> None:  # noqa: D102
        self.inner.get_ready()

    def after_fork(self) -> None:  # noqa: D102
        self.inner.after_fork()

    def cleanup(self) -> None:  # noqa: D102
        self.inner.cleanup()

    def preconnect(self, readonly: bool) -> None:  # noqa: D102
        self.inner.preconnect(readonly)

    def list_exports(self, readonly: bool, is_tls: bool) -> Iterable[str | tuple[str, str]]:  # noqa: D102
        return self.inner.list_exports(readonly, is_tls)

    def default_export(self, readonly: bool, is_tls: bool) -> str:  # noqa: D102
        return self.inner.default_export(readonly, is_tls)

    def may_open(self, session: Session) -> bool:  # noqa: D102
        return self.inner.may_open(session)

    def open(self, session: Session) -> Device:  # noqa: D102
        return self.inner.open(session)
