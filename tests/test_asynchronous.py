"""Coroutines under the rules: what an asynchronous device is asked to do is what any device is.

The FUA table over the wire is the same as in test_fua_matrix, from the same model, for scripts and
classes whose callbacks are all `async def`. Beside it each rule's asynchronous form is held against
the one that it is the twin of, with devices of all kinds.
"""

from __future__ import annotations

import asyncio
import errno
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fua_subjects
import pynbdkit
from fua_driver import Driver, Log, check_all, join_pieces, report
from fua_model import (
    FUA_FORMS,
    LARGEST_PIECE,
    NATIVE,
    V2,
    Mood,
    Refused,
    Request,
    Subject,
    callback_sets,
    outcome,
    terms,
)
from pynbdkit import (
    CacheMode,
    Device,
    Extent,
    Filter,
    FilterDevice,
    Flag,
    Layer,
    LoadError,
    OpenError,
    Plugin,
    Session,
    ThreadModel,
)
from pynbdkit.asynchronous import ASKED, AsyncLayer, coroutines
from pynbdkit.chain import Chain
from pynbdkit.complete import ZERO_PIECE
from pynbdkit.device import is_async
from pynbdkit.loop import EventLoop

SIZE = 1 << 30
BOTH = (False, True)
ANSWERS = (None, "raises", "NONE", "EMULATE", "NATIVE", "True", "False", "7")
MOODS = (Mood.FAILS, Mood.FLUSH_FAILS)
REQUESTS = [
    *(
        Request(command, fua)
        for command, fua in product(("write", "trim", "zero", "read", "flush"), BOTH)
    ),
    *(Request(c, fua, mood=m) for c, fua, m in product(("write", "trim", "zero"), BOTH, MOODS)),
    *(Request("zero", fua, mood=Mood.NO_ZERO | m) for fua, m in product(BOTH, (Mood.FINE, *MOODS))),
    Request("zero", True, no_hole=True),
    Request("block status", True),
    Request("write", True),
]
PARALLEL = "\ndef thread_model():\n    return nbdkit.THREAD_MODEL_PARALLEL\n"


@pytest.fixture(scope="module")
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    made.keep()
    yield made
    made.close()


# -- the FUA table, over the wire ------------------------------------------------------------------


@contextmanager
def serving(nbd: ModuleType, folder: Path, subject: Subject, parallel: bool) -> Iterator[Driver]:
    if subject.form == NATIVE:
        model = ThreadModel.PARALLEL if parallel else ThreadModel.SERIALIZE_REQUESTS
        plugin = fua_subjects.native_plugin(model, asynchronous=True)
    else:
        path = folder / "plugin.py"
        path.write_text(fua_subjects.async_script(subject) + (PARALLEL if parallel else ""))
        plugin = pynbdkit.load_plugin(str(path))
    with pynbdkit.serve(plugin, unix=str(folder / "socket")) as server:
        yield Driver(nbd, str(server.socket), Log())


def check(
    nbd: ModuleType,
    folder: Path,
    parallel: bool,
    subjects: Sequence[Subject],
    requests: Sequence[Request],
) -> list[str]:
    return check_all(lambda subject: serving(nbd, folder, subject, parallel), subjects, requests)


@pytest.mark.parametrize("parallel", [False, True], ids=["serialized", "parallel"])
@pytest.mark.parametrize("form", [V2, NATIVE])
def test_every_row(nbd: ModuleType, sockdir: Path, form: str, parallel: bool) -> None:
    """Every set of callbacks, with every second answer of can_fua, with every request."""
    sets = [found for found in callback_sets() if form == NATIVE or not found & FUA_FORMS]
    subjects = [
        Subject(form, callbacks, answer)
        for number, callbacks in enumerate(sets)
        for answer in ANSWERS[(number % 2 if form == NATIVE else 0) :: 2 if form == NATIVE else 1]
    ]
    report(check(nbd, sockdir, parallel, subjects, REQUESTS))


