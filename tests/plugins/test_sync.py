"""SharedSync: nobody is answered by a sync that began before he came, and no sync is for nothing.

The sync here is a fake that begins and ends when the test says so; nothing waits for a time.
"""

from __future__ import annotations

import errno
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbdkit.plugins._sync import SharedSync

PATIENCE = 10


class Noticed:
    """A lock that says when somebody has left it: so a test knows that a caller is entered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.left = threading.Semaphore(0)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
        self.left.release()


class Disk:
    """A sync that begins (`begun`) and waits for its end (`end`); and callers of a SharedSync."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._begun: SimpleQueue[None] = SimpleQueue()
        self._ends: SimpleQueue[BaseException | None] = SimpleQueue()
        self._running = threading.Lock()
        self.count = 0
        self.shared = SharedSync(self._sync)
        self._entrance = Noticed()
        self.shared._lock = self._entrance  # type: ignore[assignment]

    def _sync(self) -> None:
        assert self._running.acquire(blocking=False), "two at a time"
        self.count += 1
        self._begun.put(None)
        failure = self._ends.get(timeout=PATIENCE)
        self._running.release()
        if failure is not None:
            raise failure

    def come(self) -> Future[None]:
        """A caller; returns when he has been entered."""
        future = self._pool.submit(self.shared)
        self._one_has_left()
        return future

    def _one_has_left(self) -> None:
        assert self._entrance.left.acquire(timeout=PATIENCE)

    def begins(self) -> None:
        """Wait until a sync has begun."""
        self._begun.get(timeout=PATIENCE)
        self._one_has_left()  # the one who leads has closed the round

    def end(self, failure: BaseException | None = None) -> None:
        """Let the running sync end."""
        self._ends.put(failure)


def outcome(future: Future[None]) -> str:
    """What a caller was told: "" for success."""
    failure = future.exception(PATIENCE)
    return "" if failure is None else str(failure)


@given(st.lists(st.one_of(st.integers(1, 5), st.sampled_from(["", "lost", "full"])), max_size=12))
@settings(max_examples=60, deadline=None)
def test_against_the_rule(steps: list[int | str]) -> None:
    """So many come, or the running sync ends in some way; who is for which sync is in the model."""
    with ThreadPoolExecutor(64) as pool:
        disk = Disk(pool)
        runs: list[Future[None]] = []
        waits: list[Future[None]] = []
        begun = 0

        def end(how: str) -> None:
            nonlocal runs, waits, begun
            disk.end(OSError(errno.EIO, how) if how else None)
            assert {outcome(future) for future in runs} == {f"[Errno 5] {how}" if how else ""}
            runs, waits = waits, []
            if runs:
                disk.begins()
                begun += 1
            assert not any(future.done() for future in runs), "answered by an earlier sync"
            assert disk.count == begun

        for step in steps:
            if isinstance(step, str):
                if runs:
                    end(step)
                continue
            for _ in range(step):
                future = disk.come()
                if runs:
                    waits.append(future)
                    assert disk.shared._gathering
                else:
                    runs.append(future)
                    disk.begins()
                    begun += 1
                assert disk.count == begun
        while runs:
            end("")
        assert disk.count == begun
        assert not disk.shared._gathering


def test_one_sync_for_all_who_wait() -> None:
    with ThreadPoolExecutor(40) as pool:
        disk = Disk(pool)
        first = disk.come()
        disk.begins()
        others = [disk.come() for _ in range(32)]
        disk.end()
        assert outcome(first) == ""
        disk.begins()
        assert not any(other.done() for other in others)
        disk.end()
        assert {outcome(other) for other in others} == {""}
        assert disk.count == 2


@pytest.mark.parametrize(
    ("failure", "number"),
    [
        (OSError(errno.ENOSPC, "no space"), errno.ENOSPC),
        (OSError("no number"), errno.EIO),
        (RuntimeError("a bug"), errno.EIO),
        (KeyboardInterrupt(), errno.EIO),
    ],
)
def test_a_failure_is_for_all_of_its_round(failure: BaseException, number: int) -> None:
    """Each gets an exception of his own; who comes later gets what comes later."""
    with ThreadPoolExecutor(8) as pool:
        disk = Disk(pool)
        first = disk.come()
        disk.begins()
        others = [disk.come() for _ in range(4)]
        disk.end()
        disk.begins()
        later = [disk.come() for _ in range(2)]
        disk.end(failure)
        told = [other.exception(PATIENCE) for other in others]
        assert len({id(one) for one in told}) == 4
        assert sum(one is failure for one in told) == 1  # of the thread that made the call
        for one in told:
            if one is not failure:
                assert isinstance(one, OSError)
                assert one.errno == number
                assert one.__cause__ is failure
        disk.begins()
        disk.end()
        assert [outcome(one) for one in (first, *later)] == ["", "", ""]


def test_interrupted_before_its_turn() -> None:
    """Whoever leads and is interrupted while he waits leaves nobody behind."""
    with ThreadPoolExecutor(8) as pool:
        disk = Disk(pool)

        class Interrupted:
            def __init__(self, lock: Any) -> None:
                self.lock, self.times = lock, 0
                self.go_on = threading.Event()

            def __enter__(self) -> None:
                self.times += 1
                if self.times == 1:
                    assert self.go_on.wait(PATIENCE)
                    raise KeyboardInterrupt
                self.lock.acquire()

            def __exit__(self, *_: object) -> None:
                self.lock.release()

        turn = Interrupted(disk.shared._turn)
        disk.shared._turn = turn  # type: ignore[assignment]
        leader, follower = disk.come(), disk.come()
        turn.go_on.set()
        assert isinstance(leader.exception(PATIENCE), KeyboardInterrupt)
        assert isinstance(follower.exception(PATIENCE), OSError)
        disk._one_has_left()
        again = disk.come()
        disk.begins()
        disk.end()
        assert outcome(again) == ""


def test_without_company_it_is_a_call() -> None:
    calls: list[int] = []
    shared = SharedSync(lambda: calls.append(threading.get_ident()))
    for _ in range(3):
        shared()
    assert calls == [threading.get_ident()] * 3
