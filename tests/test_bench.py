"""The benchmark's own logic, and a moment of it for real, so that its numbers can be believed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import support

sys.path.insert(0, str(support.ROOT / "benchmarks"))

import alone
import bench
import cpu
import machine
import report
import servers
import workloads
from report import Record, Spread
from workloads import MIB, Sample

SIZE = 8 * MIB


def fio_json(error: int = 0, reads: int = 0, writes: int = 0) -> str:
    def side(count: int) -> dict[str, int]:
        return {"total_ios": count, "io_bytes": count * 4096, "runtime": 500 if count else 0}

    jobs = [{"jobname": "bench", "error": error, "read": side(reads), "write": side(writes)}]
    return "fio: connected to NBD server\n" + json.dumps({"fio version": "fio-3.33", "jobs": jobs})


def test_fio_json_after_the_engines_own_lines() -> None:
    assert workloads.parse_fio(fio_json(reads=1000)) == (1000, 0.5, 4096000)
    assert workloads.parse_fio(fio_json(writes=10)) == (10, 0.5, 40960)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (fio_json(error=5, reads=1000), "error 5"),
        (fio_json(), "no I/O"),
        ("fio: connected to NBD server\n", "0 groups"),
        ("{ broken", "cannot be read"),
        ('{"jobs": [{}, {}]}', "2 groups"),
    ],
)
def test_a_fio_run_that_did_not_work_is_no_number(output: str, said: str) -> None:
    with pytest.raises(workloads.WorkloadError, match=said):
        workloads.parse_fio(output)


def record(
    server: str, number: int, requests: int, cpu_seconds: float = 1.0, /, **where: str
) -> Record:
    place = {"kind": "memory", "workload": "randread-4k-d16", "unit": "/s"} | where
    sample = Sample(requests, 1.0, requests * 4096, cpu_seconds)
    return Record(place["kind"], place["workload"], server, number, sample, place["unit"])


def test_a_ratio_is_formed_within_its_round() -> None:
    # The machine was three times as fast in round 2: the ratio of the medians would be 2.
    records = [
        record("pynbdkit", 1, 200),
        record("nbdkit", 1, 100),
        record("pynbdkit", 2, 450),
        record("nbdkit", 2, 300),
        record("pynbdkit", 3, 120),
        record("nbdkit", 3, 100),
        record("pynbdkit", 4, 999),  # nbdkit failed in this round: no pair
    ]
    base, ours = report.rows(records)
    assert (base.server, ours.server) == ("nbdkit", "pynbdkit")
    assert base.value == Spread(100, 100, 300)
    assert base.ratio == Spread(1, 1, 1)
    assert ours.ratio == Spread(1.5, 1.2, 2.0)
    assert ours.rounds == 4


def test_cpu_is_compared_per_request() -> None:
    base, ours = report.rows([record("nbdkit", 1, 100, 1.0), record("pynbdkit", 1, 200, 1.0)])
    assert base.cpu_per_request.median == pytest.approx(0.01)
    assert ours.cpu_ratio == Spread(0.5, 0.5, 0.5)


def test_large_requests_are_shown_in_mib() -> None:
    sample = Sample(8, 2.0, 8 * MIB, 0.1)
    (row,) = report.rows([Record("memory", "read-256k-d4", "nbdkit", 1, sample, "MiB/s")])
    assert row.value.median == 4.0
    assert "4 MiB/s" in report.table([row])


def test_of_costs_less_is_better() -> None:
    where = {"kind": "start", "workload": "run-true", "unit": "ms"}
    records = [
        record("nbdkit", 1, 100, **where),
        record("python", 1, 50, **where),
        record("pynbdkit", 1, 20, **where),
    ]
    base, bare, ours = report.rows(records)
    assert [row.value.median for row in (base, bare, ours)] == [10, 20, 50]
    assert ours.ratio == Spread(0.2, 0.2, 0.2)
    assert dict(ours.references) == {"python": Spread(0.4, 0.4, 0.4)}
    assert (bare.references, base.references) == ({}, {})
    assert report.verdict(ours) == "≤ 3 starts of python ok"
    text = report.table([base, bare, ours])
    assert "| cost " in text
    assert "| 50.0 ms " in text
    sample = Sample(10, 1.0, 300 * 1024, 0.0)
    (row,) = report.rows([Record("idle", "idle-connection", "nbdkit", 1, sample, "KiB")])
    assert "| 30.0 KiB | 1 " in report.table([row])


def test_who_refuses_crowds_is_not_asked_to_serve_them() -> None:
    found = {task.workload.name: task.servers for task in bench.selected(["file/rand*"])}
    assert "nbd-server" in found["randread-4k-d16-x4"]
    assert "nbd-server" not in found["randread-4k-d4-x32"]
    assert {"nbdkit", "qemu-nbd", "pynbdkit"} <= set(found["randread-4k-d4-x32"])


def test_a_server_is_compared_with_nbdkit_run_in_the_same_way() -> None:
    assert servers.baseline("slow", "pynbdkit-t64") == "nbdkit-t64"
    assert servers.baseline("slow", "nbdkit-t64") == "nbdkit-t64"
    assert servers.baseline("slow", "pynbdkit") == "nbdkit"
    assert servers.baseline("file-workers", "pynbdkit-workers") == "nbdkit"
    assert servers.baseline("memory", "limit-poll") == "nbdkit"
    rates = {"nbdkit": 100, "nbdkit-t64": 300, "pynbdkit-t64": 600}
    where = {"kind": "slow", "workload": "randread-4k-d64"}
    rows = report.rows([record(name, 1, rate, **where) for name, rate in rates.items()])
    assert [row.ratio and row.ratio.median for row in rows] == [1, 1, 2]


def judged(ratio: float, cpu_ratio: float = 1.0, /, **where: str) -> report.Row:
    name = where.pop("server", "pynbdkit")
    base = record("nbdkit", 1, 1000, 1.0, **where)
    ours = record(name, 1, round(1000 * ratio), ratio * cpu_ratio, **where)
    return report.rows([base, ours])[1]


def verdict_of(ratio: float, cpu_ratio: float = 1.0, /, **where: str) -> str:
    return report.verdict(judged(ratio, cpu_ratio, **where))


def test_floors_are_judged() -> None:
    assert verdict_of(1.9, 0.5) == "≥ 1.8 ok, CPU ≤ 0.5 ok"
    assert verdict_of(1.7, 0.7) == "≥ 1.8 MISSED, CPU ≤ 0.5 MISSED"
    assert verdict_of(1.0, workload="randwrite-4k-d1") == "≥ 1 ok"
    assert verdict_of(2.4, kind="script") == "≥ 3 MISSED"
    assert verdict_of(2.4, workload="randread-4k-d16-x4") == "≥ 2.5 MISSED"
    assert verdict_of(1.2, workload="nbdcopy-in") == "≥ 1.2 ok"
    assert verdict_of(4.9, kind="file", workload="fua-4k-d16-dirty") == "≥ 5 MISSED"
    assert verdict_of(0.9, kind="file", workload="fua-4k-d16-steady") == "≥ 1 MISSED"
    slow = {"kind": "slow", "workload": "randread-4k-d64"}
    assert verdict_of(14.4, **slow) == "≥ 14,400/s ok, ≥ 1 ok"
    others = report.rows([record("nbdkit", 1, 100), record("qemu-nbd", 1, 10)])
    assert [report.verdict(row) for row in others] == ["", ""]


def test_the_distance_to_the_limit() -> None:
    records = [record("nbdkit", 1, 100), record("limit", 1, 200), record("limit-poll", 1, 400)]
    *_, ours = report.rows([*records, record("pynbdkit", 1, 188)])
    assert {name: one.median for name, one in ours.references.items()} == {
        "limit": 0.94,
        "limit-poll": 0.47,
    }
    assert "of limit ≥ 0.95 MISSED" in report.verdict(ours)


def test_every_goal_has_rows_and_every_row_has_a_goal() -> None:
    names = [
        judged(1, kind=task.kind, workload=task.workload.name, server=name)
        for task in bench.selected([])
        for name in task.servers
        if servers.program(name) == "pynbdkit"
    ]
    found = {goal.text for row in names for goal in report.goals(row)}
    assert found == {goal.text for goal in report.GOALS}
    for row in names:
        ratios = [goal for goal in report.goals(row) if goal.measure == "ratio"]
        assert len(ratios) == (row.kind != "start"), row.name


def test_the_summary_has_the_worst_and_the_best_of_each_goal() -> None:
    table = [
        judged(1.9, 0.4),
        judged(1.7, 0.6, kind="file"),
        judged(20, kind="slow", workload="randread-4k-d64"),
    ]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.summary(table, everything=False).splitlines()
    ]
    assert [cells[0][:4], *cells[2:]] == [
        ["goal", "limit", "worst", "best"],
        ["4 KiB, 16 and 64 in flight", "≥ 1.8", "1.70", "1.90", "", "MISSED by 1 of 2"],
        ["CPU a request, 16 in flight", "CPU ≤ 0.5", "0.60", "0.40", "", "MISSED by 1 of 2"],
        ["calls of 1 ms, 16 threads", "≥ 14,400/s", "20,000", "20,000", "", "met"],
        ["every other row", "≥ 1", "20.00", "20.00", "", "met"],
    ]
    every = report.summary(table).splitlines()
    assert len(every) == 2 + len(report.GOALS)
    assert sum("not measured" in line for line in every) == len(report.GOALS) - 4


def test_the_table_is_markdown_with_a_part_for_each_kind() -> None:
    rows = report.rows(
        [record("nbdkit", 1, 100), record("pynbdkit", 1, 100), record("nbdkit", 1, 7, kind="file")]
    )
    text = report.markdown(rows, {"machine": "a test"}, ["beware"])
    assert text.startswith("- machine: a test\n")
    assert text.endswith("- beware\n")
    assert "### memory" in text
    assert "### file" in text
    assert text.index("### goals") < text.index("### memory")
    for part in text.split("### "):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    assert "1.00 (1.00–1.00)" in text  # noqa: RUF001
    assert report.missed(rows) == ["memory/randread-4k-d16"]


def test_nbdkit_comes_along_with_whatever_is_chosen() -> None:
    (task,) = bench.selected(["script/randread*/pynbdkit"])
    assert (task.kind, task.workload.name) == ("script", "randread-4k-d16")
    assert task.servers == ("nbdkit", "pynbdkit")
    (task,) = bench.selected(["memory/nbdcopy-in/nbdkit"])
    assert task.servers == ("nbdkit",)
    (task,) = bench.selected(["slow/*/pynbdkit-t64"])
    assert task.servers == ("nbdkit", "nbdkit-t64", "pynbdkit-t64")[1:]
    (task,) = bench.selected(["start/*/pynbdkit"])
    assert (task.workload.name, task.servers) == ("run-true", ("nbdkit", "pynbdkit"))
    assert len(bench.selected([])) == sum(len(bench.of_kind(kind)) for kind in servers.KINDS)
    assert bench.selected(["no such thing"]) == []


def test_a_kind_goes_with_the_server_that_it_is_there_for() -> None:
    tasks = bench.selected(["memory-workers", "memory/nbdcopy-in/limit-"])
    kept = bench.without(tasks, {"pynbdkit-workers", "limit-poll"})
    assert [(task.kind, task.servers) for task in kept] == [("memory", ("nbdkit",))]


WITH_SERVERS = [
    (kind, name)
    for kind, names in servers.KINDS.items()
    if kind not in alone.WORKLOADS
    for name in names
]


def test_pynbdkit_is_started_with_nbdkits_own_options(tmp_path: Path) -> None:
    place = servers.Place(tmp_path, tmp_path / "disk", SIZE, ("OURS",))

    def words(name: str, kind: str) -> list[str]:
        return servers.command(name, kind, place, Path("s"), Path("p"))

    for kind, name in WITH_SERVERS:
        if name in ("pynbdkit", "pynbdkit-t64") and kind != "async":
            assert words(name, kind) == ["OURS", *words(servers.baseline(kind, name), kind)[1:]]
    assert words("pynbdkit-t64", "async")[1:] == words("nbdkit-t64", "async")[1:]
    assert words("pynbdkit-workers", "file-workers") == (
        ["OURS", "-f", "-U", "s", "--workers", "2", *words("nbdkit", "file-workers")[4:]]
    )
    for kind, name in (("memory", "qemu-nbd"), ("start", "python"), ("nothing", "nbdkit")):
        with pytest.raises(ValueError, match=f"{name} has no {kind} disk"):
            words(name, kind)


def test_an_option_that_is_not_there_yet_leaves_its_rows_out(tmp_path: Path) -> None:
    for text, left_out in (("--workers N", None), ("-f", "has no --workers")):
        place = servers.Place(tmp_path, tmp_path, SIZE, ("echo", text))
        line = servers.missing("pynbdkit-workers", place)
        assert line is None if left_out is None else left_out in (line or "")


def test_the_name_in_proc_stat_may_hold_anything() -> None:
    fields = " ".join(str(number) for number in range(4, 53))
    parent, own, reaped = cpu.parse_stat(f"42 (a b) c) S {fields}")
    assert parent == 4
    assert own == pytest.approx((14 + 15) * cpu.TICK)
    assert reaped == pytest.approx((16 + 17) * cpu.TICK)


# A server that forks for each connection, in small: its child burns a fifth of a second, in a
# thread, says so and lives on; the parent waits for its end.
FORKING = """
import os, signal, sys, threading, time
def burn():
    while time.process_time() < 0.2: pass
