"""Layer: what fills the gaps of a device, apart from FUA (which has its own matrix).

Devices here are made of a few methods, so that each test shows the whole of what is there.
"""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pynbdkit import CacheMode, Device, Flag, Fua, Layer, OpenError, Session, ZeroMode
from pynbdkit.complete import MAX_EXTENTS, ZERO_PIECE, check_block_size, exactly
from pynbdkit.filter import FilterDevice

OPERATIONS = ("pread", "unchecked_pread", "pwrite", "flush", "trim", "zero", "cache", "extents")
QUESTIONS = (
    "get_size", "block_size", "export_description", "can_write", "can_flush", "can_trim",
    "can_zero", "can_fast_zero", "can_extents", "can_fua", "can_multi_conn", "can_cache",
    "is_rotational",
)  # fmt: skip


class Calls(list[Any]):
    """Methods that note their calls here: ``calls.note("trim")``."""

    def note(self, name: str, fails: int = 0, returns: object = None) -> Callable[..., Any]:
        def method(*arguments: Any) -> Any:
            values = (bytes(a) if isinstance(a, memoryview) else a for a in arguments)
            self.append((name, *values))
            if fails:
                raise OSError(fails, "told to fail")
            return returns(*arguments) if callable(returns) else returns

        return method


def device(**methods: Any) -> Device:
    """A device with these methods; a value that cannot be called is what the method returns."""
    methods.setdefault("get_size", 1 << 20)
    methods.setdefault("pread", lambda count, offset, flags: bytes(count))
    made = Device()
    for name, method in methods.items():
        answer = method if callable(method) else lambda value=method: value
        setattr(made, name, answer)
    return made


def layer(readonly: bool = False, **methods: Any) -> Layer:
    return Layer(device(**methods), Session(readonly=readonly), "disk")


def above(below: Layer, readonly: bool = False, **methods: Any) -> Layer:
    """A filter's layer with these methods over another layer."""
    filter = FilterDevice(below)
    for name, method in methods.items():
        setattr(filter, name, method if callable(method) else lambda value=method: value)
    return Layer(filter, Session(readonly=readonly), "filter", below)


def noop(*_: Any) -> None: ...


# -- questions -------------------------------------------------------------------------------------


def test_the_smallest_device() -> None:
    """get_size and pread: a read-only disk."""
    small = layer()
    answers = {name: getattr(small, name)() for name in QUESTIONS}
    assert answers == {
        "get_size": 1 << 20,
        "block_size": (0, 0, 0),
        "export_description": None,
        "can_write": False,
        "can_flush": False,
        "can_trim": False,
        "can_zero": ZeroMode.NONE,
        "can_fast_zero": False,
        "can_extents": False,
        "can_fua": Fua.NONE,
        "can_multi_conn": False,
        "can_cache": CacheMode.NONE,
        "is_rotational": False,
    }


