"""Crew: what a client cannot bring about at will; the rest is in test_server, test_transmission."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest

from pynbdkit.protocol.constants import CMD_READ
from pynbdkit.server import crew as crew_module
from pynbdkit.server.crew import SAMPLE, Crew
from pynbdkit.session import Session


class Requests:
    """Stands for the transmission: notes what is run, and in which thread."""

    groups = False
    pieces_ready = 0

    def __init__(self) -> None:
        self.run: list[tuple[int, threading.Thread]] = []
        self.judged: list[int] = []

    def run_request(self, flags: int, kind: int, cookie: int, *_: Any) -> int:
        self.run.append((cookie, threading.current_thread()))
        return 0

    def send_ready(self) -> None:
        pass

    def calls_are_quick(self) -> None:
        self.judged.append(len(self.run))


def test_a_call_that_comes_back_does_what_was_queued_where_no_thread_can_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its thread was the last of the limit: until then the requests wait, and not for ever."""
    requests, behind = Requests(), threading.Event()
    crew = Crew(requests, Session(), "test", 1)  # type: ignore[arg-type]
    assert crew.leave_behind(behind.set)
    assert behind.wait(60)
    crew.dispatch([(0, CMD_READ, cookie, 0, 8, None) for cookie in range(3)])
    assert not requests.run

    def no_start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_start)
    crew.came_back()
    assert requests.run == [(cookie, threading.current_thread()) for cookie in range(3)]
    assert not crew.working
    crew.close()
    crew.join()


@pytest.mark.parametrize("lasting", [False, True])
def test_calls_found_quick_that_wait_after_all_are_found_so_more_and_more_rarely(
    lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would go back and forth between the reader and the threads all the time."""
    monkeypatch.setattr(crew_module, "quick", lambda seconds, cpu: True)
    monkeypatch.setattr(crew_module, "LASTING", 0.0 if lasting else 1000.0)
    requests = Requests()
    crew = Crew(requests, Session(), "test", 1)  # type: ignore[arg-type]
    for _ in range(8 * SAMPLE):
        crew.dispatch([(0, CMD_READ, 1, 0, 8, None)])
    crew.close()
    crew.join()
    each = [last - first for first, last in pairwise([0, *requests.judged])]
    assert each == ([SAMPLE] * 8 if lasting else [SAMPLE, SAMPLE, 2 * SAMPLE, 4 * SAMPLE])
