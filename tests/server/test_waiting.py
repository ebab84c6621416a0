"""What tells calls that wait from others; what follows from it is in test_thread_models."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from pynbdkit.server import waiting
from pynbdkit.server.waiting import EVIDENCE, QUICK_CALL, TIMES, TRUST, Evidence

WAIT = 60.0


@pytest.mark.parametrize(
    ("calls", "cpu", "switches", "process", "waits"),
    [
        (5, 0.0001, 5, 0.0002, True),
        (5, 0.004, 5, 0.004, False),  # it computes, and others have the processor now and then
        (5, 0.0001, 1, 0.0002, False),  # others have the processor
        (100, 0.0001, 100, 0.0002, False),  # it waits, but not long enough for threads to pay
        (0, 0.0001, 9, 0.0002, False),  # one call that waits is for the other rule
        (4, 0.0001, 4, 0.004, False),  # other connections of ours have the interpreter
        (3, 0.0001, 3, 0.004, True),  # so they have, and yet it takes too long
    ],
)
def test_when_calls_that_took_5_ms_wait(
    calls: int,
    cpu: float,
    switches: int,
    process: float,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "without_waiting", lambda cpu: 0.0002)
    assert waiting.wait(calls, 0.005, cpu, switches, process) == waits


class Costs:
    """Stands for the clocks: every batch costs the thread and the process what is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self._usage = (1.0, 10.0, 2.0)
        monkeypatch.setattr(waiting, "usage", lambda: self._usage)
        monkeypatch.setattr(waiting, "perf_counter", lambda: self.now)
        monkeypatch.setattr(waiting, "without_waiting", lambda cpu: 1.0)

    def batch(self, evidence: Evidence, calls: int, wall: float, process: float = 0.0) -> bool:
        begun = self._usage
        self._usage = (begun[0] + wall / 100, begun[1] + calls, begun[2] + process)
        return evidence.end(calls, wall, begun)


def test_one_batch_is_no_evidence_and_little_time_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, evidence = Costs(monkeypatch), Evidence()
    assert not costs.batch(evidence, 10, 1.0)
    assert costs.batch(evidence, 10, 1.0)
    short = EVIDENCE / 4
    assert [costs.batch(evidence, 1, short) for _ in range(8)] == [False, False, False, True] * 2


def test_one_slow_batch_among_quick_ones_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, evidence = Costs(monkeypatch), Evidence()
    assert not costs.batch(evidence, 1000, EVIDENCE / 2)
    assert not costs.batch(evidence, 1, EVIDENCE)


def test_calls_that_were_held_up_are_not_suspected_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costs, evidence = Costs(monkeypatch), Evidence()
    assert evidence.wanted()
    for _ in range(2):
        assert not costs.batch(evidence, 10, 1.0, process=1.5)
    assert not evidence.wanted()
    costs.now += TRUST
    assert evidence.wanted()
    for waits in (False, True):
        assert costs.batch(evidence, 10, 1.0) == waits
    assert evidence.wanted()


def test_calls_are_quick_that_take_no_longer_than_some_that_never_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slept, computed = 0.0, [], []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += 0.001

    def crc32(data: memoryview) -> int:
        nonlocal now
        computed.append(len(data))
        now += 0.002
        return 0

    monkeypatch.setattr(waiting, "perf_counter", lambda: now)
    monkeypatch.setattr(waiting, "sleep", sleep)
    monkeypatch.setattr(waiting, "crc32", crc32)
    assert waiting.quick(QUICK_CALL / 2, 0.0)
    assert not slept + computed
    assert waiting.quick(0.001, 1e-7)
    assert slept == [0] * TIMES
    assert not waiting.quick(0.0012, 1e-7)
    assert not computed
    assert waiting.quick(0.002, 0.0001)  # as long without the interpreter
    assert computed == [400_000] * TIMES
    assert waiting.quick(0.002, 1.0)  # as far as it goes
    assert not waiting.quick(0.0022, 0.0001)


def test_with_the_real_clock_a_call_of_a_second_is_not_quick() -> None:
    assert not waiting.quick(1.0, 0.0001)


def test_usage_is_of_this_thread() -> None:
    before = waiting.usage()
    threading.Event().wait(0.001)
    assert waiting.usage()[1] > before[1]
    assert all(new >= old for old, new in zip(before, waiting.usage(), strict=True))


def test_what_a_thread_has_cost_is_known_to_others() -> None:
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    end, nothing = threading.Event(), threading.Event()

    def work() -> None:
        for _ in range(20):
            nothing.wait(0.0001)
        numbers.put(threading.get_native_id())
        end.wait(WAIT)

    thread = threading.Thread(target=work)
    thread.start()
    seconds, switches, process = waiting.usage_of(numbers.get(timeout=WAIT))
    end.set()
    thread.join()
    assert switches >= 20
    assert 0 < seconds < WAIT
    assert 0 < process <= time.process_time()
    assert waiting.usage_of(1 << 30)[:2] == (0.0, 0)