@pytest.mark.parametrize(
    ("methods", "question", "answer"),
    [
        ({"pwrite": noop}, "can_write", True),
        ({"pwrite_fua": noop}, "can_write", True),
        ({"pwrite": noop, "can_write": False}, "can_write", False),
        ({"pwrite": noop, "can_write": 1}, "can_write", True),
        ({"flush": noop}, "can_flush", True),
        ({"flush": noop, "can_flush": False}, "can_flush", False),
        ({"pwrite": noop, "trim": noop}, "can_trim", True),
        ({"trim": noop}, "can_trim", False),
        ({"pwrite": noop, "trim": noop, "can_trim": 0}, "can_trim", False),
        ({"pwrite": noop}, "can_zero", ZeroMode.EMULATE),
        ({"pwrite": noop, "zero": noop}, "can_zero", ZeroMode.NATIVE),
        ({"pwrite": noop, "zero": noop, "can_zero": False}, "can_zero", ZeroMode.EMULATE),
        ({"pwrite": noop, "can_zero": True}, "can_zero", ZeroMode.EMULATE),
        ({"pwrite": noop, "zero": noop}, "can_fast_zero", False),
        ({"pwrite": noop, "zero": noop, "can_fast_zero": True}, "can_fast_zero", True),
        ({"pwrite": noop, "can_fast_zero": True}, "can_fast_zero", False),
        ({"pwrite": noop, "zero": noop, "can_zero": False, "can_fast_zero": True},
         "can_fast_zero", False),
        ({"extents": noop}, "can_extents", True),
        ({"extents": noop, "can_extents": False}, "can_extents", False),
        ({"cache": noop}, "can_cache", CacheMode.NATIVE),
        ({"can_cache": CacheMode.EMULATE}, "can_cache", CacheMode.EMULATE),
        ({"can_multi_conn": True}, "can_multi_conn", True),
        ({"is_rotational": True}, "is_rotational", True),
        ({"export_description": "a disk"}, "export_description", "a disk"),
        ({"get_size": 0}, "get_size", 0),
        ({"get_size": (1 << 63) - 1}, "get_size", (1 << 63) - 1),
    ],
)  # fmt: skip
def test_answers(methods: dict[str, Any], question: str, answer: object) -> None:
    """plugin-contract.md, "The other capabilities", row by row; a filter hands all of them on."""
    plugin = layer(**methods)
    assert getattr(plugin, question)() == answer
    assert type(getattr(plugin, question)()) is type(answer)
    assert getattr(above(plugin), question)() == answer


def test_asked_once() -> None:
    """However often: the answer never changes while a connection lasts."""
    calls = Calls()
    answers = {"get_size": 512, "block_size": (1, 512, 4096), "export_description": "x"}
    cached = {"can_cache": 1, "can_fua": 0}
    methods: dict[str, Any] = {
        name: calls.note(name, returns=answers.get(name, cached.get(name, True)))
        for name in QUESTIONS
    }
    both = above(layer(pwrite=noop, flush=noop, trim=noop, zero=noop, extents=noop, **methods))
    for _ in range(3):
        for name in QUESTIONS:
            getattr(both, name)()
        for name in OPERATIONS:
            getattr(both, name)
    assert sorted(name for (name,) in calls) == sorted(QUESTIONS)


@pytest.mark.parametrize(
    ("methods", "question", "words"),
    [
        ({"get_size": None}, "get_size", "disk: get_size returned None, not a number of bytes"),
        ({"get_size": 1.5}, "get_size", "returned 1.5, not a number"),
        ({"get_size": True}, "get_size", "returned True, not a number"),
        ({"get_size": "1M"}, "get_size", "returned '1M', not a number"),
        ({"get_size": -1}, "get_size", "returned -1, not 0 to 2"),
        ({"get_size": 1 << 63}, "get_size", "not 0 to 2"),
        ({"can_cache": 3}, "can_cache", r"disk: can_cache returned 3 \(0, 1 or 2\)"),
        ({"can_cache": "native"}, "can_cache", "can_cache returned 'native'"),
        ({"can_cache": None}, "can_cache", "can_cache returned None"),
        ({"export_description": 5}, "export_description", "returned 5, not a text"),
        ({"block_size": 512}, "block_size", "returned 512, not .minimum, preferred, maximum."),
        ({"block_size": (512, 4096)}, "block_size", "not .minimum"),
        ({"block_size": (512, 4096, 1e9)}, "block_size", "not .minimum"),
        ({"block_size": ("1", "512", "4096")}, "block_size", "not .minimum"),
        ({"block_size": (0, 512, 4096)}, "block_size", "minimum must be a power of 2"),
        ({"pwrite": noop, "can_fua": 3}, "can_fua", "can_fua returned 3, not 0 .NONE"),
        (
            {"pwrite": noop, "can_flush": True},
            "can_fua",
            "can_flush is true, but there is no flush",
        ),
        ({"pwrite": noop, "can_trim": True}, "can_fua", "can_trim is true, but there is no trim"),
        ({"can_write": True}, "can_fua", "can_write is true, but there is no pwrite"),
    ],
)
def test_wrong_answers_refuse_the_open(methods: dict[str, Any], question: str, words: str) -> None:
    """With the layer's name; and a filter above does not hide it."""
    plugin = layer(**methods)
    with pytest.raises(OpenError, match=words):
        getattr(plugin, question)()
    with pytest.raises(OpenError, match=words):
        getattr(above(plugin), question)()