@pytest.mark.parametrize("form", [V2, NATIVE])
def test_fast_zero_and_cache(nbd: ModuleType, sockdir: Path, form: str) -> None:
    subjects = [
        Subject(form, frozenset(callbacks), answer, can_fast_zero=True, caches=True)
        for callbacks, answer in product(
            (("pwrite", "zero"), ("pwrite", "flush", "zero"), ("pwrite", "flush")),
            (None, "EMULATE", "NATIVE"),
        )
    ]
    requests = [
        *(
            Request("zero", fua, fast=True, mood=m)
            for fua, m in product(BOTH, (Mood.FINE, Mood.NO_ZERO))
        ),
        *(Request("cache", fua) for fua in BOTH),
    ]
    report(check(nbd, sockdir, True, subjects, requests))


@pytest.mark.parametrize("form", [V2, NATIVE])
def test_large_zero(nbd: ModuleType, sockdir: Path, form: str) -> None:
    """Zeros larger than a piece: the flag on every piece, or one flush; nothing after a failure."""
    request = Request("zero", fua=True, mood=Mood.NO_ZERO, count=LARGEST_PIECE + 512)
    later = Request("zero", True, mood=Mood.NO_ZERO | Mood.LATER_FAILS, count=LARGEST_PIECE + 512)
    wrong: list[str] = []
    for callbacks, answer in product(
        ({"pwrite", "flush"}, {"pwrite", "zero", "flush"}), (None, "NATIVE")
    ):
        subject = Subject(form, frozenset(callbacks), answer)
        offer = terms(subject)
        assert not isinstance(offer, Refused)
        with serving(nbd, sockdir, subject, True) as driver:
            wrong += driver.check(subject, [request])
            client = driver.connect(subject)
            assert driver.send(client, later) == [errno.ENOSPC]
            client.shutdown()
            events = [event for event in driver.log.take() if event[0] != "zero"]
            pieces = [event[2] for event in events]
            assert len(pieces) == 2
            expected = [e for e in outcome(subject, offer, later).events if e[0] == "pwrite"]
            assert [e[:2] for e in join_pieces(events)] == [e[:2] for e in expected]
    report(wrong)


def test_pipelined_one_at_a_time(nbd: ModuleType, sockdir: Path) -> None:
    """Under serialize_requests what comes at once is called as if it came one by one."""
    requests = [Request(c, fua) for c, fua in product(("write", "trim", "zero"), BOTH)] * 3
    for answer in (None, "NATIVE"):
        callbacks = frozenset({"pwrite", "trim", "zero", "flush"})
        subject = Subject(NATIVE, callbacks, answer)
        with serving(nbd, sockdir, subject, False) as driver:
            report(driver.check_pipelined(subject, requests))


# -- each rule against its twin --------------------------------------------------------------------

METHODS = ("pwrite", "flush", "trim", "zero", "cache", "extents", *sorted(FUA_FORMS))
FAILURES = (0, errno.ENOSPC, errno.EOPNOTSUPP)


