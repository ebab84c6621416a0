"""API version 2: what callbacks are called with, what their answers and their mistakes do."""

from __future__ import annotations

import errno
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import pytest

import pynbdkit
from pynbdkit import log
from pynbdkit.adapters.script import ScriptPlugin
from pynbdkit.complete import Layer
from pynbdkit.device import Device
from pynbdkit.errors import OpenError
from pynbdkit.flags import Flag, Fua

BASE = """
import errno, nbdkit
API_VERSION = 2
calls = []
def open(readonly): return "handle"
def get_size(h): return 1048576
def pread(h, buf, offset, flags): buf[:] = b"x" * len(buf)
"""

Opener = Callable[..., Layer]


@pytest.fixture
def layer(layer: Opener) -> Opener:
    return lambda *parts: layer(BASE, *parts)


@pytest.fixture
def load(load: Callable[..., ScriptPlugin]) -> Callable[..., ScriptPlugin]:
    return lambda *parts: load(BASE, *parts)


def script(layer: Layer) -> dict[str, Any]:
    """The globals of the script behind a layer."""
    names: dict[str, Any] = vars(layer.device)["script"]
    return names


def calls(layer: Layer) -> list[Any]:
    """What the script noted of its calls."""
    noted: list[Any] = script(layer)["calls"]
    return noted


# -- what exists ---------------------------------------------------------------------------------


def test_a_device_has_what_the_script_has(layer: Opener) -> None:
    bare = layer()
    methods = [name for name in vars(Device) if callable(getattr(Device, name))]
    assert [name for name in methods if bare.own(name)] == ["get_size", "pread"]
    assert not bare.can_write()


def test_the_drafts_forms_are_not_of_this_version(layer: Opener) -> None:
    opened = layer("def pwrite_fua(*_): pass\ndef trim_fua(*_): pass\ndef zero_fua(*_): pass")
    for name in ("pwrite_fua", "trim_fua", "zero_fua"):
        assert opened.own(name) is None
    assert not opened.can_write()


def test_names_that_are_not_functions_are_the_scripts_own(layer: Opener) -> None:
    opened = layer("cache = {}\nzero = b'0'\ncan_write = False\nextents = []")
    assert opened.own("cache") is opened.own("zero") is opened.own("extents") is None


# -- pread and pwrite ----------------------------------------------------------------------------


def test_pread_fills_through_slices(layer: Opener) -> None:
    opened = layer(
        "import io",
        "def pread(h, buf, offset, flags):",
        "    calls.append((h, offset, flags))",
        "    buf[:2] = b'ab'",
        "    io.BytesIO(b'cd').readinto(buf[2:])",
    )
    assert opened.pread(4, 77, 0) == b"abcd"
    assert calls(opened) == [("handle", 77, 0)]


def test_a_buffer_belongs_to_one_request(layer: Opener) -> None:
    opened = layer(
        "kept = []",
        "def pread(h, buf, offset, flags):",
        "    for old in kept: old[:] = b'?' * len(old)",
        "    kept[:] = [buf] if offset else []",
        "    buf[:] = bytes([65 + offset]) * len(buf)",
    )
    first, second = opened.pread(3, 0, 0), opened.pread(3, 1, 0)
    assert (first, second) == (b"AAA", b"BBB")


def test_what_is_not_filled_is_zeros(layer: Opener) -> None:
    assert layer("def pread(*_): pass").pread(3, 0, 0) == bytes(3)


@pytest.mark.parametrize(
    "body",
    ["buf[:] = b'short'", "buf[:] = b'x' * (len(buf) + 1)", "buf[:] = 'text'", "buf.append(1)"],
)
def test_a_buffer_keeps_its_size(layer: Opener, body: str) -> None:
    opened = layer(f"def pread(h, buf, offset, flags): {body}")
    with pytest.raises(Exception, match=r".") as caught:
        opened.pread(512, 0, 0)
    assert not isinstance(caught.value, OSError), "it is EIO by saying nothing of an errno"


@pytest.mark.parametrize("data", [b"data", bytearray(b"data"), memoryview(b"data")])
def test_pwrite_gets_a_read_only_view(layer: Opener, data: Any) -> None:
    opened = layer("def pwrite(*a): calls.append((a, type(a[1]), a[1].readonly, bytes(a[1])))")
    opened.pwrite(data, 5, 0)
    ((arguments, kind, readonly, content),) = calls(opened)
    assert (arguments[0], *arguments[2:]) == ("handle", 5, 0)
    assert (kind, readonly, content) == (memoryview, True, b"data")