def test_no_size_or_pread() -> None:
    empty = Layer(Device(), Session(), "empty")
    with pytest.raises(OpenError, match=r"^empty: no get_size$"):
        empty.get_size()
    with pytest.raises(OpenError, match=r"^empty: no pread$"):
        _ = empty.pread


def test_errors_of_questions_are_passed_on() -> None:
    """And the question is asked again, for it has no answer yet."""
    calls = Calls()
    plugin = layer(pwrite=calls.note("can", fails=errno.EACCES), can_write=calls.note("q", fails=5))
    for _ in range(2):
        with pytest.raises(OSError, match="told to fail"):
            plugin.can_write()
    assert calls == [("q",), ("q",)]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_filter_answers_for_itself(question: str) -> None:
    answers: dict[str, Any] = {
        "get_size": 512,
        "block_size": (512, 512, 512),
        "export_description": "filtered",
        "can_zero": ZeroMode.EMULATE,
        "can_fua": Fua.EMULATE,
        "can_cache": CacheMode.EMULATE,
    }
    answer = answers.get(question, True)
    flush: dict[str, Any] = {"flush": noop} if question in ("can_flush", "can_fua") else {}
    zero: dict[str, Any] = {"zero": noop} if question == "can_fast_zero" else {}
    plugin = layer(pwrite=noop, trim=noop, **flush, **zero)
    assert getattr(above(plugin, **{question: answer}), question)() == answer


# -- block sizes -----------------------------------------------------------------------------------


def allowed(minimum: int, preferred: int, maximum: int) -> bool:
    """nbdkit-plugin(3), ".block_size", in other words."""
    powers = [1 << n for n in range(32)]
    return (
        minimum in powers
        and minimum <= 65536
        and preferred in powers
        and 512 <= preferred <= 32 << 20
        and minimum <= preferred <= maximum <= 0xFFFFFFFF
        and (maximum == 0xFFFFFFFF or maximum % minimum == 0)
    )


NUMBERS = st.one_of(
    st.sampled_from([1 << n for n in range(33)]),
    st.integers(0, 1 << 33),
    st.sampled_from([0, 513, 65535, 0xFFFFFFFF, 0xFFFFFFFE, 33 << 20]),
)


@given(NUMBERS, NUMBERS, NUMBERS)
@example(65536, 65536, 65536)
@example(131072, 131072, 131072)
@example(1, 256, 4096)
@example(1, 512, 512)
@example(1, 32 << 20, 0xFFFFFFFE)
@example(1, 64 << 20, 0xFFFFFFFF)
@example(512, 4096, 0xFFFFFFFF)
@example(512, 4096, 4096 + 256)
@example(4096, 512, 8192)
@example(0, 1, 1)
def test_block_sizes(minimum: int, preferred: int, maximum: int) -> None:
    answer = (minimum, preferred, maximum)
    if answer == (0, 0, 0) or allowed(*answer):
        assert check_block_size(list(answer), "disk") == answer
    else:
        with pytest.raises(OpenError, match=r"^disk: block_size .*m"):
            check_block_size(answer, "disk")


def test_no_largest_block() -> None:
    """-1 (as nbdkit-plugin(3) has it) stands for 2**32 - 1."""
    assert check_block_size((1, 4096, -1), "disk") == (1, 4096, 0xFFFFFFFF)


# -- pread -----------------------------------------------------------------------------------------

EIGHT = b"abcdefgh"


def mapped() -> mmap.mmap:
    view = mmap.mmap(-1, 4096)
    view[:8] = EIGHT
    return view


