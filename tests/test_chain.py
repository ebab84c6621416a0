"""Chain: the steps of a life, in order, through all layers; and what is undone when one fails."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import support
from pynbdkit import (
    ConfigError,
    Device,
    Filter,
    FilterDevice,
    Layer,
    OpenError,
    Plugin,
    Session,
    ThreadModel,
    parameters,
)
from pynbdkit.chain import Chain

LIFE = ("load", "config_complete", "get_ready", "after_fork", "cleanup", "unload")


class Notes:
    """What both kinds of layers do here: note each step in `events`; fail where told to."""

    def __init__(self, name: str, events: list[str], fails: str = "") -> None:
        super().__init__()
        self.name = name
        self.events = events
        self.fails = fails

    def note(self, step: str) -> None:
        self.events.append(f"{self.name} {step}")
        if step.startswith(self.fails) and self.fails:
            raise RuntimeError(f"{self.name} {step} was told to fail")

    def load(self) -> None:
        self.note("load")

    def unload(self) -> None:
        self.note("unload")

    def config_complete(self) -> None:
        self.note("config_complete")

    def get_ready(self) -> None:
        self.note("get_ready")

    def after_fork(self) -> None:
        self.note("after_fork")

    def cleanup(self) -> None:
        self.note("cleanup")

    def preconnect(self, readonly: bool) -> None:
        self.note(f"preconnect {readonly}")


class NotesPlugin(Notes, Plugin):
    size = parameters.size("How large", default=512)

    def list_exports(self, readonly: bool, is_tls: bool) -> Iterable[Any]:
        self.note(f"list_exports {readonly} {is_tls}")
        return ["a", ("b", "described")]

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        self.note(f"default_export {readonly} {is_tls}")
        return "a"

    def open(self, session: Session) -> Device:
        self.note(f"open {session.export_name} {session.readonly}")
        return NotesDevice(self)


class NotesDevice(Device):
    def __init__(self, plugin: Notes) -> None:
        self.plugin = plugin

    def get_size(self) -> int:
        return 512

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return bytes(count)

    def close(self) -> None:
        self.plugin.note("close")


class NotesFilter(Notes, Filter):
    mine = parameters.text("For this filter")

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        self.note(f"open {session.export_name} {session.readonly}")
        device = NotesFilterDevice(next(session), self)
        self.note("opened")
        return device


class NotesFilterDevice(FilterDevice):
    def __init__(self, next: Layer, filter: Notes) -> None:
        super().__init__(next)
        self.filter = filter

    def close(self) -> None:
        self.filter.note("close")


def chain(events: list[str], *, who: str = "", fails: str = "") -> Chain:
    """Two filters, outer and inner, before a plugin; `who` fails in the step `fails`."""
    names = ("outer", "inner", "plugin")
    fail = [fails if name == who else "" for name in names]
    return Chain(
        NotesPlugin("plugin", events, fail[2]),
        [NotesFilter("outer", events, fail[0]), NotesFilter("inner", events, fail[1])],
    )


# -- the order of steps ----------------------------------------------------------------------------


def test_a_whole_life() -> None:
    """As nbdkit has it (see below): outwards where each needs what is below, else inwards."""
    events: list[str] = []
    it = chain(events)
    it.load()
    it.complete()
    it.get_ready()
    it.after_fork()
    it.preconnect(True)
    it.open(Session(export_name="x")).close()
    assert it.cleanup() == it.unload() == []
    assert events == [
        *("plugin load", "inner load", "outer load"),
        *("outer config_complete", "inner config_complete", "plugin config_complete"),
        *("plugin get_ready", "inner get_ready", "outer get_ready"),
        *("plugin after_fork", "inner after_fork", "outer after_fork"),
        *("outer preconnect True", "inner preconnect True", "plugin preconnect True"),
        *("outer open x False", "inner open x False", "plugin open x False"),
        *("inner opened", "outer opened"),
        *("outer close", "inner close", "plugin close"),
        *("outer cleanup", "inner cleanup", "plugin cleanup"),
        *("plugin unload", "inner unload", "outer unload"),
    ]


FILTERS = ("--filter=offset", "--filter=nofilter")


def test_nbdkit_has_the_same_order(nbd: Any, sockdir: Path) -> None:
    """Its own debug messages, from the same stack of layers, for one client."""
    socket = sockdir / "socket"
    server = subprocess.Popen(
        [support.program("nbdkit"), "-f", "-v", "-U", str(socket), *FILTERS, "null"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    seen = []
    for line in server.stderr:
        seen.append(line)
        if "nofilter: after_fork" in line or "offset: after_fork" in line:
            break
    client = nbd.NBD()
    client.connect_unix(str(socket))
    client.shutdown()
    server.send_signal(signal.SIGTERM)
    seen += server.stderr.readlines()
    assert server.wait(30) == 0

    names = {"offset": "outer", "nofilter": "inner", "null": "plugin"}
    steps = [*LIFE, "preconnect", "open", "close"]
    theirs = []
    for line in seen:
        match = re.search(r"debug: (offset|nofilter|null): (\w+)", line)
        if match and match[2] in steps and "returned" not in line:
            theirs.append(f"{names[match[1]]} {match[2]}")

    events: list[str] = []
    it = chain(events)
    it.load()
    it.complete()
    it.get_ready()
    it.after_fork()
    it.preconnect(False)
    it.open(Session()).close()
    it.cleanup()
    it.unload()
    ours = [" ".join(event.split()[:2]) for event in events if "opened" not in event]
    # nbdkit's null and its filters leave some steps out; those that are there have an order.
    assert [event for event in ours if event in theirs] == theirs
    assert len(theirs) >= 20


@pytest.mark.parametrize("step", ["load", "config_complete", "get_ready", "after_fork"])
@pytest.mark.parametrize("who", ["outer", "inner", "plugin"])
def test_a_step_that_fails_is_the_last(step: str, who: str) -> None:
    """It stops the server; what was loaded is unloaded, the others not."""
    events: list[str] = []
    it = chain(events, who=who, fails=step)
    with pytest.raises(RuntimeError, match=f"^{who} {step} was told to fail$"):
        for call in (it.load, it.complete, it.get_ready, it.after_fork):
            call()
    assert events[-1] == f"{who} {step}"
    loaded = [event.split()[0] for event in events if "load" in event]
    if step == "load":
        loaded.remove(who)
    events.clear()
    assert it.unload() == []
    assert events == [f"{name} unload" for name in loaded]


@pytest.mark.parametrize("step", ["cleanup", "unload"])
def test_every_layer_ends_whatever_fails(step: str) -> None:
    events: list[str] = []
    it = chain(events, who="inner", fails=step)
    it.load()
    failures = [*it.cleanup(), *it.unload()]
    assert [str(failure) for failure in failures] == [f"inner {step} was told to fail"]
    assert len([event for event in events if "cleanup" in event]) == 3
    assert len([event for event in events if "unload" in event]) == 3


def test_unload_happens_once() -> None:
    events: list[str] = []
    it = chain(events)
    it.load()
    it.unload()
    events.clear()
    it.unload()
    assert events == []


# -- configuration ---------------------------------------------------------------------------------


def test_the_outermost_takes_a_key_first() -> None:
    """Two filters of a kind: the first on the command line gets the first say, and all of it."""
    it = chain([])
    outer, inner = (filter for filter in it.filters if isinstance(filter, NotesFilter))
    it.config("mine", "x")
    assert (outer.mine, inner.mine) == ("x", None)
    it.config("size", "1K")
    assert isinstance(it.plugin, NotesPlugin)
    assert it.plugin.size == 1024
    with pytest.raises(ConfigError, match=r"^unknown parameter 'colour' \(plugin has: size\)$"):
        it.config("colour", "red")


def test_required_parameters_are_checked_before_config_complete() -> None:
    class Needs(NotesFilter):
        must = parameters.text("Needed", required=True)

    events: list[str] = []
    it = Chain(NotesPlugin("plugin", events), [Needs("needs", events)])
    with pytest.raises(ConfigError, match="must specify must=<TEXT>"):
        it.complete()
    assert events == []


def test_name() -> None:
    class Nameless(Plugin):
        pass

    assert Chain(Nameless()).name == "Nameless"
    assert chain([]).name == "plugin"


# -- thread models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", range(4))
@pytest.mark.parametrize("inner", range(4))
@pytest.mark.parametrize("outer", range(4))
def test_the_strictest_model_wins(outer: int, inner: int, plugin: int) -> None:
    it = chain([])
    it.filters[0].thread_model = outer
    it.filters[1].thread_model = inner
    it.plugin.thread_model = plugin
    assert it.thread_model() == min(outer, inner, plugin)
    it.get_ready()
    assert [filter.chain_thread_model for filter in it.filters] == [it.thread_model()] * 2


def test_models_are_parallel_unless_they_say() -> None:
    assert Chain(Plugin(), [Filter()]).thread_model() == ThreadModel.PARALLEL


@pytest.mark.parametrize("model", [-1, 4, "parallel", None])
def test_unknown_model(model: Any) -> None:
    it = chain([])
    it.filters[1].thread_model = model
    with pytest.raises(ConfigError, match=f"^inner: thread_model is {model!r}, not 0 "):
        it.complete()


def test_model_is_read_after_config_complete() -> None:
    class Late(Plugin):
        def config_complete(self) -> None:
            self.thread_model = ThreadModel.SERIALIZE_REQUESTS

    it = Chain(Late())
    it.complete()
    assert it.thread_model() == ThreadModel.SERIALIZE_REQUESTS


# -- connections -----------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["outer", "inner", "plugin"])
def test_preconnect_refuses(who: str) -> None:
    events: list[str] = []
    it = chain(events, who=who, fails="preconnect")
    with pytest.raises(RuntimeError, match=f"^{who} preconnect False"):
        it.preconnect(False)
    assert events[-1] == f"{who} preconnect False"


def test_around_preconnect_hears_what_is_below() -> None:
    class Around(Filter):
        def around_preconnect(self, next: Callable[[], None], readonly: bool) -> None:
            events.append(f"before {readonly}")
            try:
                next()
            except RuntimeError as failure:
                events.append(str(failure))
                raise OSError("refused") from None

    events: list[str] = []
    it = Chain(NotesPlugin("plugin", events, fails="preconnect"), [Around()])
    with pytest.raises(OSError, match="refused"):
        it.preconnect(True)
    assert events[0] == "before True"
    assert events[-1] == "plugin preconnect True was told to fail"


@pytest.mark.parametrize("who", ["outer", "inner", "plugin"])
def test_an_open_that_fails_closes_what_was_opened(who: str) -> None:
    """A filter that fails after it has opened the next layers leaves none of them open."""
    events: list[str] = []
    fails = "open " if who == "plugin" else "opened"
    it = chain(events, who=who, fails=fails)
    with pytest.raises(RuntimeError, match=f"^{who} {fails}"):
        it.open(Session())
    closed = [event for event in events if event.endswith("close")]
    assert (
        closed
        == {"plugin": [], "inner": ["plugin close"], "outer": ["inner close", "plugin close"]}[who]
    )


def test_a_close_that_fails_does_not_hide_why_the_open_did() -> None:
    events: list[str] = []
    it = Chain(
        NotesPlugin("plugin", events, fails="close"), [NotesFilter("outer", events, fails="opened")]
    )
    with pytest.raises(RuntimeError, match="outer opened"):
        it.open(Session())
    assert events[-1] == "plugin close"


def test_a_filter_that_opens_nothing() -> None:
    """A layer around nothing is a mistake; a device of the filter's own is not."""

    class Closed(Filter):
        name = "closed"
        own: Device

        def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
            return self.own

    class Empty(Device):
        def get_size(self) -> int:
            return 0

        def close(self) -> None:
            events.append("closed")

    events: list[str] = []
    closed = Closed()
    it = Chain(NotesPlugin("plugin", events), [NotesFilter("outer", events), closed])
    closed.own = FilterDevice(None)  # type: ignore[arg-type]
    with pytest.raises(OpenError, match=r"^closed: open did not open the next layer$"):
        it.open(Session())
    events.clear()
    closed.own = Empty()
    layer = it.open(Session())
    assert layer.get_size() == 0
    layer.close()
    assert events == ["outer open  False", "outer opened", "outer close", "closed"]


