"""Messages: one line each, with the plugin's name, and a traceback once."""

from __future__ import annotations

import errno
import io
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit import Device, Layer, OpenError, Session, log


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test finds the log as a new process does."""
    monkeypatch.setattr(log, "verbose", False)
    monkeypatch.setattr(log, "_seen", set())
    yield
    log.use("stderr")
    log.set_name("")


Capture = pytest.CaptureFixture[str]


def test_forms(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    log.error("it broke")
    log.warning("it may break")
    log.debug("not shown")
    monkeypatch.setattr(log, "verbose", True)
    log.set_name("memory[3]")
    log.debug("shown")
    log.error("again")
    assert capsys.readouterr().err.splitlines() == [
        "pynbdkit: error: it broke",
        "pynbdkit: warning: it may break",
        "pynbdkit: memory[3]: debug: shown",
        "pynbdkit: memory[3]: error: again",
    ]


def test_name_is_the_threads_own(capsys: Capture) -> None:
    log.set_name("memory[1]")

    def work() -> None:
        log.error("no name")
        log.set_name("memory[2]")
        log.error("two")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    log.error("one")
    assert capsys.readouterr().err.splitlines() == [
        "pynbdkit: error: no name",
        "pynbdkit: memory[2]: error: two",
        "pynbdkit: memory[1]: error: one",
    ]


@given(st.text())
def test_a_message_is_one_line(text: str) -> None:
    """Whatever a client sent: no line of its own, no control of the terminal; plain text as is."""
    lines: list[str] = []
    sink, log._sink = log._sink, lines.append
    try:
        log.error(text)
    finally:
        log._sink = sink
    assert len(lines) == 1
    assert lines[0].isprintable()
    if text.isprintable():
        assert lines[0] == f"pynbdkit: error: {text}"


def test_escapes_can_be_read(capsys: Capture) -> None:
    log.error("export 'a\nb\x1b[2J\udcffé'")
    assert capsys.readouterr().err == "pynbdkit: error: export 'a\\nb\\x1b[2J\\udcffé'\n"


def broken() -> None:
    raise ZeroDivisionError("by zero")


def failure(call: object = broken) -> BaseException:
    try:
        call()  # type: ignore[operator]
    except Exception as raised:
        return raised
    raise AssertionError


def test_traceback_once(capsys: Capture) -> None:
    """The same failure at the same place: one line each time, its traceback the first time."""
    for _ in range(3):
        log.exception("pread: offset 0", failure())
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("pynbdkit: error: pread: offset 0: ZeroDivisionError: by zero") == 3
    assert sum("Traceback" in line for line in lines) == 1
    assert all(line.startswith("pynbdkit: ") for line in lines)
    assert any('raise ZeroDivisionError("by zero")' in line for line in lines)


def test_another_failure_has_its_own_traceback(capsys: Capture) -> None:
    def elsewhere() -> None:
        raise ZeroDivisionError("by zero")

    def another_kind() -> None:
        {}["key"]  # type: ignore[index]

    for call in (broken, elsewhere, another_kind, broken):
        log.exception("pread", failure(call))
    assert capsys.readouterr().err.count("Traceback") == 3


def test_verbose_shows_every_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "verbose", True)
    for _ in range(3):
        log.exception("pread", failure())
    assert capsys.readouterr().err.count("Traceback") == 3


def test_what_we_raise_on_purpose_has_no_traceback(capsys: Capture) -> None:
    """An OSError of ours says it all; a plugin's own may need its place."""

    def ours() -> None:
        Session(stopping=lambda _: True).sleep(1)

    def theirs() -> None:
        raise OSError(errno.ENOSPC, "full")

    log.exception("pread", failure(ours))
    assert "Traceback" not in capsys.readouterr().err
    log.exception("pwrite", failure(theirs))
    assert "Traceback" in capsys.readouterr().err