@pytest.mark.parametrize(
    "data",
    [
        EIGHT,
        bytearray(EIGHT),
        memoryview(EIGHT),
        memoryview(b"xx" + EIGHT + b"xx")[2:10],
        memoryview(b"a.b.c.d.e.f.g.h.")[::2],  # not contiguous
        array.array("H", [0x6261, 0x6463, 0x6665, 0x6867]),
        memoryview(EIGHT).cast("B", (2, 4)),
        (ctypes.c_ubyte * 8)(*EIGHT),
        mapped(),  # more than was asked for
        EIGHT + b"and more",
    ],
    ids=lambda data: type(data).__name__,
)
def test_pread_takes_any_buffer(data: Any) -> None:
    """Whatever gives bytes; of more than was asked for, the first."""
    read = layer(pread=lambda count, offset, flags: data).pread(8, 0, 0)
    assert bytes(read) == EIGHT
    assert len(read) == 8
    assert memoryview(read).c_contiguous  # a socket takes nothing else


def test_pread_does_not_copy() -> None:
    disk = bytearray(4096)
    whole = bytes(4096)
    assert layer(pread=lambda *_: whole).pread(4096, 0, 0) is whole
    read = layer(pread=lambda *_: memoryview(disk)[512:]).pread(512, 0, 0)
    disk[512] = 7
    assert read[0] == 7


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (EIGHT[:7], "pread returned 7 bytes instead of 8"),
        (b"", "pread returned 0 bytes instead of 8"),
        (None, "pread returned NoneType instead of 8 bytes"),
        ("abcdefgh", "pread returned str instead of 8 bytes"),
        ([1] * 8, "pread returned list instead of 8 bytes"),
        (8, "pread returned int instead of 8 bytes"),
    ],
)
def test_pread_that_returns_too_little(data: object, words: str) -> None:
    """EIO, and the plugin's author reads what is wrong; the same from below a filter."""
    plugin = layer(pread=lambda *_: data)
    for read in (plugin.pread, above(plugin).pread, lambda n, o, f: exactly(data, n)):
        with pytest.raises(OSError, match=f"^.Errno 5. {words}$") as caught:
            read(8, 0, 0)
        assert caught.value.errno == errno.EIO


def test_unchecked_pread_is_the_plugins_own() -> None:
    """The server checks what came back where it sends it: no second call in between."""
    plugin = device()
    below = Layer(plugin, Session(), "disk")
    assert below.unchecked_pread == plugin.pread
    assert above(below).unchecked_pread == plugin.pread


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["session", "can_write", "no pwrite", "session above"])
def test_read_only(why: str) -> None:
    """Nothing that writes is called, whatever exists."""
    calls = Calls()
    writes: dict[str, Any] = {name: calls.note(name) for name in ("pwrite", "trim", "zero")}
    if why == "no pwrite":
        del writes["pwrite"]
    disk = layer(
        readonly=why == "session",
        can_write=why != "can_write" and "pwrite" in writes,
        flush=calls.note("flush"),
        **writes,
    )
    if why == "session above":
        disk = above(disk, readonly=True)
    assert not disk.can_write()
    refused: list[Callable[[], None]] = [
        lambda: disk.pwrite(b"x", 0, 0),
        lambda: disk.trim(512, 0, 0),
        lambda: disk.zero(512, 0, 0),
    ]
    for call in refused:
        with pytest.raises(OSError, match="read-only") as caught:
            call()
        assert caught.value.errno == errno.EROFS
    assert calls == []
    disk.flush(0)
    assert calls == [("flush", 0)]


def test_what_is_missing_is_einval() -> None:
    plugin = layer(pwrite=noop)
    missing: list[Callable[[], None]] = [
        lambda: plugin.trim(512, 0, 0),
        lambda: plugin.flush(0),
    ]
    for call in missing:
        with pytest.raises(OSError, match="cannot") as caught:
            call()
        assert caught.value.errno == errno.EINVAL