def test_flags_are_handed_on(layer: Opener) -> None:
    opened = layer(
        "def pwrite(h, buf, offset, flags): calls.append(('pwrite', flags))",
        "def flush(h, flags): calls.append(('flush', flags))",
        "def trim(h, count, offset, flags): calls.append(('trim', count, offset, flags))",
        "def zero(h, count, offset, flags): calls.append(('zero', count, offset, flags))",
        "def cache(h, count, offset, flags): calls.append(('cache', count, offset, flags))",
        "def extents(h, count, offset, flags):",
        "    calls.append(('extents', count, offset, flags))",
        "    return [(offset, count, nbdkit.EXTENT_HOLE)]",
        "def can_fua(h): return nbdkit.FUA_NATIVE",
        "def can_fast_zero(h): return True",
    )
    assert opened.can_fua() == Fua.NATIVE
    opened.pwrite(b"x", 0, Flag.FUA)
    opened.flush(0)
    opened.trim(1, 2, Flag.FUA)
    opened.zero(3, 4, Flag.FUA | Flag.MAY_TRIM | Flag.FAST_ZERO)
    opened.cache(5, 6, 0)
    assert opened.extents(7, 8, Flag.REQ_ONE) == [(8, 7, 1)]
    assert calls(opened) == [
        ("pwrite", 2),
        ("flush", 0),
        ("trim", 1, 2, 2),
        ("zero", 3, 4, 11),
        ("cache", 5, 6, 0),
        ("extents", 7, 8, 4),
    ]


# -- extents -------------------------------------------------------------------------------------


def test_extents_from_a_generator(layer: Opener) -> None:
    opened = layer(
        "def extents(h, count, offset, flags):",
        "    yield [offset, 10, 0]",
        "    yield (offset + 10, count - 10, nbdkit.EXTENT_ZERO)",
    )
    assert opened.extents(30, 5, 0) == [(5, 10, 0), (15, 20, 2)]


@pytest.mark.parametrize(
    "answer",
    [
        "None",
        "5",
        "[5]",
        "[(0, 512)]",
        "[(0, 512, 0, 0)]",
        "[(0, '512', 0)]",
        "[(0, 5.0, 0)]",
        "[(0, 5, None)]",
    ],
)
def test_extents_that_are_no_extents(layer: Opener, answer: str) -> None:
    opened = layer(f"def extents(h, count, offset, flags): return {answer}")
    with pytest.raises(OSError, match=r"extents returned .*, not a list of") as caught:
        opened.extents(512, 0, 0)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    "answer", ["[]", "[(512, 512, 0)]", "[(0, -1, 0)]", "[(0, 1, 0), (2, 1, 0)]"]
)
def test_extents_against_the_rules(layer: Opener, answer: str) -> None:
    opened = layer(f"def extents(h, count, offset, flags): return {answer}")
    with pytest.raises(OSError, match="extents: ") as caught:
        opened.extents(512, 0, 0)
    assert caught.value.errno == errno.EIO


def test_an_exception_in_a_generator_is_the_callbacks(layer: Opener) -> None:
    opened = layer(
        "def extents(h, count, offset, flags):",
        "    nbdkit.set_error(errno.ENOMEM)",
        "    raise RuntimeError('later')",
        "    yield",
    )
    with pytest.raises(OSError, match="later") as caught:
        opened.extents(512, 0, 0)
    assert caught.value.errno == errno.ENOMEM


# -- questions -----------------------------------------------------------------------------------

TRUTHS = [
    ("True", True),
    ("False", False),
    ("1", True),
    ("0", False),
    ("None", None),
    ("2", None),
    ("'yes'", None),
    ("[1]", None),
]


@pytest.mark.parametrize(("text", "meaning"), TRUTHS)
@pytest.mark.parametrize("question", ["can_write", "can_multi_conn", "is_rotational", "can_trim"])
def test_yes_and_no(
    layer: Opener,
    capsys: pytest.CaptureFixture[str],
    question: str,
    text: str,
    meaning: bool | None,
) -> None:
    opened = layer(f"def {question}(h): return {text}\ndef pwrite(*_): pass\ndef trim(*_): pass")
    assert getattr(opened, question)() is bool(meaning)
    warned = capsys.readouterr().err
    if meaning is None:
        assert f"disk.py: {question} returned {text}, which is neither True nor False" in warned
    else:
        assert not warned


@pytest.mark.parametrize("text", ["'5'", "-1", "5.5", "True", "None", "2**63"])
def test_sizes_that_are_no_sizes(layer: Opener, text: str) -> None:
    with pytest.raises(OpenError, match=r"get_size returned .*, not "):
        layer(f"def get_size(h): return {text}").get_size()


def test_other_integers_are_sizes(layer: Opener) -> None:
    opened = layer(
        "class Number:\n  def __index__(self): return 512\ndef get_size(h): return Number()"
    )
    assert opened.get_size() == 512
    assert type(opened.get_size()) is int


