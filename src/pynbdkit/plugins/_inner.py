"""InnerPlugin: a plugin that loads another one, and hands it everything.

Its first parameters say which one; it sets `_inner` as soon as that is loaded, and `inner` is for
what cannot go on without. Every step of the life and every question is passed on: what is answered
here instead, `may_open` above all, would be answered wrong.
"""

from __future__ import annotations

from ..errors import ConfigError
from ..flags import ThreadModel
from ..plugin import Plugin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable
    from typing import ClassVar

    from ..device import Device
    from ..session import Session


class InnerPlugin(Plugin):
    """Base class; what a subclass still has to do is `config` and, for most, `dump_plugin`."""

    wanted: ClassVar[str]
    """What the user has to give, for the error where it lacks."""

    _inner: Plugin | None = None

    def __init__(self, **values: object) -> None:
        """As on the command line: what to load first, then its parameters."""
        super().__init__()
        for key, value in values.items():
            self.config(key, str(value))

    @property
    def known(self) -> Plugin | None:
        """The other plugin, None before the user has named it."""
        return self._inner

    @property
    def inner(self) -> Plugin:
        """The other plugin. Raises ConfigError before the user has named it."""
        known = self.known
        if known is None:
            raise ConfigError(self.wanted)
        return known

    def unload(self) -> None:
        """Unload the other plugin, if there is one."""
        if self._inner is not None:
            self._inner.unload()

    # -- what is asked before it is known, too ----------------------------------------------------

    def magic_config_key(self) -> str:
        """Our own; later the one of the other plugin."""
        known = self.known
        return super().magic_config_key() if known is None else known.magic_config_key()

    @property
    def api_version(self) -> int:  # type: ignore[override]
        """The other plugin's; the newest before it is known."""
        known = self.known
        return 2 if known is None else known.api_version

    @property
    def thread_model(self) -> int:  # type: ignore[override]
        """The other plugin's; a careful one before it is known."""
        known = self.known
        return ThreadModel.SERIALIZE_ALL_REQUESTS if known is None else known.thread_model

    @property
    def blocking(self) -> bool | None:  # type: ignore[override]
        """What the other plugin declares."""
        known = self.known
        return None if known is None else known.blocking

    @property
    def forkable(self) -> bool:  # type: ignore[override]
        """What the other plugin declares."""
        known = self.known
        return False if known is None else known.forkable

    def callbacks(self) -> list[str]:
        """Those of the other plugin."""
        known = self.known
        return super().callbacks() if known is None else known.callbacks()

    # -- the life ---------------------------------------------------------------------------------

    def check_parameters(self) -> None:
        """Check those of the other plugin."""
        self.inner.check_parameters()

    def config_complete(self) -> None:
        """As the other plugin has it; so are all of the following."""
        self.inner.config_complete()

    def get_ready(self) -> Awaitable[None] | None:
        self.inner.worker_count = self.worker_count
        return self.inner.get_ready()

    def after_fork(self) -> Awaitable[None] | None:
        return self.inner.after_fork()

    def cleanup(self) -> Awaitable[None] | None:
        return self.inner.cleanup()

    def preconnect(self, readonly: bool) -> Awaitable[None] | None:
        return self.inner.preconnect(readonly)

    def list_exports(
        self, readonly: bool, is_tls: bool
    ) -> Iterable[str | tuple[str, str]] | Awaitable[Iterable[str | tuple[str, str]]]:
        return self.inner.list_exports(readonly, is_tls)

    def default_export(self, readonly: bool, is_tls: bool) -> str | Awaitable[str]:
        return self.inner.default_export(readonly, is_tls)

    def may_open(self, session: Session) -> bool | Awaitable[bool]:
        return self.inner.may_open(session)

    def open(self, session: Session) -> Device | Awaitable[Device]:
        return self.inner.open(session)