def test_operations_get_their_arguments() -> None:
    calls = Calls()
    names = ("pwrite", "flush", "trim", "zero", "cache")
    methods: dict[str, Any] = {name: calls.note(name) for name in names}
    plugin = layer(can_fua=Fua.NATIVE, **methods)
    for disk in (plugin, above(plugin), above(above(plugin))):
        calls.clear()
        disk.pwrite(b"xy", 512, Flag.FUA)
        disk.flush(0)
        disk.trim(512, 1024, Flag.FUA)
        disk.zero(512, 2048, Flag.MAY_TRIM | Flag.FAST_ZERO | Flag.FUA)
        disk.cache(512, 4096, 0)
        assert calls == [
            ("pwrite", b"xy", 512, 2),
            ("flush", 0),
            ("trim", 512, 1024, 2),
            ("zero", 512, 2048, 11),
            ("cache", 512, 4096, 0),
        ]


# -- zero ------------------------------------------------------------------------------------------

NO_ZERO: dict[str, dict[str, Any]] = {
    "missing": {},
    "refused": {"zero": Calls().note("zero"), "can_zero": False},
    "EOPNOTSUPP": {"zero": Calls().note("zero", fails=errno.EOPNOTSUPP)},
    "ENOTSUP": {"zero": Calls().note("zero", fails=errno.ENOTSUP)},
}