def test_descriptions(layer: Opener, capsys: pytest.CaptureFixture[str]) -> None:
    assert layer("def export_description(h): return 'mine'").export_description() == "mine"
    assert layer("def export_description(h): return None").export_description() is None
    assert not capsys.readouterr().err
    assert layer("def export_description(h): return 5").export_description() is None
    assert "export_description returned 5, which is not a text" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["can_fua", "can_cache", "block_size"])
@pytest.mark.parametrize("text", ["7", "-1", "'x'", "None", "(1, 2)"])
def test_answers_that_refuse_the_client(layer: Opener, question: str, text: str) -> None:
    opened = layer(f"def {question}(h): return {text}\ndef pwrite(*_): pass\ndef flush(*_): pass")
    with pytest.raises(OpenError, match=f"{question} returned"):
        getattr(opened, question)()


# -- errors --------------------------------------------------------------------------------------

OPERATIONS = {
    "pread": lambda opened: opened.pread(512, 0, 0),
    "pwrite": lambda opened: opened.pwrite(b"x", 0, 0),
    "flush": lambda opened: opened.flush(0),
    "trim": lambda opened: opened.trim(1, 0, 0),
    "zero": lambda opened: opened.zero(1, 0, 0),
    "cache": lambda opened: opened.cache(1, 0, 0),
    "extents": lambda opened: opened.extents(1, 0, 0),
    "get_size": lambda opened: opened.get_size(),
    "can_write": lambda opened: opened.can_write(),
    "can_fua": lambda opened: opened.can_fua(),
    "close": lambda opened: opened.close(),
}


def failing(name: str, *body: str) -> str:
    text = "".join(f"    {line}\n" for line in body)
    rest = "" if name == "pwrite" else "def pwrite(*_): pass\n"
    return f"{rest}def {name}(*_):\n{text}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_set_error_decides(layer: Opener, name: str) -> None:
    opened = layer(failing(name, "nbdkit.set_error(errno.ENOSPC)", "raise KeyError('why')"))
    with pytest.raises(OSError, match=r"KeyError: 'why' \(set_error: ENOSPC\)") as caught:
        OPERATIONS[name](opened)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        ("OSError(errno.ENOSPC, 'full')", OSError, r"OSError: \[Errno 28\] full"),
        ("MemoryError()", OSError, "MemoryError"),
        ("SystemExit(3)", OSError, "SystemExit: 3"),
        ("ValueError('odd')", ValueError, "odd"),
    ],
)
def test_without_set_error_it_is_eio(
    layer: Opener, name: str, raised: str, kind: type[Exception], text: str
) -> None:
    opened = layer(failing(name, f"raise {raised}"))
    with pytest.raises(kind, match=text) as caught:
        OPERATIONS[name](opened)
    assert getattr(caught.value, "errno", errno.EIO) == errno.EIO


def test_set_error_counts_for_its_own_call_alone(layer: Opener) -> None:
    opened = layer(
        "def pread(h, buf, offset, flags): nbdkit.set_error(errno.ENOMEM)",
        "def flush(h, flags): raise RuntimeError('plain')",
    )
    opened.pread(512, 0, 0)
    with pytest.raises(RuntimeError, match="plain"):
        opened.flush(0)


def test_set_error_counts_for_its_own_thread_alone(layer: Opener) -> None:
    """One call tells its errno, then another in a second thread; the first call fails first."""
    opened = layer(
        "def pwrite(h, buf, offset, flags):",
        "    nbdkit.set_error(offset)",
        "    meanwhile[offset]()",
        "    raise RuntimeError",
    )
    found: list[int | None] = []
    told, failed = Event(), Event()

    def write(number: int) -> None:
        with pytest.raises(OSError, match="set_error") as caught:
            opened.pwrite(b"x", number, 0)
        found.append(caught.value.errno)

    thread = Thread(target=write, args=(errno.EPERM,))

    def let_the_other_tell() -> None:
        thread.start()
        assert told.wait(20)

    def wait_for_the_other_to_fail() -> None:
        told.set()
        failed.wait(20)

    script(opened)["meanwhile"] = {
        errno.ENOSPC: let_the_other_tell,
        errno.EPERM: wait_for_the_other_to_fail,
    }
    write(errno.ENOSPC)
    failed.set()
    thread.join()
    assert found == [errno.ENOSPC, errno.EPERM]


ZERO = """
def zero(h, count, offset, flags):
    {}
    raise OSError(errno.EOPNOTSUPP, "cannot zero")
def pwrite(h, buf, offset, flags):
    calls.append((len(buf), any(buf), offset))
"""


def test_zero_falls_back_when_set_error_says_so(layer: Opener) -> None:
    opened = layer(ZERO.format("nbdkit.set_error(errno.EOPNOTSUPP)"))
    opened.zero(1000, 24, 0)
    assert calls(opened) == [(1000, False, 24)]


