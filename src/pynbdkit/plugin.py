"""Plugin: where disks come from. Configured once per process; opens a Device per connection.

The life of a plugin, in order (plugin-contract.md, "Life"):
`load` → `config(key, value)` … → `config_complete` → `thread_model` is read → `get_ready` →
`after_fork` → for each connection: `preconnect` → `list_exports`/`default_export` → `open` →
the device's life → `close` → at the end `cleanup` → `unload`.
From `get_ready` to `cleanup` each may be `async def`: it is run on the server's event loop, and
waited for.
A step that raises stops the server (from preconnect on: that one connection) with one line.
"""

from __future__ import annotations

from .errors import ConfigError
from .flags import ThreadModel
from .parameters import Configurable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from .device import Device
    from .session import Session


class Plugin(Configurable):
    """Base class of plugins. Required: `open`. Parameters are declared as class attributes."""

    api_version: int = 2
    thread_model: int = ThreadModel.PARALLEL
    """How many requests at a time its devices stand; read after config_complete."""
    blocking: bool | None = None
    """As `Device.blocking`, for all devices of this plugin."""
    forkable: bool = False
    """Whether several processes may serve the disk (--workers): all that its connections share
    lives in the kernel (a file) or in shared memory, so that what one process has written, or
    flushed, is written and flushed for all. Read after config_complete."""
    worker_count: int = 1
    """How many processes will serve; set by the server before `get_ready`, which runs once, before
    they are forked. `after_fork` and `cleanup` run in each."""

    def load(self) -> None:
        """Called once, first."""

    def unload(self) -> None:
        """Called once, last."""

    def config(self, key: str, value: str) -> None:
        """One key=value from the command line. Override for keys that cannot be declared."""
        if not self.take_parameter(key, value):
            known = ", ".join(self._declared) or "none"
            raise ConfigError(f"unknown parameter '{key}' ({self.name or 'plugin'} has: {known})")

    def config_complete(self) -> None:
        """All parameters are there, the required ones checked: look at them together."""

    def get_ready(self) -> Awaitable[None] | None:
        """Before the server forks into the background: open files here. No threads yet."""

    def after_fork(self) -> Awaitable[None] | None:
        """In the process that serves: start threads and connections to others here."""

    def cleanup(self) -> Awaitable[None] | None:
        """The server stops; no client is left."""

    def preconnect(self, readonly: bool) -> Awaitable[None] | None:
        """A client has connected; raise to refuse it."""

    def list_exports(
        self, readonly: bool, is_tls: bool
    ) -> Iterable[str | tuple[str, str]] | Awaitable[Iterable[str | tuple[str, str]]]:
        """Names, or (name, description) pairs. Default: the default export alone."""
        from .device import then

        names: list[str] | Awaitable[list[str]]
        names = then(self.default_export(readonly, is_tls), lambda name: [name])
        return names

    def default_export(self, readonly: bool, is_tls: bool) -> str | Awaitable[str]:
        """What a client that asks for "" gets."""
        return ""

    def may_open(self, session: Session) -> bool | Awaitable[bool]:
        """Whether this client may open the export `session.export_name`. Default: yes.

        The name is the canonical one (what `default_export` says, where the client sent ""), and
        may be of no export at all. Who asks: `session.peer_tls_dn`, `peer_tls_user`, `peer_uid` …

        Asked before `open`, at least once, and for each name of `list_exports`: what may not be
        opened is not listed. Where the answer is no, or an exception, the client is refused with
        REP_ERR_POLICY, the same whether or not there is such an export; the log gets a line.
        """
        return True

    def open(self, session: Session) -> Device | Awaitable[Device]:
        """A Device for this connection. Raise OSError or OpenError to refuse it."""
        raise NotImplementedError(f"{type(self).__name__} has no open()")

    def callbacks(self) -> list[str]:
        """The names of all callbacks that this plugin and its devices have, for --dump-plugin.

        Default: what the class overrides, and what the Device classes beside it in its module do.
        """
        import sys

        from .device import Device

        module = sys.modules.get(type(self).__module__)
        found = {
            name for name in vars(Plugin) if getattr(type(self), name) is not vars(Plugin)[name]
        }
        for value in list(vars(module).values()) if module else []:
            if isinstance(value, type) and issubclass(value, Device) and value is not Device:
                found |= {name for name in vars(value) if callable(getattr(value, name))}
        order = [*vars(Plugin), *vars(Device), "pwrite_fua", "trim_fua", "zero_fua"]
        own = ("callbacks", "forkable")
        return [
            name
            for name in order
            if name in found
            and not name.startswith("_")
            and name not in own
            and callable(getattr(Plugin, name, None) or getattr(Device, name, print))
        ]

    def dump_plugin(self) -> Iterable[tuple[str, str]]:
        """More key=value lines for --dump-plugin."""
        return ()
