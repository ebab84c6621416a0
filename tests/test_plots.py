"""The curves: what is measured for which line, what comes into the file, what is drawn."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import support

sys.path.insert(0, str(support.ROOT / "benchmarks"))

import plots
import servers
import workloads
from plots import CURVES, Line
from workloads import MIB, Crowd, Fio, Sample

CURVE = {curve.name: curve for curve in CURVES}
FACTS = {"machine": "a test", "versions": "none", "date": "2026-01-01", "load before": "9"}


def made_up(curve: plots.Curve) -> dict[str, Any]:
    """Data as plots.py writes them, of every line and value."""
    lines = []
    for number, line in enumerate(curve.lines):
        points = [[v, 1e4 / (number + 1) * (1 + at % 3), 5.0] for at, v in enumerate(curve.values)]
        lines.append({"server": line.server, "what": line.what, "points": points})
    return {"facts": FACTS, "lines": lines}


def test_each_curve_has_the_peers_beside_ours() -> None:
    assert list(CURVE) == ["depth", "size", "connections", "filters", "export", "async"]
    for curve in CURVES:
        for what in ("read", "write", "16 threads", "64 threads"):
            found = {line.server for line in curve.lines if line.what == what}
            assert found in ({"nbdkit", "pynbdkit"}, set())
        assert sorted(set(curve.values)) == list(curve.values)
    ends = {curve.name: (curve.values[0], curve.values[-1]) for curve in CURVES}
    assert ends == {
        "depth": (1, 256),
        "size": (512, 32 * MIB),
        "connections": (1, 256),
        "filters": (0, 8),
        "export": (MIB, 2**63 - 512),
        "async": (1, 1024),
    }


def test_what_is_varied_reaches_server_and_client() -> None:
    ours, writes = Line("pynbdkit", "read"), Line("nbdkit", "write")
    assert CURVE["depth"].load(ours, 64).depth == 64
    assert CURVE["size"].load(writes, 2048).block == 2048
    assert CURVE["size"].load(writes, 2048).rw == "randwrite"
    assert CURVE["connections"].load(ours, 256).jobs == 256
    assert isinstance(CURVE["connections"].load(ours, 256), Crowd)
    assert CURVE["filters"].serve(ours, 2)[:3] == ["--filter=nofilter"] * 2 + ["memory"]
    assert CURVE["export"].serve(ours, MIB) == ["memory", str(MIB)]
    slow = CURVE["async"].serve(Line("nbdkit", "64 threads"), 1)
    assert slow[:4] == ["-t", "64", "python", str(servers.SLOW_THREADS)]
    assert CURVE["async"].serve(Line("pynbdkit", "coroutines"), 1)[0] == str(servers.SLOW_ASYNC)


def test_a_point_is_the_median_to_four_digits() -> None:
    samples = [Sample(requests, 1.0, 0, 0.5) for requests in (100_000, 123_456, 200_000)]
    assert plots.point(samples) == (123_500, 4.05)
    assert plots.few((1, 2, 4, 8, 16)) == (1, 4, 16)
    assert plots.few((1, 2)) == (1, 2)


def test_the_file_keeps_what_was_not_measured_again() -> None:
    old = {"filters": {"facts": FACTS, "lines": [1]}, "depth": {"facts": FACTS, "lines": [2]}}
    new = plots.merged(old, {"filters": {"facts": FACTS, "lines": [3]}})
    assert [(name, curve["lines"]) for name, curve in new.items()] == [
        ("depth", [2]),
        ("filters", [3]),
    ]
    assert json.loads(plots.written(new)) == new


def test_of_a_crowd_only_what_is_more_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def work(self: Crowd, server: object, requests: int) -> Sample:
        given.append(requests)
        return Sample(requests * self.jobs, 1 + requests * self.jobs / 1000, 0, 0.25 * len(given))

    monkeypatch.setattr(Crowd, "_work", work)
    crowd = Crowd("crowd", "randread", 4096, 4, 100)
    place = servers.Place(tmp_path, tmp_path, MIB)
    sample = crowd.run(None, place, 0.01)  # type: ignore[arg-type]
    assert given == [4, 24]
    assert (sample.requests, sample.cpu) == (2000, 0.25)
    assert sample.rate == pytest.approx(1000)


@pytest.fixture
def peers() -> None:
    for name in ("nbdkit", "fio", "nbdcopy"):
        support.program(name)


@pytest.mark.usefixtures("peers")
def test_every_curve_is_measured(tmp_path: Path, sockdir: Path) -> None:
    measuring = plots.Measuring(
        servers.Place(sockdir, tmp_path / "disk", MIB), 1, 0.05, lambda line: None
    )
    workloads.source_file(measuring.place).write_bytes(bytes(range(256)) * (MIB // 256))
    for curve in CURVES:
        value = curve.values[1]
        for line in measuring.run(dataclasses.replace(curve, lines=curve.lines[-2:]), [value]):
            ((at, rate, cpu),) = line["points"]
            assert at == value
            assert rate > 10
            assert cpu > 0
    assert measuring.failures == []


@pytest.mark.usefixtures("peers")
def test_what_fails_is_no_point(sockdir: Path, tmp_path: Path) -> None:
    place = servers.Place(sockdir, tmp_path / "disk", MIB, (sys.executable, "-c", "exit('no')"))
    said: list[str] = []
    measuring = plots.Measuring(place, 1, 0.05, said.append)
    nbdkit, ours = measuring.run(CURVE["export"], [MIB])
    assert len(nbdkit["points"]) == 1
    assert ours["points"] == []
    assert measuring.failures == [
        f"export, pynbdkit, read, {MIB}: pynbdkit ended at once: no",
    ]


@pytest.fixture
def draw() -> Any:
    try:
        import draw
    except ImportError:
        support.lacking("matplotlib is not installed: pip install -e '.[plots]'")
    return draw


def test_drawings_are_small_and_come_out_the_same_again(draw: Any) -> None:
    for curve in CURVES:
        text = draw.svg(curve, made_up(curve))
        assert text == draw.svg(curve, made_up(curve))
        assert len(text) < 60_000
        assert "a test" in text
        assert "date>" not in text
        for server, colour in draw.COLOURS.items():
            assert server in text
            assert colour in text


def test_sizes_and_numbers_on_an_axis(draw: Any) -> None:
    assert [draw.size(n) for n in (512, 2048, 32 * MIB, 1 << 62, 2**63 - 512)] == [
        "512 B",
        "2 KiB",
        "32 MiB",
        "4 EiB",
        "8 EiB",
    ]
    assert [draw.number(n) for n in (0, 16, 1024, 120_000)] == ["0", "16", "1024", "120k"]


def test_drawn_again_without_measuring(
    draw: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--draw", "--dir", str(tmp_path)]
    assert plots.main(where) == 1
    assert "measure first" in capsys.readouterr().err
    curve = CURVE["export"]
    (tmp_path / plots.DATA).write_text(plots.written({"export": made_up(curve)}))
    assert plots.main(where) == 0
    assert [path.name for path in tmp_path.glob("*.svg")] == ["export.svg"]
    assert (tmp_path / "export.svg").read_text() == draw.svg(curve, made_up(curve))


def test_the_drawings_in_the_docs_are_of_the_data_beside_them(draw: Any) -> None:
    data = json.loads((plots.FOLDER / plots.DATA).read_text())
    assert list(data) == list(CURVE)
    page = (plots.FOLDER.parent / "curves.md").read_text()
    for curve in CURVES:
        assert f"(plots/{curve.name}.svg)" in page
        text = (plots.FOLDER / f"{curve.name}.svg").read_text()
        assert draw.footer(data[curve.name]["facts"]) in text
        assert len(text) < 60_000


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plots.main(["--dir", str(tmp_path)]) == 1
    assert "pip install -e '.[plots]'" in capsys.readouterr().err


def test_a_fio_run_may_end_by_its_work() -> None:
    words = Fio("one", "randread", 512, 1).argv("nbd://", "--io_size=512")
    assert words[-1] == "--io_size=512"
    assert "--time_based" not in words
