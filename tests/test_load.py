"""A moment of each stage of `make load`: what is promised under load holds for a few clients, too.

That these tests see what breaks was tried: a connection that is not forgotten, a socket that is not
closed, a handshake limit that is not kept, keepalive that is not set, each turn one of them red.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import support

sys.path.insert(0, str(support.ROOT / "campaigns"))

import crowd
import half_open
import load
from subject import PYNBDKIT, Figures, Subject, SubjectError


def promises(stage: str) -> dict[str, str]:
    """Run a short stage; returns what it has measured, when no promise was broken."""
    report = load.measure("pynbdkit", PYNBDKIT, load.SHORT, [stage])
    assert report.broken == []
    assert report.lines
    return dict(report.lines)


@pytest.mark.parametrize("stage", ["crowd", "used", "churn", "stall", "tls", "hoard"])
def test_short_stage(stage: str) -> None:
    promises(stage)


def test_clients_that_have_gone_without_a_word() -> None:
    why = half_open.unable()
    if why:
        support.lacking(why)
    told = promises("gone")
    (noticed,) = [value for what, value in told.items() if "gone without" in what]
    assert noticed.startswith("noticed after")


def test_every_stage_is_run_here() -> None:
    assert set(load.STAGES) == {"crowd", "used", "churn", "stall", "tls", "hoard", "gone"}


def test_a_figure_over_its_limit_is_a_broken_promise() -> None:
    report = load.Report("pynbdkit")
    report.promise("kept", 1, 1, " s")
    report.promise("broken", 1.5, 1, " s")
    assert report.broken == ["broken: 1.5 s, promised are 1 s"]


def test_a_stage_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load.main(["nothing"])
    assert end.value.code == 2
    assert "unknown stage 'nothing'" in capsys.readouterr().err


def test_a_server_that_keeps_a_descriptor_is_told_of(sockdir: Path) -> None:
    with Subject(sockdir) as server:
        figures = server.figures()
        with (
            crowd.crowd(server.address, crowd.IDLE, 2),
            pytest.raises(SubjectError, match="still has"),
        ):
            server.settle(figures.threads, figures.descriptors, patience=0.1)
        server.settle(figures.threads, figures.descriptors)


def test_a_server_that_ends_by_itself_is_told_of(sockdir: Path) -> None:
    with pytest.raises(SubjectError, match="nothing-like-it"):
        Subject(sockdir, ["nothing-like-it"])
    with Subject(sockdir) as server:
        server.stop()
        with pytest.raises(SubjectError, match="ended by itself"):
            Figures.of(server.process.pid)


def test_latency_is_of_all_that_was_sent(sockdir: Path) -> None:
    with Subject(sockdir) as server, crowd.Workers(server.address, 3, 1 << 20) as workers:
        latency = workers.work(0.2, 0.01)
    assert 0 < latency.median <= latency.p99 <= latency.worst
    assert 30 <= latency.rate <= 400  # 300 a second are asked for


def test_of_latencies_the_late_ones_count() -> None:
    latency = crowd.Latency.of([0.001] * 97 + [0.5, 0.6, 0.7], 1)
    assert (latency.median, latency.p99, latency.worst, latency.rate) == (0.001, 0.7, 0.7, 100)
    with pytest.raises(ValueError, match="not one"):
        crowd.Latency.of([], 1)