def test_zero_does_not_fall_back_on_a_librarys_error(layer: Opener) -> None:
    opened = layer(ZERO.format("pass"))
    with pytest.raises(OSError, match="cannot zero") as caught:
        opened.zero(1000, 24, 0)
    assert caught.value.errno == errno.EIO
    assert calls(opened) == []


def test_the_log_shows_the_scripts_traceback_and_what_led_to_it(
    layer: Opener, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_seen", set())
    opened = layer(
        "def lookup(key):",
        "    try:",
        "        return {}[key]",
        "    except KeyError:",
        "        nbdkit.set_error(errno.ENOSPC)",
        "        raise RuntimeError('no room')",
        "def pwrite(h, buf, offset, flags): lookup('key')",
    )
    for _ in range(2):
        with pytest.raises(OSError, match="no room") as caught:
            opened.pwrite(b"x", 0, 0)
        log.exception("pwrite", caught.value)
    shown = capsys.readouterr().err
    assert shown.count("error: pwrite: RuntimeError: no room (set_error: ENOSPC)") == 2
    assert shown.count("Traceback") == 2  # of the KeyError and of what it led to: once each
    assert "return {}[key]" in shown
    assert "raise RuntimeError('no room')" in shown
    assert "in lookup" in shown


def test_a_wrong_signature_says_so(layer: Opener) -> None:
    opened = layer("def pwrite(h, buf): pass")
    with pytest.raises(TypeError, match=r"pwrite\(\) takes 2 positional arguments but 4 were"):
        opened.pwrite(b"x", 0, 0)


# -- over the wire -------------------------------------------------------------------------------


def test_every_errno_reaches_the_client(
    nbd: Any, connect: Callable[..., Any], load: Callable[..., ScriptPlugin]
) -> None:
    """The contract's list, EIO for the rest (a script's ENOENT is no word of the protocol)."""
    plugin = load(
        "def get_size(h): return 1 << 20",
        "def pwrite(h, buf, offset, flags):",
        "    nbdkit.set_error(offset)",
        "    raise RuntimeError('told to fail')",
    )
    expected = {
        errno.EPERM: errno.EPERM,
        errno.EROFS: errno.EPERM,
        errno.EIO: errno.EIO,
        errno.ENOMEM: errno.ENOMEM,
        errno.EINVAL: errno.EINVAL,
        errno.ENOSPC: errno.ENOSPC,
        errno.EFBIG: errno.ENOSPC,
        errno.EDQUOT: errno.ENOSPC,
        errno.EOVERFLOW: errno.EOVERFLOW,
        errno.ENOTSUP: errno.ENOTSUP,
        errno.ESHUTDOWN: errno.ESHUTDOWN,
        errno.ENOENT: errno.EIO,
        4321: errno.EIO,
        0: errno.EIO,
    }
    found = {}
    with pynbdkit.serve(plugin) as server:
        h = connect(server)
        for number in expected:
            with pytest.raises(nbd.Error) as caught:
                h.pwrite(b"x", number)
            found[number] = caught.value.errnum
        assert h.pread(3, 0) == b"xxx", "the connection goes on"
        h.shutdown()
    assert found == expected


def test_a_parallel_script_runs_in_parallel(
    nbd: Any, connect: Callable[..., Any], load: Callable[..., ScriptPlugin]
) -> None:
    """Four reads meet in the script: with fewer at a time, the barrier breaks."""
    plugin = load(
        "import threading",
        "meeting = threading.Barrier(4, timeout=20)",
        "def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL",
        "def pread(h, buf, offset, flags):",
        "    meeting.wait()",
        "    buf[:] = bytes([offset]) * len(buf)",
    )
    with pynbdkit.serve(plugin) as server:
        h = connect(server)
        buffers = [nbd.Buffer(16) for _ in range(4)]
        cookies = [h.aio_pread(buffer, number) for number, buffer in enumerate(buffers)]
        while h.aio_in_flight():
            h.poll(-1)
        assert all(h.aio_command_completed(cookie) for cookie in cookies)
        for number, buffer in enumerate(buffers):
            assert buffer.to_bytearray() == bytes([number]) * 16
        h.shutdown()


def test_handles_go_when_clients_go(
    connect: Callable[..., Any], load: Callable[..., ScriptPlugin]
) -> None:
    import gc
    import weakref

    plugin = load("class Handle: pass\ndef open(readonly):\n    h = Handle()\n    return h")
    seen: list[weakref.ref[Any]] = []
    real = plugin._names["open"]

    def counted(readonly: bool) -> Any:
        handle = real(readonly)
        seen.append(weakref.ref(handle))
        return handle

    plugin._names["open"] = counted
    with pynbdkit.serve(plugin) as server:
        h = connect(server)
        assert h.pread(3, 0) == b"xxx"
        assert seen[0]() is not None
        h.shutdown()
    gc.collect()
    assert [handle() for handle in seen] == [None]
