"""Session: what layers may know of a connection, and ask of it."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from pynbdkit.session import Session, current, set_current


def test_nothing_is_known_by_default() -> None:
    session = Session()
    assert (session.readonly, session.export_name, session.is_tls) == (False, "", False)
    assert session.peer_name is None
    assert (session.peer_pid, session.peer_uid, session.peer_gid) == (None, None, None)
    session.shutdown()  # nobody to ask: nothing happens
    session.disconnect()


def test_credentials() -> None:
    session = Session(credentials=(11, 22, 33))
    assert (session.peer_pid, session.peer_uid, session.peer_gid) == (11, 22, 33)


def test_requests_reach_the_server() -> None:
    asked: list[object] = []
    session = Session(shutdown=lambda: asked.append("shutdown"), disconnect=asked.append)
    session.shutdown()
    session.disconnect()
    session.disconnect(force=True)
    assert asked == ["shutdown", False, True]


def test_replace_changes_a_copy() -> None:
    """The layer below sees the change; this one does not; all else is the same."""
    asked: list[object] = []
    session = Session(
        export_name="a",
        is_tls=True,
        peer_name=("::1", 10809, 0, 0),
        credentials=(1, 2, 3),
        shutdown=lambda: asked.append("shutdown"),
        disconnect=asked.append,
        stopping=lambda seconds: bool(asked.append(seconds)),  # type: ignore[func-returns-value]
    )
    copy = session.replace(readonly=True)
    assert (copy.readonly, copy.export_name) == (True, "a")
    other = copy.replace(export_name="")
    assert (other.readonly, other.export_name) == (True, "")
    again = other.replace(readonly=False)
    assert (again.readonly, again.export_name) == (False, "")
    assert (session.readonly, session.export_name) == (False, "a")
    assert (again.is_tls, again.peer_name, again.peer_uid) == (True, session.peer_name, 2)
    again.shutdown()
    again.disconnect(True)
    again.sleep(0.5)
    assert asked == ["shutdown", True, 0.5]


def test_sleep_ends_early() -> None:
    """The server says when there is no point in going on: ESHUTDOWN."""
    slept: list[float] = []

    def stopping(seconds: float) -> bool:
        slept.append(seconds)
        return seconds > 1

    session = Session(stopping=stopping)
    session.sleep(0.5)
    with pytest.raises(OSError, match="stopping") as caught:
        session.sleep(2)
    assert caught.value.errno == errno.ESHUTDOWN
    assert slept == [0.5, 2]


def test_sleep_without_a_server() -> None:
    start = time.monotonic()
    Session().sleep(0.05)
    assert time.monotonic() - start >= 0.05


def test_current_is_the_threads_own() -> None:
    assert current() is None
    mine, other = Session(), Session()
    set_current(mine)
    try:
        seen: list[Session | None] = []

        def work() -> None:
            seen.append(current())
            set_current(other)
            seen.append(current())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [None, other]
        assert current() is mine
    finally:
        set_current(None)
    assert current() is None