class Guarded(NotesPlugin):
    """Lets alice open everything, others what is public; raises for a name that says so."""

    def list_exports(self, readonly: bool, is_tls: bool) -> list[Any]:
        return ["public", ("secret", "for alice"), "broken", ""]

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        return "secret"

    def may_open(self, session: Session) -> bool:
        if session.export_name == "broken":
            raise ZeroDivisionError("a bug")
        return session.export_name == "public" or session.peer_tls_dn == "CN=alice"


def known_as(dn: str, export_name: str = "") -> Session:
    session = Session(export_name=export_name)
    session.peer_tls_dn = dn
    return session


@pytest.mark.parametrize("filters", [[], [Filter()]], ids=["bare", "filtered"])
def test_who_may_open(filters: list[Filter], capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is opened; not listed, also where "" stands for it; a bug is a no."""
    events: list[str] = []
    it = Chain(Guarded("plugin", events), filters)

    def listed(dn: str) -> list[str]:
        return [name for name, _ in it.list_exports(False, True, known_as(dn))]

    assert listed("CN=alice") == ["public", "secret", ""]
    assert listed("CN=bob") == listed("") == ["public"]
    assert len(it.list_exports(False, True)) == 4
    events.clear()
    it.open(known_as("CN=bob", "public"))
    it.open(known_as("CN=alice", "secret"))
    assert events == ["plugin open public False", "plugin open secret False"]
    events.clear()
    for name in ("secret", "no such export", "broken"):
        with pytest.raises(PermissionError, match="not permitted for CN=bob"):
            it.open(known_as("CN=bob", name))
    with pytest.raises(PermissionError, match="not permitted for this client"):
        it.open(known_as("", "secret"))
    with pytest.raises(PermissionError):
        it.open(known_as("CN=alice", "broken"))
    assert events == []
    assert "may_open 'broken': ZeroDivisionError: a bug" in capsys.readouterr().err


def test_a_filter_narrows_who_may_open() -> None:
    class Nobody(Filter):
        def may_open(self, next: Callable[[Session], bool], session: Session) -> bool:
            return next(session) and session.peer_tls_dn != "CN=alice"

    events: list[str] = []
    it = Chain(Guarded("plugin", events), [NotesFilter("outer", events), Nobody()])
    with pytest.raises(PermissionError):
        it.open(known_as("CN=alice", "secret"))
    with pytest.raises(PermissionError):
        it.open(known_as("CN=bob", "secret"))
    assert events == []
    assert it.list_exports(False, True, known_as("CN=alice")) == []
    it.open(known_as("CN=bob", "public"))


@pytest.mark.parametrize("answers", ["next", "yes"])
def test_a_filter_cannot_open_what_the_plugin_forbids(answers: str) -> None:
    """Whatever a filter has made of the name, the plugin is asked about the one that is opened."""

    class Renaming(NotesFilter):
        def may_open(self, next: Callable[[Session], bool], session: Session) -> bool:
            return answers == "yes" or next(session)

        def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
            return super().open(next, session.replace(export_name="secret"))

    events: list[str] = []
    it = Chain(Guarded("plugin", events), [Renaming("filter", events)])
    with pytest.raises(PermissionError):
        it.open(known_as("CN=bob", "public"))
    assert "plugin open secret False" not in events
    it.open(known_as("CN=alice", "public"))
    assert "plugin open secret False" in events


@pytest.mark.parametrize("what", [None, 5, b"disk", Device])
def test_an_open_that_returns_no_device(what: Any) -> None:
    """One line; what a filter had opened is closed."""

    class WrongPlugin(NotesPlugin):
        def open(self, session: Session) -> Any:
            return what

    class WrongFilter(NotesFilter):
        def open(self, next: Callable[[Session], Layer], session: Session) -> Any:
            next(session)
            return what

    events: list[str] = []
    words = re.escape(f"open returned {what!r}, not a Device")
    with pytest.raises(OpenError, match=f"^plugin: {words}$"):
        Chain(WrongPlugin("plugin", events), [Filter()]).open(Session())
    with pytest.raises(OpenError, match=f"^filter: {words}$"):
        Chain(NotesPlugin("plugin", events), [WrongFilter("filter", events)]).open(Session())
    assert events == ["plugin open  False", "plugin close"]


def test_a_session_may_be_changed_for_the_layers_below() -> None:
    class ReadOnly(NotesFilter):
        def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
            return super().open(next, session.replace(readonly=True, export_name="other"))

    events: list[str] = []
    it = Chain(
        NotesPlugin("plugin", events),
        [ReadOnly("outer", events), NotesFilter("inner", events)],
    )
    session = Session(export_name="x")
    layer = it.open(session)
    assert "inner open other True" in events
    assert "plugin open other True" in events
    assert layer.session is session
    assert (session.export_name, session.readonly) == ("x", False)


def test_layers_are_named_after_whose_they_are() -> None:
    layer = chain([]).open(Session())
    assert layer.next is not None
    assert layer.next.next is not None
    assert (layer.where, layer.next.where, layer.next.next.where) == ("outer", "inner", "plugin")
    assert layer.next.next.next is None


@pytest.mark.parametrize("plugin", [None, False, True])
@pytest.mark.parametrize("device", [None, False, True])
def test_blocking_is_the_devices_or_else_the_plugins(
    device: bool | None, plugin: bool | None
) -> None:
    class Says(Plugin):
        blocking = plugin

        def open(self, session: Session) -> Device:
            made = NotesDevice(NotesPlugin("x", []))
            made.blocking = device
            return made

    assert Chain(Says()).open(Session()).may_block() is (plugin if device is None else device)
    assert Chain(Says(), [Filter()]).open(Session()).may_block() is (
        plugin if device is None else device
    )


# -- exports ---------------------------------------------------------------------------------------


def test_exports_pass_through_filters() -> None:
    class Renames(Filter):
        def list_exports(
            self, next: Callable[[], Iterable[Any]], readonly: bool, is_tls: bool
        ) -> Iterable[Any]:
            assert (readonly, is_tls) == (True, False)
            return [*next(), ("more", None)]

        def default_export(self, next: Callable[[], str], readonly: bool, is_tls: bool) -> str:
            return next() + "!"

    events: list[str] = []
    it = Chain(NotesPlugin("plugin", events), [Renames(), Filter()])
    assert it.list_exports(True, False) == [("a", ""), ("b", "described"), ("more", "")]
    assert it.default_export(False, True) == "a!"
    assert events == ["plugin list_exports True False", "plugin default_export False True"]


def test_exports_unless_the_plugin_says() -> None:
    """The default export alone."""

    class Default(Plugin):
        def default_export(self, readonly: bool, is_tls: bool) -> str:
            return "main"

    assert Chain(Plugin()).list_exports(False, False) == [("", "")]
    assert Chain(Default()).list_exports(False, False) == [("main", "")]


@pytest.mark.parametrize("answer", [None, 5, "ab", b"ab"])
def test_no_list_of_exports(answer: Any) -> None:
    """A text is no list of letters."""

    class Wrong(Plugin):
        def list_exports(self, readonly: bool, is_tls: bool) -> Any:
            return answer

    with pytest.raises(OpenError, match=f"^list_exports returned {answer!r}, not a list of names"):
        Chain(Wrong()).list_exports(False, False)


@pytest.mark.parametrize("item", [5, None, (1, "x"), ("x", 5), ("x", "y", "z"), ("x",), b"x"])
def test_wrong_exports(item: object) -> None:
    """One line, whatever was returned."""

    class Wrong(Plugin):
        def list_exports(self, readonly: bool, is_tls: bool) -> Any:
            return ["good", item]

    with pytest.raises(OpenError, match=r"^list_exports: .* is neither a name nor") as caught:
        Chain(Wrong()).list_exports(False, False)
    assert repr(item) in str(caught.value)


def test_wrong_default_export() -> None:
    class Wrong(Plugin):
        def default_export(self, readonly: bool, is_tls: bool) -> Any:
            return None

    with pytest.raises(OpenError, match=r"^default_export returned None, not a text$"):
        Chain(Wrong()).default_export(False, False)