@pytest.mark.parametrize("why", NO_ZERO)
@pytest.mark.parametrize("filters", [0, 1])
@pytest.mark.parametrize("count", [1, ZERO_PIECE - 1, ZERO_PIECE, ZERO_PIECE + 1, 5 * ZERO_PIECE])
def test_zero_by_pwrite(why: str, filters: int, count: int) -> None:
    """Zeros, in bounded pieces, that cover the range once, in order."""
    pieces = []

    def pwrite(buf: memoryview, offset: int, flags: int) -> None:
        assert not any(buf[:4096])
        assert flags == 0
        pieces.append((offset, len(buf)))

    disk = layer(pwrite=pwrite, **NO_ZERO[why])
    if filters:
        disk = above(disk)
    disk.zero(count, 12345, Flag.MAY_TRIM)
    position = 12345
    for offset, length in pieces:
        assert offset == position
        assert 0 < length <= ZERO_PIECE
        position += length
    assert position == 12345 + count
    assert len(pieces) == -(-count // ZERO_PIECE)


@pytest.mark.parametrize("why", NO_ZERO)
@pytest.mark.parametrize("filters", [0, 1])
def test_fast_zero_is_never_written(why: str, filters: int) -> None:
    """EOPNOTSUPP at once, and no pwrite."""
    calls = Calls()
    disk = layer(pwrite=calls.note("pwrite"), **NO_ZERO[why])
    if filters:
        disk = above(disk)
    with pytest.raises(OSError) as caught:
        disk.zero(4096, 0, Flag.FAST_ZERO)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert calls == []


def test_zero_that_works_is_not_written() -> None:
    calls = Calls()
    layer(pwrite=calls.note("pwrite"), zero=calls.note("zero")).zero(4096, 0, Flag.MAY_TRIM)
    assert calls == [("zero", 4096, 0, 1)]


@pytest.mark.parametrize("fails", [errno.EIO, errno.ENOSPC, errno.EINVAL])
def test_other_errors_of_zero_are_errors(fails: int) -> None:
    """Only "not supported" is a reason to write instead."""
    calls = Calls()
    plugin = layer(pwrite=calls.note("pwrite"), zero=calls.note("zero", fails=fails))
    with pytest.raises(OSError) as caught:
        plugin.zero(4096, 0, 0)
    assert caught.value.errno == fails
    assert [name for name, *_ in calls] == ["zero"]


def test_a_failed_piece_is_the_last() -> None:
    calls = Calls()

    def full(buf: memoryview, offset: int, flags: int) -> None:
        calls.append(offset)
        if offset:
            raise OSError(errno.ENOSPC, "full")

    plugin = layer(pwrite=full, flush=calls.note("flush"))
    with pytest.raises(OSError, match="full"):
        plugin.zero(4 * ZERO_PIECE, 0, Flag.FUA)
    assert calls == [0, ZERO_PIECE]


def test_zero_modes_of_a_filter() -> None:
    """NONE: not offered. EMULATE: zeros go through the filter's own pwrite, zero is not called."""
    calls = Calls()
    plugin = layer(pwrite=calls.note("plugin pwrite"), zero=calls.note("plugin zero"))
    assert above(plugin, can_zero=ZeroMode.NONE).can_zero() == ZeroMode.NONE
    emulating = above(plugin, can_zero=ZeroMode.EMULATE, pwrite=calls.note("filter pwrite"))
    emulating.zero(512, 0, 0)
    assert [name for name, *_ in calls] == ["filter pwrite"]
    with pytest.raises(OpenError, match="filter: can_zero returned 7, not a ZeroMode"):
        above(plugin, can_zero=7).can_zero()


# -- cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [0, 1])
def test_cache_by_reading(filters: int) -> None:
    """EMULATE reads the range once, in bounded pieces, and throws it away."""
    calls = Calls()
    pread = calls.note("pread", returns=lambda count, offset, flags: bytes(count))
    disk = layer(pread=pread, can_cache=CacheMode.EMULATE, cache=calls.note("cache"))
    if filters:
        disk = above(disk)
    disk.cache(2 * ZERO_PIECE + 5, 100, 0)
    assert calls == [
        ("pread", ZERO_PIECE, 100, 0),
        ("pread", ZERO_PIECE, 100 + ZERO_PIECE, 0),
        ("pread", 5, 100 + 2 * ZERO_PIECE, 0),
    ]


def test_cache_none() -> None:
    """Nothing is done, even if somebody asks."""
    calls = Calls()
    layer(pread=calls.note("pread"), cache=calls.note("cache"), can_cache=0).cache(512, 0, 0)
    assert calls == []


def test_cache_emulated_by_a_filter_reads_through_it() -> None:
    calls = Calls()
    plugin = layer(cache=calls.note("plugin cache"))
    pread = calls.note("filter pread", returns=bytes(512))
    above(plugin, can_cache=CacheMode.EMULATE, pread=pread).cache(512, 0, 0)
    assert calls == [("filter pread", 512, 0, 0)]


def test_a_filter_that_reads_differently_caches_what_it_reads() -> None:
    calls = Calls()
    plugin = layer(pread=calls.note("plugin pread"), can_cache=CacheMode.EMULATE)
    above(plugin, pread=calls.note("filter pread", returns=bytes(512))).cache(512, 0, 0)
    assert calls == [("filter pread", 512, 0, 0)]


# -- extents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [{}, {"extents": noop, "can_extents": False}])
def test_everything_is_allocated(methods: dict[str, Any]) -> None:
    plugin = layer(**methods)
    for disk in (plugin, above(plugin)):
        assert disk.extents(4096, 512, 0) == [(512, 4096, 0)]


def test_extents_are_checked_and_joined() -> None:
    """What a plugin answers is clipped to the range and its neighbours joined."""
    answer = [(0, 1000, 3), (1000, 24, 3), (1024, 1024, 0), (2048, 10000, 1)]
    plugin = layer(extents=lambda *_: iter(answer))
    for disk in (plugin, above(plugin)):
        assert disk.extents(2048, 512, 0) == [(512, 512, 3), (1024, 1024, 0), (2048, 512, 1)]
        assert disk.extents(2048, 512, Flag.REQ_ONE) == [(512, 512, 3)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([], "extents: no extent covers the offset 512"),
        ([(0, 100, 0), (200, 1000, 0)], "extents: extent starts at 200"),
        ([(0, 1024, 9)], "extents: extent at 0: unknown type 9"),
        ([(0, 1024)], "extents: "),
        (None, "extents: "),
        ("nonsense", "extents: "),
        ([(0, "1024", 0)], "extents: "),
    ],
)
def test_wrong_extents_are_eio(answer: object, words: str) -> None:
    plugin = layer(extents=lambda *_: answer)
    with pytest.raises(OSError, match=words) as caught:
        plugin.extents(1024, 512, 0)
    assert caught.value.errno == errno.EIO


def test_extents_are_bounded() -> None:
    """An answer with an extent for every other byte is cut off: a right answer to less."""
    answer = ((byte, 1, byte & 1) for byte in range(1 << 40))
    result = layer(extents=lambda *_: answer).extents(1 << 30, 0, 0)
    assert len(result) == MAX_EXTENTS


