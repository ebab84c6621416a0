"""Chain: one plugin and the filters in front of it, through their whole life.

The filters stand in the order of the command line, the first one outermost: it sees each request,
and each key=value, first. What makes a layer ready begins with the plugin, so that a filter finds
all below it ready (nbdkit-filter(3)). `open` makes the stack of `Layer`s for a connection.

`open` is also where access is decided, so that nothing that opens a device can forget it: every
layer is asked `may_open` before anything is opened, and the plugin once more about the export that
it is really to open, which a filter may have changed.

Most steps of the plugin's may be `async def`: each is run on the chain's event loop and waited for,
here and nowhere else. All is asked through `_settled`, because a coroutine that nobody awaits would
count as yes.
"""

from __future__ import annotations

import errno
import threading

from . import log
from .complete import Layer
from .device import CONFIGURATION, OPERATIONS, Device, is_async, is_awaitable, refuse_async
from .errors import ConfigError, OpenError
from .filter import Filter, FilterDevice
from .flags import THREAD_MODEL_NAMES, ThreadModel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from .loop import EventLoop
    from .plugin import Plugin
    from .session import Session


class Chain:
    """The configured layers of one server; plugin innermost."""

    def __init__(self, plugin: Plugin, filters: Sequence[Filter] = ()) -> None:
        self.plugin = plugin
        self.filters = list(filters)
        self._loaded: list[Plugin | Filter] = []
        self._serves = False
        self._loop: EventLoop | None = None
        self._loop_lock = threading.Lock()

    @property
    def layers(self) -> list[Plugin | Filter]:
        """Outermost first."""
        return [*self.filters, self.plugin]

    @property
    def name(self) -> str:
        """The plugin's name, for messages."""
        return self.plugin.name or type(self.plugin).__name__

    # -- coroutines ------------------------------------------------------------------------------

    @property
    def loop(self) -> EventLoop:
        """The event loop, made when it is first needed."""
        with self._loop_lock:
            if self._loop is None:
                from .loop import EventLoop

                self._loop = EventLoop()
                if self._serves:
                    self._loop.keep()
            return self._loop

    def _wait(self, awaitable: Any) -> Any:
        return self.loop.wait(awaitable)

    def _settled(self, answer: Any) -> Any:
        """What a step of a layer came to."""
        return self.loop.wait(answer) if is_awaitable(answer) else answer

    # -- configuration ---------------------------------------------------------------------------

    def load(self) -> None:
        """Call each layer's `load`, the plugin first. Raises LoadError where it is async."""
        refuse_async(self.plugin, CONFIGURATION, self.name)
        for filter in self.filters:
            refuse_async(filter, vars(Filter), filter.name)
        for layer in reversed(self.layers):
            layer.load()
            self._loaded.append(layer)

    def config(self, key: str, value: str) -> None:
        """Hand key=value to the first layer that takes it. Raises ConfigError where none does."""
        for filter in self.filters:
            if filter.config(key, value):
                return
        self.plugin.config(key, value)

    def complete(self) -> None:
        """Check required parameters and call `config_complete`, outermost first."""
        for layer in self.layers:
            layer.check_parameters()
            layer.config_complete()
        self.thread_model()

    def thread_model(self) -> int:
        """The strictest thread model of all layers."""
        for layer in self.layers:
            model = layer.thread_model
            if not (isinstance(model, int) and 0 <= model <= ThreadModel.PARALLEL):
                raise ConfigError(
                    f"{layer.name}: thread_model is {model!r}, not 0 (serialize_connections)"
                    " to 3 (parallel)"
                )
        return min(layer.thread_model for layer in self.layers)

    def check_workers(self) -> None:
        """Raise ConfigError where a layer cannot be served by several processes (--workers)."""
        for layer in self.layers:
            what = f"{'plugin' if layer is self.plugin else 'filter'} {layer.name}"
            if not isinstance(layer.forkable, bool):
                raise ConfigError(
                    f"{layer.name}: forkable is {layer.forkable!r:.40}, not True or False"
                )
            if not layer.forkable:
                raise ConfigError(
                    f"--workers: the {what} is for one process (it is not declared forkable):"
                    " leave --workers out"
                )
            if layer.thread_model <= ThreadModel.SERIALIZE_ALL_REQUESTS:
                raise ConfigError(
                    f"--workers: the {what} wants {THREAD_MODEL_NAMES[layer.thread_model]}, which"
                    " several processes cannot keep: leave --workers out"
                )

    def get_ready(self, workers: int = 1) -> None:
        """Call `get_ready`, the plugin first, before the server forks.

        `workers`: how many processes will serve.
        """
        model = self.thread_model()
        for filter in self.filters:
            filter.chain_thread_model = model
        for layer in reversed(self.layers):
            if workers > 1:
                layer.worker_count = workers
            self._settled(layer.get_ready())
            if workers > 1 and self._loop is not None:
                raise ConfigError(
                    f"--workers: {layer.name}: get_ready is async def, and an event loop cannot be"
                    " shared by processes: do that in after_fork, which each of them calls"
                )

    def after_fork(self) -> None:
        """Call `after_fork`, the plugin first, in the process that serves."""
        self._serves = True
        if self._loop is not None:
            self._loop.keep()
        for layer in reversed(self.layers):
            self._settled(layer.after_fork())

    def cleanup(self) -> list[Exception]:
        """Call `cleanup`, outermost first, each whatever the others do; returns what was raised."""
        return _all(self._step(layer.cleanup) for layer in self.layers)

    def _step(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: self._settled(call())

    def unload(self) -> list[Exception]:
        """Call `unload` for what was loaded, the plugin first; returns what was raised."""
        loaded, self._loaded = self._loaded, []
        failures = _all(layer.unload for layer in loaded)
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()
        return failures

    # -- connections -----------------------------------------------------------------------------

    def preconnect(self, readonly: bool) -> None:
        """Ask each layer, outermost first, whether it wants this client."""

        def below(index: int) -> None:
            if index == len(self.filters):
                self._settled(self.plugin.preconnect(readonly))
            else:
                self.filters[index].around_preconnect(lambda: below(index + 1), readonly)

        below(0)

    def list_exports(
        self, readonly: bool, is_tls: bool, session: Session | None = None
    ) -> list[tuple[str, str]]:
        """What the outermost layer offers, as (name, description) pairs.

        With a session: without what that client may not open.
        """

        def below(index: int) -> Iterable[str | tuple[str, str]]:
            if index == len(self.filters):
                names: Iterable[str | tuple[str, str]]
                names = self._settled(self.plugin.list_exports(readonly, is_tls))
                return names
            return self.filters[index].list_exports(lambda: below(index + 1), readonly, is_tls)

        answer = below(0)
        if isinstance(answer, (str, bytes)) or not hasattr(answer, "__iter__"):
            raise OpenError(f"list_exports returned {answer!r}, not a list of names")
        result = []
        for item in answer:
            pair = (item, "") if isinstance(item, str) else item
            try:
                name, description = pair
            except (TypeError, ValueError):
                name = None
            if not isinstance(name, str) or not isinstance(description or "", str):
                raise OpenError(f"list_exports: {item!r} is neither a name nor (name, description)")
            result.append((name, description or ""))
        if session is None:
            return result
        default = ""
        if any(not name for name, _ in result):
            default = self.default_export(readonly, is_tls)
        return [
            (name, description)
            for name, description in result
            if self.may_open(session.replace(export_name=name or default))
        ]

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        """The name that "" stands for, as the outermost layer has it."""

        def below(index: int) -> str:
            if index == len(self.filters):
                return self._settled(self.plugin.default_export(readonly, is_tls))  # type: ignore[no-any-return]
            return self.filters[index].default_export(lambda: below(index + 1), readonly, is_tls)

        name = below(0)
        if not isinstance(name, str):
            raise OpenError(f"default_export returned {name!r}, not a text")
        return name

    def may_open(self, session: Session) -> bool:
        """Whether every layer lets this client open `session.export_name`.

        A layer that raises says no, and the log says why.
        """
        return self._may_open(0, session)

    def _may_open(self, first: int, session: Session) -> bool:
        def below(index: int, session: Session) -> bool:
            if index == len(self.filters):
                return bool(self._settled(self.plugin.may_open(session)))
            return bool(self.filters[index].may_open(lambda s: below(index + 1, s), session))

        try:
            return below(first, session)
        except Exception as failure:
            log.exception(f"may_open {session.export_name!r}", failure)
            return False

    def open(self, session: Session) -> Layer:
        """Open every layer for a connection, outermost first, and return the outermost.

        Raises PermissionError where a layer's `may_open` says no. Whatever a layer raises is passed
        on, after the layers that are open were closed.
        """
        opened: list[Layer] = []

        def open_at(index: int, session: Session) -> Layer:
            if index == len(self.filters):
                self._check(index, session)
                device = _opened(self._settled(self.plugin.open(session)), self.name)
                if device.blocking is None and self.plugin.blocking is not None:
                    device.blocking = self.plugin.blocking
                layer = self._layer(device, session, self.name)
            else:
                filter = self.filters[index]
                below: list[Layer] = []

                def next_open(session: Session) -> Layer:
                    below.append(open_at(index + 1, session))
                    return below[-1]

                device = _opened(filter.open(next_open, session), filter.name)
                if not below and isinstance(device, FilterDevice):
                    raise OpenError(f"{filter.name}: open did not open the next layer")
                if device.blocking is None:
                    device.blocking = filter.blocking
                layer = self._layer(device, session, filter.name, below[-1] if below else None)
                if below:
                    opened.remove(below[-1])
            opened.append(layer)
            return layer

        if self.filters:
            self._check(0, session)
        try:
            return open_at(0, session)
        except BaseException:
            for layer in opened:
                _all([layer.close])
            raise

    def _layer(
        self, device: Device, session: Session, where: str, next: Layer | None = None
    ) -> Layer:
        if not (device.asynchronous or any(map(is_async, _operations(device)))):
            return Layer(device, session, where, next, self._wait)
        if next is not None:
            raise OpenError(f"{where}: a filter's operations cannot be 'async def'")
        from .asynchronous import AsyncLayer

        return AsyncLayer(device, session, where, self.loop)

    def _check(self, first: int, session: Session) -> None:
        if not self._may_open(first, session):
            # The text reaches the client: nothing in it tells whether there is such an export.
            raise PermissionError(errno.EPERM, f"not permitted for {_who(session)}")


def _who(session: Session) -> str:
    """The client's best known name, which it knows itself."""
    if session.peer_tls_dn:
        return session.peer_tls_dn
    if session.peer_tls_user:
        return f"TLS user {session.peer_tls_user}"
    if session.peer_uid is not None:
        return f"uid {session.peer_uid}"
    return "this client"


def _operations(device: Device) -> Iterable[object]:
    return (getattr(device, name, None) for name in OPERATIONS)


def _opened(device: object, where: str) -> Device:
    if not isinstance(device, Device):
        raise OpenError(f"{where}: open returned {device!r}, not a Device")
    return device


def _all(calls: Iterable[object]) -> list[Exception]:
    failures: list[Exception] = []
    for call in calls:
        try:
            call()  # type: ignore[operator]
        except Exception as failure:
            failures.append(failure)
    return failures