for line in sys.stdin:
    child = os.fork()
    if not child:
        thread = threading.Thread(target=burn); thread.start(); thread.join()
        print("burnt", flush=True)
        signal.pause()
    os.waitpid(child, 0)
"""


def test_the_time_of_threads_and_of_children_counts() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        watch = cpu.Stopwatch(process.pid)
        watch.start()
        before = cpu.cpu_seconds(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "burnt\n"
        (child,) = cpu.children(process.pid)
        assert 0.2 <= cpu.cpu_seconds(process.pid) - before < 1  # the child lives
        # It ends while stop() waits for that, as a connection's process ends after the client.
        ending = threading.Timer(0.05, os.kill, (child, signal.SIGKILL))
        ending.start()
        used = watch.stop()
        ending.join()
        assert not cpu.children(process.pid)
        assert 0.18 <= used < 1  # in clock ticks now
    with pytest.raises(ProcessLookupError):
        cpu.cpu_seconds(process.pid)


def test_own_time_is_finer_than_a_tick() -> None:
    before = cpu.cpu_seconds(os.getpid())
    assert 0 < cpu.cpu_seconds(os.getpid()) - before < 1


def test_the_file_system_of_a_folder() -> None:
    assert machine.file_system(Path("/proc")) == "proc"
    assert machine.file_system(Path("/proc/self")) == "proc"
    assert machine.file_system(Path("/sys/kernel")) == "sysfs"


@pytest.fixture
def peers() -> None:
    for name in ("nbdkit", "fio", "nbdcopy", "certtool", "cc"):
        support.program(name)


@pytest.fixture
def place(tmp_path: Path, sockdir: Path) -> servers.Place:
    place = servers.Place(sockdir, tmp_path / "disk.img", SIZE, ("nbdkit", "-r"))
    bench.write_random(place.disk, SIZE)
    bench.write_random(workloads.source_file(place), SIZE)
    support.program("certtool")
    servers.make_certificates(tmp_path)
    return place


@pytest.mark.usefixtures("peers")
def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # nbdkit stands in for pynbdkit: what is tried here is the harness.
    where = ["--dir", str(tmp_path), "--json", str(tmp_path / "out.json")]
    where += ["--markdown", str(tmp_path / "out.md"), "--size", "8", "--pynbdkit", "nbdkit"]
    chosen = ["--only", "memory/randread-4k-d16/", "--only", "memory/nbdcopy-out/pynbdkit"]
    assert bench.main([*where, *chosen, "--rounds", "2", "--seconds", "0.1"]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out.md").read_text() == text
    assert text.startswith("- command: python benchmarks/bench.py --dir ")
    assert "- versions: nbdkit 1." in text
    assert re.search(r"^\| 4 KiB, 16 and 64 in flight +\| ≥ 1.8 ", text, re.MULTILINE)
    assert "| ratio to limit " in text
    everything = json.loads((tmp_path / "out.json").read_text())
    order = [(r["workload"], r["server"], r["round"]) for r in everything["records"]]
    turns = [("randread-4k-d16", name) for name in servers.KINDS["memory"]]
    turns += [("nbdcopy-out", "nbdkit"), ("nbdcopy-out", "pynbdkit")]
    assert order == [(*turn, number) for number in (1, 2) for turn in turns]
    for one in everything["records"]:
        sample = one["sample"]
        assert sample["requests"] > 10
        assert 0.05 < sample["seconds"] < 10
        assert 0 < sample["cpu"] < 2 * sample["seconds"]
    assert [row["rounds"] for row in everything["rows"]] == [2] * 6
    # Nothing stays behind but what was asked for.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md"]


@pytest.mark.usefixtures("peers")
def test_without_pynbdkit_the_rest_runs_and_the_status_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dir", str(tmp_path), "--size", "8", "--pynbdkit", "false"]
    what = ["--only", "memory/randread-4k-d1/", "--rounds", "1", "--seconds", "0.1"]
    assert bench.main([*where, *what]) == 1
    out, err = capsys.readouterr()
    assert "| randread-4k-d1 | nbdkit" in out
    assert "Left out, not there: pynbdkit." in out
    assert "left out: false --version failed" in err


def test_what_cannot_be_measured_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], peers: None
) -> None:
    assert bench.main(["--dir", str(tmp_path / "none"), "--only", "memory/nbdcopy-in/nbdkit"]) == 1
    assert bench.main(["--only", "no such thing"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "is no folder" in lines[0]
    assert "nothing is called like no such thing" in lines[1]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, name in WITH_SERVERS if servers.program(name) != "pynbdkit"],
)
@pytest.mark.usefixtures("peers")
def test_every_server_starts_answers_and_stops(kind: str, name: str, place: servers.Place) -> None:
    support.program({"limit": "cc"}.get(servers.program(name), servers.program(name)))
    with servers.Server(name, kind, place) as server:
        assert server.running()
        sample = workloads.Fio("four", "randwrite", 4096, 4, jobs=4).run(server, place, 0.1)
        assert sample.requests > 0
        assert sample.cpu > 0
    # nbd-server is nobody's child: whoever adopted it may not have waited for it yet.
    stat = Path(f"/proc/{server.pid}/stat")
    assert not stat.exists() or ") Z " in stat.read_text()


@pytest.fixture
def fua_client(peers: None) -> None:
    if workloads.libnbd_python() is None:
        support.missing("libnbd's Python module")


@pytest.mark.usefixtures("fua_client")
@pytest.mark.parametrize("bursts", [True, False])
def test_fua_writes_have_the_flag_and_a_dirty_file_behind_them(
    bursts: bool, place: servers.Place
) -> None:
    # nbdkit, when verbose, tells what it was asked.
    place = dataclasses.replace(place, pynbdkit=("nbdkit", "-v"))
    with servers.Server("pynbdkit", "file", place) as server:
        sample = workloads.Fua("fua", bursts).run(server, place, 0.1)
        log = (place.sockets / "pynbdkit-file.log").read_text()
    found = re.findall(r" file: pwrite count=(\d+) offset=(\d+) fua=([01])$", log, re.MULTILINE)
    writes = [tuple(map(int, numbers)) for numbers in found]
    fua = [offset for count, offset, flag in writes if (count, flag) == (4096, 1)]
    dirty = [offset for count, offset, flag in writes if (count, flag) == (MIB, 0)]
    assert len(fua) == sample.requests > 0
    assert len(fua) + len(dirty) == len(writes)
    assert set(dirty) == set(range(SIZE // 2, SIZE, MIB))
    assert max(fua) < SIZE // 2
    assert " file: flush" not in log
    if bursts:
        assert sample.requests % workloads.FUA_BURST == 0
        assert len(dirty) == 4 * sample.requests / workloads.FUA_BURST
    assert sample.nbytes == 4096 * sample.requests
    assert 0 < sample.seconds < 30


@pytest.mark.usefixtures("fua_client")
def test_a_server_that_does_not_offer_fua_gives_no_number(place: servers.Place) -> None:
    with (
        servers.Server("pynbdkit", "file", place) as server,  # it is read-only
        pytest.raises(workloads.WorkloadError, match="does not offer FUA"),
    ):
        workloads.Fua("fua", bursts=True).run(server, place, 0.1)


@pytest.mark.usefixtures("peers")
def test_a_client_that_fails_is_an_error(place: servers.Place) -> None:
    with servers.Server("pynbdkit", "memory", place) as server:
        with pytest.raises(workloads.WorkloadError, match="nbdcopy failed"):
            workloads.fill(server, place)
        with pytest.raises(workloads.WorkloadError, match="fio"):
            workloads.Fio("write", "randwrite", 4096, 1).run(server, place, 0.1)


@pytest.mark.usefixtures("peers")
def test_the_limit_keeps_what_is_written_in_pieces_of_any_size(place: servers.Place) -> None:
    support.program("cc")
    source, copy = workloads.source_file(place), place.disk.with_name("copy")
    for name in ("limit", "limit-poll"):
        with servers.Server(name, "memory", place) as server:
            for request in (4096, 8192, 32768, MIB):  # payloads in the buffer, and in pieces
                words = ["nbdcopy", f"--request-size={request}"]
                for way in ((source, server.uri), (server.uri, copy)):
                    workloads.run_client([*words, *map(str, way)], 30)
                assert copy.read_bytes() == source.read_bytes()
                bench.write_random(source, SIZE)
            fio = workloads.Fio("mixed", "randrw", 24 << 10, 8, jobs=4)
            assert fio.run(server, place, 0.05).requests > 0
            assert server.running()


@pytest.mark.usefixtures("peers")
def test_starts_and_idle_connections_are_measured(place: servers.Place) -> None:
    place = dataclasses.replace(place, pynbdkit=("nbdkit",))
    names = servers.KINDS["start"]
    starts = alone.WORKLOADS["start"].run_all(names, place, 0.1)
    assert list(starts) == list(names)
    for sample in starts.values():
        assert sample.requests == 3
        assert 0 < sample.cpu / 3 <= sample.seconds < 10
    idle = alone.Idle(connections=10).run_all(("nbdkit",), place, 0.1)
    assert 10 < idle["nbdkit"].nbytes / 10 / 1024 < 600
    place = dataclasses.replace(place, pynbdkit=("false",))
    with pytest.raises(workloads.WorkloadError, match="false ended with status 1"):
        alone.WORKLOADS["start"].run_all(["pynbdkit"], place, 0.1)
    with pytest.raises(workloads.WorkloadError, match="pynbdkit: the server ended at once"):
        alone.WORKLOADS["idle"].run_all(["pynbdkit"], place, 0.1)


def test_a_server_that_does_not_start_is_an_error(sockdir: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such plugin')")
    place = servers.Place(sockdir, sockdir / "disk", SIZE, command)
    with pytest.raises(servers.ServerError, match="ended at once: no such plugin"):
        servers.Server("pynbdkit", "memory", place)
