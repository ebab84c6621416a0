"""A moment of `make soak`, and servers that leak: the campaign sees them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import support

sys.path.insert(0, str(support.ROOT / "campaigns"))

import soak
from soak import Report, Sample
from subject import MIB

TEN_MILLION = 10_000_000


def samples(memory: Callable[[float], float], count: int = 100, each: float = 1e6) -> list[Sample]:
    """Samples of a server whose memory (bytes) depends on the requests that it has answered."""
    return [Sample(n, n * each, round(memory(n * each)), 2, 6) for n in range(count + 1)]


def broken(seen: list[Sample]) -> list[str]:
    report = Report("memory", seen)
    report.judge()
    return report.broken


def test_a_byte_for_each_request_is_growth() -> None:
    (text,) = broken(samples(lambda requests: 50 * MIB + requests))
    assert text.startswith("memory grows: 47.7 MiB over the second half, at most 5.0 MiB")


def test_what_comes_at_first_or_comes_and_goes_is_no_growth() -> None:
    assert broken(samples(lambda requests: MIB * min(requests / 1e6, 40))) == []
    assert broken(samples(lambda requests: MIB * (50 + requests / 1e6 % 7))) == []
    assert broken(samples(lambda requests: 50 * MIB + requests / TEN_MILLION * 0.9 * MIB)) == []
    # One look at a moment when much was in use, even at the very end.
    seen = samples(lambda requests: 50 * MIB)
    seen[-1] = Sample(100, 1e8, 500 * MIB, 2, 6)
    assert broken(seen) == []


def test_in_a_short_run_a_few_mebibytes_are_allowed() -> None:
    assert broken(samples(lambda requests: 10 * requests, each=10_000)) == []
    assert broken(samples(lambda requests: 100 * requests, each=10_000)) != []


def test_requests_between_two_known_moments() -> None:
    known = [(0.0, 0.0), (10.0, 1000.0), (20.0, 5000.0)]
    assert [soak.between(at, known) for at in (-1, 0, 5, 10, 15, 20, 30)] == [
        0,
        0,
        500,
        1000,
        3000,
        5000,
        5000,
    ]


def test_the_table_has_the_first_sample_and_the_last() -> None:
    report = Report("memory", samples(lambda requests: MIB), odd=5, visits=2, connections=1)
    lines = report.table().splitlines()
    rows = [line for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert rows[0] == "| 0 | 0.00 | 1.0 | 2 | 6 |"
    assert rows[-1] == "| 100 | 100.00 | 1.0 | 2 | 6 |"
    assert len(rows) <= soak.ROWS + 1
    assert "100.00 million requests in 100 s on 3 connections" in lines[-1]
    assert "+0 KiB, 5.0 MiB are allowed" in lines[-1]


def moment(plugin: str, words: tuple[str, ...] | None = None) -> Report:
    support.program("fio")
    return soak.soak(
        plugin,
        1,
        0,
        segment=0.2,
        every=0.05,
        words=None if words is None else lambda folder: words,
        patience=30 if words is None else 0.5,
    )


@pytest.mark.parametrize("plugin", list(soak.PLUGINS))
def test_a_moment_of_it(plugin: str) -> None:
    report = moment(plugin)
    assert report.broken == []
    assert report.samples[-1].requests > 1000
    assert report.odd > 100
    assert report.visits > 10
    assert len(report.samples) > 10
    assert f"## {plugin}" in report.table()


LEAKS = """
import os
from pynbdkit.plugins.memory import Memory

class Leaks(Memory):
    name = "leaks"
    kept = []
    def open(self, session):
        {on_open}
        device = super().open(session)
        for name in ("pread", "pwrite", "trim"):
            setattr(device, name, self.leaking(getattr(device, name)))
        return device
    def leaking(self, call):
        def leaks(*arguments):
            {on_call}
            return call(*arguments)
        return leaks
"""


@pytest.mark.parametrize(
    ("on_open", "on_call", "said"),
    [
        ("pass", "Leaks.kept.append(bytes(4000))", "memory grows: "),
        ("os.open('/dev/null', os.O_RDONLY)", "pass", "descriptors, not "),
    ],
)
def test_a_server_that_leaks_is_told_of(
    tmp_path: Path, on_open: str, on_call: str, said: str
) -> None:
    path = tmp_path / "leaks.py"
    path.write_text(LEAKS.format(on_open=on_open, on_call=on_call))
    report = moment("leaks", (str(path), f"size={soak.DISK}"))
    assert [said in text for text in report.broken] == [True], report.broken


def test_a_server_that_ends_is_told_of(tmp_path: Path) -> None:
    report = moment("memory", ("no-such-plugin",))
    assert [text for text in report.broken if "ended at once" in text]


def test_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["nothing"], "unknown plugin"), (["--minutes", "0"], "above 0")):
        with pytest.raises(SystemExit) as end:
            soak.main(words)
        assert end.value.code == 2
        assert said in capsys.readouterr().err
