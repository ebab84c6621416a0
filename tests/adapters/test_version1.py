"""API version 1, the compatibility promise: each callback's form, and what does not exist here.

That FUA is kept in every combination of callbacks is the FUA matrix's to show.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

import pynbdkit
from pynbdkit.adapters.script import ScriptPlugin
from pynbdkit.complete import Layer
from pynbdkit.flags import CacheMode, Flag, Fua

BASE = """
import array, errno, nbdkit
calls = []
def open(readonly): return "handle"
def get_size(h): return 1048576
def pread(h, count, offset): return b"x" * count
"""

Opener = Callable[..., Layer]


@pytest.fixture
def layer(layer: Opener) -> Opener:
    return lambda *parts: layer(BASE, *parts)


def calls(layer: Layer) -> list[Any]:
    """What the script noted of its calls."""
    noted: list[Any] = vars(layer.device)["script"]["calls"]
    return noted


FORMS = """
def note(name, *arguments):
    calls.append((name, *(bytes(a) if isinstance(a, memoryview) else a for a in arguments)))
def pwrite(*a): note("pwrite", *a)
def flush(*a): note("flush", *a)
def trim(*a): note("trim", *a)
def zero(*a): note("zero", *a)
"""
DRAFT = """
def pwrite_fua(*a): note("pwrite_fua", *a)
def trim_fua(*a): note("trim_fua", *a)
def zero_fua(*a): note("zero_fua", *a)
"""


def test_the_forms(layer: Opener) -> None:
    opened = layer(FORMS)
    opened.pwrite(b"data", 5, 0)
    opened.flush(0)
    opened.trim(10, 20, 0)
    opened.zero(30, 40, 0)
    opened.zero(30, 40, Flag.MAY_TRIM)
    assert calls(opened) == [
        ("pwrite", "handle", b"data", 5),
        ("flush", "handle"),
        ("trim", "handle", 10, 20),
        ("zero", "handle", 30, 40, False),
        ("zero", "handle", 30, 40, True),
    ]
    assert all(type(call[-1]) is bool for call in calls(opened) if call[0] == "zero")


def test_the_drafts_forms_replace_them(layer: Opener) -> None:
    opened = layer(FORMS, DRAFT)
    assert opened.can_fua() == Fua.NATIVE
    for fua in (False, True):
        flag = Flag.FUA if fua else 0
        opened.pwrite(b"data", 5, flag)
        opened.trim(10, 20, flag)
        opened.zero(30, 40, flag | Flag.MAY_TRIM)
        assert calls(opened) == [
            ("pwrite_fua", "handle", b"data", 5, fua),
            ("trim_fua", "handle", 10, 20, fua),
            ("zero_fua", "handle", 30, 40, True, fua),
        ]
        assert all(type(call[-1]) is bool for call in calls(opened))
        calls(opened).clear()


def test_fua_is_kept_by_a_flush(layer: Opener) -> None:
    opened = layer(FORMS, "def can_fua(h): return nbdkit.FUA_NATIVE")
    opened.pwrite(b"data", 5, Flag.FUA)
    assert calls(opened) == [("pwrite", "handle", b"data", 5), ("flush", "handle")]


def test_writes_come_as_read_only_views(layer: Opener) -> None:
    for name in ("pwrite", "pwrite_fua"):
        opened = layer(
            f"def {name}(h, buf, *_): calls.append((type(buf), buf.readonly, bytes(buf)))"
        )
        opened.pwrite(bytearray(b"data"), 0, 0)
        assert calls(opened) == [(memoryview, True, b"data")]


def test_what_this_version_does_not_know_is_the_scripts_own(layer: Opener) -> None:
    opened = layer(
        "def cache(*_): raise RuntimeError",
        "def extents(*_): raise RuntimeError",
        "def can_cache(h): raise RuntimeError",
        "def can_extents(h): raise RuntimeError",
    )
    assert opened.can_cache() == CacheMode.NONE
    assert not opened.can_extents()
    assert opened.extents(512, 0, 0) == [(0, 512, 0)]


# -- pread ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "b'abcd'",
        "b'abcdefgh'",
        "bytearray(b'abcd')",
        "memoryview(b'abcdef')",
        "memoryview(bytearray(b'a.b.c.d.'))[::2]",
        "array.array('H', b'abcdef')",
    ],
)
def test_pread_returns_anything_like_bytes(layer: Opener, answer: str) -> None:
    opened = layer(f"def pread(h, count, offset): return {answer}")
    assert bytes(opened.pread(4, 0, 0)) == b"abcd"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("b'abc'", "pread returned 3 bytes instead of 4"),
        ("bytearray()", "pread returned 0 bytes instead of 4"),
        ("'text'", "pread returned str instead of 4 bytes"),
        ("None", "pread returned NoneType instead of 4 bytes"),
        ("[1, 2, 3, 4]", "pread returned list instead of 4 bytes"),
        ("4", "pread returned int instead of 4 bytes"),
    ],
)
def test_pread_that_returns_too_little_or_something_else(
    layer: Opener, answer: str, message: str
) -> None:
    opened = layer(f"def pread(h, count, offset): return {answer}")
    with pytest.raises(OSError, match=message) as caught:
        opened.pread(4, 0, 0)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("kind", ["scratch", "memoryview(scratch)"])
def test_pread_may_return_the_same_buffer_each_time(layer: Opener, kind: str) -> None:
    opened = layer(
        "scratch = bytearray(4)",
        "def pread(h, count, offset):",
        "    scratch[:] = bytes([offset]) * 4",
        f"    return {kind}",
    )
    first, second = opened.unchecked_pread(4, 1, 0), opened.unchecked_pread(4, 2, 0)
    assert (bytes(first), bytes(second)) == (b"\1\1\1\1", b"\2\2\2\2")


def test_a_disk_that_was_read_may_be_resized(layer: Opener) -> None:
    opened = layer(
        "disk = bytearray(8)",
        "def pread(h, count, offset): return memoryview(disk)[offset:offset + count]",
        "def pwrite(h, buf, offset): disk.extend(buf)",
    )
    data = opened.unchecked_pread(4, 0, 0)
    opened.pwrite(b"more", 8, 0)  # with a view still there, this is a BufferError
    assert bytes(data) == bytes(4)


def test_short_reads_over_the_wire(
    nbd: Any,
    connect: Callable[..., Any],
    load: Callable[..., ScriptPlugin],
    capfd: pytest.CaptureFixture[str],
) -> None:
    plugin = load(
        BASE, "def pread(h, count, offset): return b'x' * (count if offset else count - 1)"
    )
    with pynbdkit.serve(plugin) as server:
        h = connect(server)
        with pytest.raises(nbd.Error) as caught:
            h.pread(512, 0)
        assert caught.value.errnum == errno.EIO
        assert h.pread(512, 1) == b"x" * 512
        h.shutdown()
    shown = capfd.readouterr().err
    assert "pread: offset 0, count 512: pread returned 511 bytes instead of 512" in shown


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("pread", lambda opened: opened.pread(4, 0, 0)),
        ("pwrite", lambda opened: opened.pwrite(b"x", 0, 0)),
        ("flush", lambda opened: opened.flush(0)),
        ("trim", lambda opened: opened.trim(1, 0, 0)),
        ("zero", lambda opened: opened.zero(1, 0, 0)),
        ("pwrite_fua", lambda opened: opened.pwrite(b"x", 0, 0)),
        ("trim_fua", lambda opened: opened.trim(1, 0, 0)),
        ("zero_fua", lambda opened: opened.zero(1, 0, 0)),
        ("close", lambda opened: opened.close()),
    ],
)
def test_set_error_decides(layer: Opener, name: str, call: Callable[[Layer], object]) -> None:
    text = f"def {name}(*_):\n    if fails:\n        {{}}\n        raise OSError(2, 'inner')\n"
    rest = "fails = True\ndef flush(*_): pass\n" + (
        "" if name.startswith("pwrite") else "def pwrite(*_): pass\n"
    )
    opened = layer(rest, text.format("nbdkit.set_error(errno.ENOSPC)"))
    with pytest.raises(OSError, match=r"\[Errno 2\] inner \(set_error: ENOSPC\)") as caught:
        call(opened)
    assert caught.value.errno == errno.ENOSPC
    opened = layer(rest, text.format("pass"))
    with pytest.raises(OSError, match=r"\[Errno 2\] inner") as caught:
        call(opened)
    assert caught.value.errno == errno.EIO


def test_zero_falls_back(layer: Opener) -> None:
    opened = layer(
        FORMS,
        "def zero(h, count, offset, may_trim):",
        "    nbdkit.set_error(errno.EOPNOTSUPP)",
        "    raise RuntimeError",
    )
    opened.zero(3, 7, Flag.FUA)
    assert calls(opened) == [("pwrite", "handle", bytes(3), 7), ("flush", "handle")]