def test_extents_of_a_filter() -> None:
    plugin = layer(extents=lambda count, offset, flags: [(offset, count, 3)])
    assert above(plugin, can_extents=False).extents(512, 0, 0) == [(0, 512, 0)]
    data = above(plugin, extents=lambda count, offset, flags: [(offset, count * 2, 0)])
    assert data.extents(512, 0, 0) == [(0, 512, 0)]


# -- a filter that changes nothing -----------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "everything, native": dict.fromkeys(("pwrite", "flush", "trim", "zero", "cache"), noop)
    | {"extents": noop, "can_fua": Fua.NATIVE},
    "everything, emulated": dict.fromkeys(("pwrite", "flush", "trim", "zero"), noop)
    | {"can_cache": CacheMode.EMULATE},
    "no FUA": {"pwrite": noop, "zero": noop, "trim": noop},
    "write only": {"pwrite": noop},
    "the draft's forms": {"pwrite_fua": noop, "trim_fua": noop, "zero_fua": noop},
    "read-only": {},
    "refusing": {"pwrite": noop, "zero": noop, "extents": noop, "cache": noop, "can_zero": False,
                 "can_extents": False, "can_cache": CacheMode.NONE},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_overridden_costs_nothing(kind: str) -> None:
    """Each operation is the very one of the layer below: not a call in between."""
    plugin = layer(**KINDS[kind])
    top = above(above(plugin))
    for name in OPERATIONS:
        assert getattr(top, name) is getattr(plugin, name), name
    for name in QUESTIONS:
        assert getattr(top, name)() == getattr(plugin, name)(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "operation", ["pread", "pwrite", "flush", "trim", "zero", "cache", "extents"]
)
def test_only_what_is_overridden_differs(kind: str, operation: str) -> None:
    """Overriding one operation leaves the others bound to the layer below."""
    plugin = layer(**KINDS[kind])
    changed: dict[str, Any] = {operation: noop}
    top = above(plugin, **changed)
    together = {"pread": {"unchecked_pread", "cache"}, "pwrite": {"zero"}}
    for name in OPERATIONS:
        if name != operation and name not in together.get(operation, ()):
            assert getattr(top, name) is getattr(plugin, name), name


def test_native_methods_are_bound_straight() -> None:
    """Where nothing has to be added, the server calls the plugin's own method."""
    plugin = device(pwrite=noop, flush=noop, trim=noop, cache=noop, can_fua=Fua.NATIVE)
    disk = Layer(plugin, Session(), "disk")
    for name in ("pwrite", "flush", "trim", "cache"):
        assert getattr(disk, name) is getattr(plugin, name), name


def test_unknown_attributes() -> None:
    with pytest.raises(AttributeError, match="reboot"):
        _ = layer().reboot


# -- waiting and closing ---------------------------------------------------------------------------


@pytest.mark.parametrize("filter", [None, False, True])
@pytest.mark.parametrize("plugin", [None, False, True])
def test_who_may_wait(plugin: bool | None, filter: bool | None) -> None:
    """The worst of the layers: one that waits decides; one that does not know casts doubt."""
    below = layer()
    below.device.blocking = plugin
    top = above(below)
    top.device.blocking = filter
    worst = True if True in (plugin, filter) else None if None in (plugin, filter) else False
    assert top.may_block() is worst


def test_close_is_called_outermost_first() -> None:
    calls = Calls()
    above(above(layer(close=calls.note("plugin"))), close=calls.note("filter")).close()
    assert calls == [("filter",), ("plugin",)]


def test_every_layer_is_closed_whatever_fails() -> None:
    calls = Calls()
    plugin = layer(close=calls.note("plugin", fails=errno.EIO))
    middle = above(plugin, close=calls.note("middle", fails=errno.ENOSPC))
    with pytest.raises(OSError, match="told to fail"):
        above(middle, close=calls.note("top")).close()
    assert calls == [("top",), ("middle",), ("plugin",)]