def test_what_the_operator_can_mend_has_no_traceback(capsys: Capture) -> None:
    """Wherever it was raised: its text is the whole message, without the name of its class."""

    def theirs() -> None:
        raise OpenError("disk: no pread")

    log.exception("open 'x'", failure(theirs))
    assert capsys.readouterr().err == "pynbdkit: error: open 'x': disk: no pread\n"


def test_how_we_got_there_is_left_out(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin's author sees the plugin's frames; with --verbose all of them."""

    class Broken(Device):
        def get_size(self) -> int:
            raise ZeroDivisionError("by zero")

    ask = Layer(Broken(), Session(), "broken").get_size
    trace = failure(ask)
    assert trace.__traceback__ is not None
    trace.__traceback__ = trace.__traceback__.tb_next  # without this test's own frame
    log.exception("open", trace)
    shown = capsys.readouterr().err
    assert "complete.py" not in shown
    assert 'raise ZeroDivisionError("by zero")' in shown
    monkeypatch.setattr(log, "verbose", True)
    log.exception("open", trace)
    assert "complete.py" in capsys.readouterr().err


def test_exception_that_was_never_raised(capsys: Capture) -> None:
    log.exception("pread", ValueError("made up"))
    assert capsys.readouterr().err == "pynbdkit: error: pread: ValueError: made up\n"


def test_memory_of_failures_is_bounded() -> None:
    """A plugin that makes code as it goes cannot fill the memory."""
    log.use("null")
    for number in range(1100):
        space: dict[str, object] = {}
        exec(compile("\n" * number + "def f(): raise ValueError", f"<{number}>", "exec"), space)
        log.exception("pread", failure(space["f"]))
    assert len(log._seen) <= 1000


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(errno.ENOSPC, "full"), "full"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "disk.img"),
         "No such file or directory: disk.img"),
        (OSError("no errno"), "OSError: no errno"),
        (ValueError("wrong"), "ValueError: wrong"),
        (KeyError(), "KeyError"),
        (MemoryError(), "MemoryError"),
    ],
)  # fmt: skip
def test_describe(raised: BaseException, words: str) -> None:
    assert log.describe(raised) == words


def test_null(capsys: Capture) -> None:
    log.use("null")
    log.error("nobody hears")
    log.exception("nobody hears", failure())
    log.use("stderr")
    log.error("heard")
    assert capsys.readouterr().err == "pynbdkit: error: heard\n"


@pytest.mark.parametrize("destination", ["null", "syslog", "stderr"])
def test_debug_messages_go_to_stderr(
    destination: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever errors go (nbdkit-service(1), "Logging")."""
    monkeypatch.setattr(log, "verbose", True)
    log.use(destination)
    log.debug("heard")
    assert capsys.readouterr().err == "pynbdkit: debug: heard\n"


def test_syslog(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import syslog

    sent: list[object] = []
    monkeypatch.setattr(syslog, "openlog", lambda *words: sent.append(words))
    monkeypatch.setattr(syslog, "syslog", lambda *words: sent.append(words))
    log.use("syslog")
    log.set_name("memory[1]")
    log.error("it broke")
    assert sent == [("pynbdkit", syslog.LOG_PID), (syslog.LOG_ERR, "memory[1]: error: it broke")]
    assert capsys.readouterr().err == ""


def test_a_stderr_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    log.error("nobody hears")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    log.error("nobody hears")


def test_lines_of_threads_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that takes its time between the pieces of a line."""
    pieces: list[str] = []

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            for character in text:
                pieces.append(character)
                if character == "a":
                    turn.wait(0.001)
            return len(text)

    turn = threading.Event()
    monkeypatch.setattr(sys, "stderr", Slow())
    threads = [threading.Thread(target=lambda: log.error("banana")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "".join(pieces).splitlines() == ["pynbdkit: error: banana"] * 8


def test_an_exception_that_cannot_say_what_it_is() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    assert log.describe(Mute()) == "Mute"
    assert log.describe(OSError("one", 2)) == "OSError: [Errno one] 2"
