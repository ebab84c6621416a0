"""EventLoop and Pulse: coroutines run for threads, and who holds the loop up is named."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import support
from pynbdkit import Session, log, pulse, session
from pynbdkit.loop import EventLoop

WAIT = 20.0


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventLoop]:
    if request.param == "asyncio":
        monkeypatch.setitem(sys.modules, "uvloop", None)
    else:
        support.need_uvloop()
    made = EventLoop()
    assert type(made.loop).__module__.partition(".")[0] == request.param
    yield made
    made.close()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(log, "_sink", found.append)
    monkeypatch.setattr(log, "_seen", set())
    return found


async def where() -> tuple[int, Any]:
    await asyncio.sleep(0)
    return threading.get_ident(), asyncio.get_running_loop()


def test_wait_returns_and_raises(loop: EventLoop) -> None:
    async def fail() -> None:
        raise OSError(28, "full")

    async def cancel() -> None:
        raise asyncio.CancelledError

    loop.keep()
    thread, running = loop.wait(where())
    assert running is loop.loop
    assert thread == loop.ident != threading.get_ident()
    with pytest.raises(OSError, match="full"):
        loop.wait(fail())
    with pytest.raises(RuntimeError, match="cancel was cancelled"):
        loop.wait(cancel())
    assert loop.wait(where())[0] == thread
    assert reaches(lambda: not loop.working)


def test_before_the_fork_no_thread_stays(loop: EventLoop) -> None:
    """What is left pending goes on when the loop runs again."""
    before = threading.active_count()
    tasks: list[asyncio.Task[str]] = []

    gate = asyncio.Event()

    async def later() -> str:
        await gate.wait()
        return "done"

    async def begin() -> None:
        tasks.append(asyncio.create_task(later()))

    loop.wait(begin())
    assert threading.active_count() == before
    assert not tasks[0].done()
    loop.keep()

    async def end() -> str:
        gate.set()
        return await tasks[0]

    assert loop.wait(end()) == "done"


def test_from_many_threads_at_once(loop: EventLoop) -> None:
    loop.keep()
    results: list[int] = []

    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    def run(first: int) -> None:
        results.extend(loop.wait(double(number)) for number in range(first, first + 100))

    threads = [threading.Thread(target=run, args=(100 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [2 * n for n in range(800)]


def test_the_loop_does_not_wait_for_itself(loop: EventLoop) -> None:
    async def call() -> None:
        loop.wait(where())

    loop.keep()
    with pytest.raises(RuntimeError, match="where: called in the event loop's own thread"):
        loop.wait(call())


def test_the_session_and_the_name_go_along(loop: EventLoop, lines: list[str]) -> None:
    async def current() -> Session | None:
        await asyncio.sleep(0)
        log.error("hello")
        in_thread = await asyncio.to_thread(session.current)
        assert in_thread is session.current()
        return in_thread

    loop.keep()
    client = Session()
    session.set_current(client)
    log.set_name("disk[7]")
    try:
        assert loop.wait(current()) is client
    finally:
        session.set_current(None)
        log.set_name("")
    assert loop.wait(current()) is None
    assert lines == ["pynbdkit: disk[7]: error: hello", "pynbdkit: error: hello"]


def test_sys_exit_in_a_task_is_not_the_loops_end(loop: EventLoop, lines: list[str]) -> None:
    async def leave() -> None:
        sys.exit(3)

    async def begin() -> Any:
        return asyncio.create_task(leave())

    loop.keep()
    task = loop.wait(begin())
    assert loop.wait(where())
    assert task.done()
    assert any("SystemExit" in line for line in lines)
    task.exception()


def test_close_ends_what_a_plugin_left_running(loop: EventLoop, lines: list[str]) -> None:
    ended: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("task")

    async def begin() -> None:
        ended.append("")
        tasks.append(asyncio.create_task(forever()))

    tasks: list[Any] = []
    loop.keep()
    loop.wait(begin())
    loop.close()
    loop.close()
    assert ended == ["", "task"]
    assert loop.loop.is_closed()
    assert lines == []


def test_close_does_not_wait_for_ever(
    loop: EventLoop, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pynbdkit.loop.PATIENCE", 0.1)
    release = False

    async def stubborn() -> None:
        while not release:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass

    async def begin() -> None:
        tasks.append(asyncio.create_task(stubborn()))

    tasks: list[Any] = []
    loop.keep()
    loop.wait(begin())
    loop.close()
    release = True
    assert len(lines) == 1
    assert "does not end" in lines[0]


# -- who holds it up -------------------------------------------------------------------------------


def reaches(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    return condition()


def test_who_holds_up_the_loop_is_named_once(loop: EventLoop, lines: list[str]) -> None:
    blocked = threading.Event()
    release = threading.Event()

    def library() -> None:
        blocked.set()
        assert release.wait(WAIT)

    async def hasty() -> None:
        await asyncio.sleep(0)
        library()

    def run() -> None:
        thread = threading.Thread(target=loop.wait, args=(hasty(),))
        thread.start()
        assert blocked.wait(WAIT)
        assert reaches(lambda: bool(lines))
        release.set()
        thread.join()

    loop.keep()
    run()
    assert len(lines) == 1
    assert "warning: test_who_holds_up_the_loop_is_named_once.<locals>.hasty (" in lines[0]
    assert "holds up the event loop" in lines[0]
    blocked.clear()
    release.clear()
    thread = threading.Thread(target=loop.wait, args=(hasty(),))
    thread.start()
    assert blocked.wait(WAIT)
    threading.Event().wait(3 * pulse.TICK)
    release.set()
    thread.join()
    assert len(lines) == 1


def test_waiting_is_not_holding_up(loop: EventLoop, lines: list[str]) -> None:
    loop.keep()
    loop.wait(asyncio.sleep(3 * pulse.TICK))
    assert lines == []
    assert reaches(lambda: not loop.pulse._stirred.is_set())  # and then nobody looks any more


def test_without_coroutines_asyncio_is_not_imported() -> None:
    """It would double the time that the server takes to start."""
    code = (
        "import sys, pynbdkit, subprocess\n"
        "plugin = pynbdkit.load_plugin('memory', size='1M')\n"
        "with pynbdkit.serve(plugin, filters=['cow']) as server:\n"
        "    import socket; s = socket.socket(socket.AF_UNIX); s.connect(server.socket)\n"
        "    assert s.recv(18)[:8] == b'NBDMAGIC'; s.close()\n"
        "print(sorted({'asyncio', 'uvloop', 'inspect', 'contextvars'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