def disk(
    methods: frozenset[str],
    fails: dict[str, int],
    answers: dict[str, Any],
    asynchronous: frozenset[str],
    events: list[Any],
) -> Device:
    """A device that notes its calls; some of its methods are coroutines."""
    made = Device()

    def method(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            events.append((name, *(len(a) if isinstance(a, memoryview) else a for a in arguments)))
            if fails.get(name):
                raise OSError(fails[name], "told to fail")
            if name == "pread":
                return bytes(arguments[0])
            if name == "extents":
                count, offset, _ = arguments
                return [(offset, count // 2, 0), (offset + count // 2, count, 3)]
            return None

        async def coroutine(*arguments: Any) -> Any:
            await asyncio.sleep(0)
            return call(*arguments)

        return coroutine if name in asynchronous else call

    for name in ("pread", *methods):
        setattr(made, name, method(name))
    for name, answer in answers.items():
        setattr(made, name, lambda answer=answer: answer)
    made.get_size = lambda: SIZE  # type: ignore[method-assign]
    return made


answers = st.fixed_dictionaries(
    {},
    optional={
        "can_fua": st.sampled_from([0, 1, 2, True, False]),
        "can_flush": st.booleans(),
        "can_trim": st.booleans(),
        "can_zero": st.booleans(),
        "can_cache": st.sampled_from([0, 1, 2]),
        "can_extents": st.booleans(),
    },
)
calls = st.lists(
    st.tuples(
        st.sampled_from([name for name in ASKED if name != "block_status"]),
        st.sampled_from([1, 512, ZERO_PIECE + 512]),
        st.sampled_from([0, Flag.FUA, Flag.MAY_TRIM | Flag.FUA, Flag.FAST_ZERO, Flag.REQ_ONE]),
    ),
    max_size=6,
)


def ask(layer: Layer, name: str, count: int, flags: int, run: Callable[..., Any]) -> Any:
    """What one call returns or raises."""
    try:
        if name == "pwrite":
            return run(name, memoryview(bytes(count)), 512, flags & Flag.FUA)
        if name == "flush":
            return run(name, 0)
        if name == "trim":
            flags &= Flag.FUA
        elif name != "zero":
            flags &= Flag.REQ_ONE
        answer = run(name, count, 512, flags)
        return bytes(answer) if name == "pread" else answer
    except OSError as error:
        return error.errno


@settings(max_examples=300, deadline=None)
@given(
    methods=st.frozensets(st.sampled_from(METHODS)),
    fails=st.dictionaries(st.sampled_from(METHODS), st.sampled_from(FAILURES)),
    answers=answers,
    coroutine=st.frozensets(st.sampled_from(("pread", *METHODS)), min_size=1),
    calls=calls,
)
def test_the_same_as_without_coroutines(
    loop: EventLoop,
    methods: frozenset[str],
    fails: dict[str, int],
    answers: dict[str, Any],
    coroutine: frozenset[str],
    calls: list[tuple[str, int, int]],
) -> None:
    plain_events: list[Any] = []
    events: list[Any] = []
    plain = Layer(disk(methods, fails, answers, frozenset(), plain_events), Session(), "disk")
    device = disk(methods, fails, answers, coroutine, events)
    layer = AsyncLayer(device, Session(), "disk", loop)
    try:
        expected = plain.can_fua()
    except OpenError as refused:
        with pytest.raises(OpenError, match=str(refused).replace("(", "[(]").replace(")", "[)]")):
            layer.can_fua()
        return
    assert layer.can_fua() == expected
    for name, count, flags in calls:
        if (name == "trim" and not plain.can_trim()) or (name == "flush" and not plain.can_flush()):
            continue
        wanted = ask(plain, name, count, flags, lambda n, *a: getattr(plain, n)(*a))
        for run in (
            lambda n, *a: loop.wait(layer.coroutine(n)(*a)),
            lambda n, *a: getattr(layer, n)(*a),
        ):
            plain_events_of_call = plain_events[:]
            assert ask(layer, name, count, flags, run) == wanted
            assert events == plain_events_of_call
            events.clear()
        plain_events.clear()


def test_a_read_that_is_too_short(loop: EventLoop) -> None:
    class Short(Device):
        async def pread(self, count: int, offset: int, flags: int) -> bytes:
            return bytes(count - 1)

    layer = AsyncLayer(Short(), Session(), "disk", loop)
    with pytest.raises(OSError, match="511 bytes instead of 512") as caught:
        layer.pread(512, 0, 0)
    assert caught.value.errno == errno.EIO


def test_a_cache_is_emulated_by_reads_in_pieces(loop: EventLoop) -> None:
    class Disk(Device):
        def __init__(self) -> None:
            self.reads: list[tuple[int, int]] = []

        def can_cache(self) -> int:
            return CacheMode.EMULATE

        async def pread(self, count: int, offset: int, flags: int) -> bytes:
            self.reads.append((offset, count))
            return bytes(count)

    device = Disk()
    AsyncLayer(device, Session(), "disk", loop).cache(ZERO_PIECE + 1, 512, 0)
    assert device.reads == [(512, ZERO_PIECE), (512 + ZERO_PIECE, 1)]


def test_extents_and_block_status_from_asynchronous_generators(loop: EventLoop) -> None:
    class Disk(Device):
        asked = 0

        async def pread(self, count: int, offset: int, flags: int) -> bytes:
            return bytes(count)

        def contexts(self) -> list[str]:
            return ["example:odd"]

        async def extents(
            self, count: int, offset: int, flags: int
        ) -> AsyncIterator[tuple[int, int, int]]:
            position = offset
            while True:  # as long as somebody asks
                await asyncio.sleep(0)
                self.asked += 1
                yield position, 512, position // 512 % 2 * 3
                position += 512

        async def block_status(
            self, context: str, count: int, offset: int, flags: int
        ) -> AsyncIterator[tuple[int, int, int]]:
            yield offset, count, 1 << 40

    device = Disk()
    layer = AsyncLayer(device, Session(), "disk", loop)
    assert layer.extents(1024, 0, 0) == [Extent(0, 512, 0), Extent(512, 512, 3)]
    assert device.asked == 2
    assert layer.block_status("example:odd", 1024, 0, 0) == [Extent(0, 1024, 1 << 40)]


def test_questions_and_close_may_be_coroutines() -> None:
    """Also of a device whose operations are not: those stay where they were."""

    class Disk(Device):
        closed = False

        async def get_size(self) -> int:
            await asyncio.sleep(0)
            return 4096

        async def can_fua(self) -> int:
            return 2

        def pread(self, count: int, offset: int, flags: int) -> bytes:
            return bytes(count)

        def pwrite(self, buf: Any, offset: int, flags: int) -> None:
            pass

        async def close(self) -> None:
            self.closed = True

    chain = Chain(pynbdkit.embed._Devices(device := Disk()))
    chain.plugin.open = lambda session: device  # type: ignore[method-assign]
    layer = chain.open(Session())
    assert type(layer) is Layer
    assert (layer.get_size(), layer.can_fua()) == (4096, 2)
    assert layer.pread(1, 0, 0) == b"\0"
    layer.close()
    assert device.closed
    chain.unload()


# -- which requests need no thread -----------------------------------------------------------------


class Disk(Device):
    """Everything, and all of it does nothing."""

    def get_size(self) -> int:
        return SIZE

    async def pread(self, count: int, offset: int, flags: int) -> bytes:
        return bytes(count)

    async def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        pass

    async def flush(self, flags: int) -> None:
        pass

    async def trim(self, count: int, offset: int, flags: int) -> None:
        pass

    def zero(self, count: int, offset: int, flags: int) -> None:
        pass

    async def cache(self, count: int, offset: int, flags: int) -> None:
        pass


class DiskPlugin(Plugin):
    name = "disk"

    async def open(self, session: Session) -> Device:
        await asyncio.sleep(0)
        return Disk()


def above(**methods: Any) -> Filter:
    """A filter whose devices override these methods."""

    class Above(Filter):
        name = "above"

        def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
            made = type("AboveDevice", (FilterDevice,), methods)
            device: Device = made(next(session))
            return device

    return Above()


@contextmanager
def opened(*filters: Filter, readonly: bool = False) -> Iterator[Layer]:
    chain = Chain(DiskPlugin(), filters)
    chain.load()
    layer = chain.open(Session(readonly=readonly))
    layer.can_fua()
    yield layer
    layer.close()
    assert chain.unload() == []


def test_filters_that_leave_an_operation_alone_are_passed() -> None:
    with opened() as layer:
        assert set(coroutines(layer)) == set(ASKED)
        assert layer.asynchronous
    with opened(above(), above(get_size=lambda self: 512)) as layer:
        assert set(coroutines(layer)) == set(ASKED)
        assert layer.asynchronous
        assert layer.may_block()


@pytest.mark.parametrize(
    ("method", "stays"),
    [
        ("pread", set(ASKED) - {"pread"}),
        ("pwrite", set(ASKED) - {"pwrite"}),
        ("flush", set(ASKED) - {"flush"}),
        ("zero", set(ASKED) - {"zero"}),
    ],
)
def test_an_operation_that_a_filter_changes_is_not(method: str, stays: set[str]) -> None:
    def changed(self: FilterDevice, *arguments: Any) -> Any:
        return getattr(self.next, method)(*arguments)

    with opened(above(**{method: changed})) as layer:
        assert set(coroutines(layer)) == stays
        if method == "pread":
            assert layer.pread(3, 0, 0) == bytes(3)  # and it works, from a thread


def test_a_filter_that_answers_for_fua_changes_all_writes() -> None:
    with opened(above(can_fua=lambda self: 1)) as layer:
        assert set(coroutines(layer)) == set(ASKED) - {"pwrite", "trim", "zero"}


def test_read_only() -> None:
    with opened(above(), readonly=True) as layer:
        assert set(coroutines(layer)) == set(ASKED)
        with pytest.raises(OSError, match="read-only"):
            layer.pwrite(b"", 0, 0)


def test_operations_of_a_filter_cannot_be_coroutines() -> None:
    async def pread(self: Any, count: int, offset: int, flags: int) -> bytes:
        return bytes(count)

    chain = Chain(DiskPlugin(), [above(pread=pread)])
    with pytest.raises(OpenError, match="above: a filter's operations cannot be 'async def'"):
        chain.open(Session())
    chain.unload()


def test_a_filter_cannot_be_asked_asynchronously() -> None:
    """Nobody would await its answer, and a coroutine counts as yes."""

    class Gate(Filter):
        name = "gate"

        async def may_open(self, next: Any, session: Session) -> bool:  # type: ignore[override]
            return False

    with pytest.raises(LoadError, match="gate: may_open cannot be 'async def'"):
        Chain(DiskPlugin(), [Gate()]).load()


def test_what_comes_before_the_server_cannot_be_asynchronous() -> None:
    class Early(DiskPlugin):
        async def config(self, key: str, value: str) -> None:  # type: ignore[override]
            pass

    with pytest.raises(LoadError, match="config cannot be 'async def'"):
        Chain(Early()).load()


def test_may_open_of_a_plugin_is_awaited() -> None:
    class Closed(DiskPlugin):
        async def may_open(self, session: Session) -> bool:
            await asyncio.sleep(0)
            return session.export_name == "open"

    chain = Chain(Closed())
    assert not chain.may_open(Session(export_name="shut"))
    assert chain.may_open(Session(export_name="open"))
    with pytest.raises(PermissionError):
        chain.open(Session(export_name="shut"))
    chain.unload()


def test_lists_are_awaited() -> None:
    class Named(DiskPlugin):
        async def default_export(self, readonly: bool, is_tls: bool) -> str:
            await asyncio.sleep(0)
            return "main"

    class Listed(Named):
        async def list_exports(self, readonly: bool, is_tls: bool) -> list[str]:
            return ["one", "two"]

    for kind, names in ((Named, ["main"]), (Listed, ["one", "two"])):
        chain = Chain(kind(), [above()])
        assert [name for name, _ in chain.list_exports(False, False)] == names
        assert chain.default_export(False, False) == "main"
        chain.unload()


# -- what is a coroutine ---------------------------------------------------------------------------


class Callable_:
    async def __call__(self) -> None:
        pass


def test_is_async() -> None:
    async def coroutine() -> None:
        pass

    async def generator() -> AsyncIterator[int]:
        yield 1

    them = [coroutine, generator, functools.partial(coroutine), Callable_(), Disk().pread]
    others = [lambda: None, Disk().zero, len, 7, None, functools.partial(len), Device]
    assert [is_async(function) for function in them] == [True] * len(them)
    assert [is_async(function) for function in others] == [False] * len(others)


def test_what_is_awaited_without_being_async_def(loop: EventLoop) -> None:
    """A decorator hides it: the device says so, or another operation shows it."""

    def decorated(function: Any) -> Any:
        return lambda *arguments: function(*arguments)

    class Hidden(Device):
        asynchronous = True

        @decorated
        async def pread(self, count: int, offset: int, flags: int) -> bytes:
            await asyncio.sleep(0)
            return bytes(count)

    chain = Chain(pynbdkit.embed._Devices(Hidden))
    layer = chain.open(Session())
    assert isinstance(layer, AsyncLayer)
    assert layer.pread(3, 0, 0) == bytes(3)
    chain.unload()
