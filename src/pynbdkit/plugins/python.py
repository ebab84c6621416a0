"""python: a plugin that is a Python file (nbdkit-python-plugin(3)).

The first parameter names the file; whatever follows is for the plugin in it. That is a script of
functions or a native `Plugin` class; both can as well be named in place of a plugin
(``pynbdkit FILE.py``). This one is for command lines written for nbdkit, for "#!" lines, and for
files with other names.
"""

from __future__ import annotations

import sys

from .. import parameters
from ._inner import InnerPlugin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Python(InnerPlugin):
    """A plugin written as a Python file."""

    name = "python"
    longname = "nbdkit python plugin"
    description = "Run a plugin that is a Python file"
    wanted = "the first parameter must be the script: script=FILE, or FILE alone"

    script = parameters.path(
        "The Python file; all parameters after it are the script's",
        required=True,
        magic=True,
        metavar="FILE",
    )

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

    @property
    def path(self) -> str:
        """The file, for --dump-plugin; our own before it is known."""
        return getattr(self._inner, "path", "") or self.script or __file__

    def dump_plugin(self) -> Iterable[tuple[str, str]]:
        """The interpreter; then what the plugin in the file has to say."""
        yield "python_version", ".".join(map(str, sys.version_info[:3]))
        yield "python_pep_384_abi_version", "3"
        yield "nbdkit_python_maximum_api_version", "2"
        if self._inner is not None:
            yield from self._inner.dump_plugin()
