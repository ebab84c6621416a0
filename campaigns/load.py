#!/usr/bin/env python3
"""Load a server of the command line with clients, and measure what they cost: `make load`.

Each stage starts a server, does something to it, and looks whether it keeps its promises: what is
promised has a limit here, and a run in which a limit is exceeded exits with 1. nbdkit is measured
in the same way where it is installed, as a comparison; nothing is promised for it. The stages:

- crowd: many connections that idle, and some that work. Memory and threads that an idle one costs,
  and what the ones that work notice of it.
- used: idle connections after a large write. What they keep of it, and what is left when they go.
- churn: connections that come and go, in every state and in every way. Nothing of them stays.
- stall: connections that stop in the middle of something. The handshake's are ended by --timeout,
  also when they send a byte now and then; the others harm nobody.
- tls: the same over TLS, where the server has it: what it costs, what stays, what stalls.
- hoard: connections that announce the largest write, or do not read the largest replies.
- gone: TCP clients whose machine has gone without a word (needs root; see half_open.py).

Network: Unix sockets, 127.0.0.1, and network namespaces of its own.
Exit status: 0 promises kept, 1 broken, 2 wrong options.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import crowd
import half_open
import subject
from crowd import IDLE, IDLE_TLS, NEGOTIATION, TRANSMISSION, State, Workers
from subject import KIB, LOOK, MIB, PYNBDKIT, Figures, Subject, SubjectError

DISK = 64 * MIB
LARGEST = 64 * MIB
"""Bytes of the largest write or read that both servers take."""
BURST = 2 * MIB
DRIP = crowd.option(crowd.OPT_GO, bytes(crowd.LONG_NAME))

# What is promised (docs/reliability.md). Times have room for a machine that does other work, too.
IDLE_COST = 48 * KIB
"""Resident bytes that an idle connection costs at most."""
IDLE_THREADS = 1.0
SILENCE = 10.0
"""Seconds within which a connection that has nothing to do has given back what it does not need."""
USED_COST = 128 * KIB
"""Resident bytes of an idle connection after a large write, seconds later."""
ANNOUNCED_COST = 1 * MIB
"""Resident bytes of a connection that has announced 64 MiB, and sent one byte."""
HOARD_COST = 3 * LARGEST
LEFT_OF_HOARD = 32 * MIB
SLOWER = 4.0
"""How much longer the median of those that work may take with a crowd of idle connections."""
HARMED = 0.25
"""Seconds that 99 of 100 replies may take longer, because of clients that stall, than the worst."""
LEFT_PER_VISIT = 1 * KIB
"""Bytes a connection that came and went; a leak of one Python object tree is more."""
LEFT_AT_LEAST = 4 * MIB
TIMEOUT_SLACK = 3.0
EARLY = 0.5
"""Seconds that the clients which stall may take to come: the first ones end so much before."""
MINUTES = 240.0
"""Seconds after which a client that is silent, or acknowledges nothing, is known to be gone."""
GRACE = 5.0
HURRY = 1 / 60
FEW_REPEATS = 3
"""How often TCP sends again before it gives up, in a hurry: about three seconds."""
"""A minute of the kernel's patience becomes a second."""


@dataclass(frozen=True)
class Size:
    """How much of everything: the campaign, or a short run."""

    connections: int = 1000
    working: int = 100
    seconds: float = 5.0
    pause: float = 0.05
    visits: int = 10_000
    stalled: int = 50
    hoarders: int = 10
    timeout: int = 3
    gone: int = 20
    minutes: bool = True
    """Whether to wait as long for silent clients as the server really does."""


SHORT = Size(60, 10, 0.5, 0.02, 300, 3, 2, 1, 3, False)


@dataclass
class Report:
    """What was measured of one server, and which promises it broke."""

    server: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def tell(self, what: str, value: str) -> None:
        """Note a figure."""
        self.lines.append((what, value))

    def promise(self, what: str, value: float, limit: float, unit: str = "") -> None:
        """Note that a figure has to be within a limit."""
        if value > limit:
            self.broken.append(f"{what}: {value:.6g}{unit}, promised are {limit:.6g}{unit}")


@dataclass(frozen=True)
class Bench:
    """Where servers of one kind are started: how, and in which folder."""

    report: Report
    folder: Path
    command: Sequence[str]
    size: Size

    @property
    def ours(self) -> bool:
        """Whether it is pynbdkit, of which alone something is promised."""
        return self.report.server == "pynbdkit"

    @contextmanager
    def subject(self, *arguments: str, tcp: bool = False) -> Iterator[Subject]:
        """A server, past its first connections (what it loads once is no connection's cost)."""
        words = arguments or ("memory", str(DISK))
        with Subject(self.folder, words, command=self.command, tcp=tcp) as server:
            crowd.churn(server.address, (IDLE,), 20)
            server.quiet()
            yield server

    def promise(self, what: str, value: float, limit: float, unit: str = "") -> None:
        """As in the report, for our server only."""
        if self.ours:
            self.report.promise(what, value, limit, unit)


def cost(before: Figures, after: Figures, count: int) -> str:
    """What each of `count` connections costs."""
    return (
        f"{(after.rss - before.rss) / count / KIB:.0f} KiB resident"
        f" ({(after.pss - before.pss) / count / KIB:.0f} proportional,"
        f" {(after.virtual - before.virtual) / count / KIB:.0f} virtual),"
        f" {(after.threads - before.threads) / count:.3g} threads"
    )


def idle_connection(server: Subject, count: int) -> tuple[Figures, Figures]:
    """What a server has before `count` idle connections come, and while they are there."""
    before = server.figures()
    with crowd.crowd(server.address, IDLE, count):
        return before, server.figures()


# -- stages ----------------------------------------------------------------------------------------


def idle_crowd(bench: Bench) -> None:
    """Idle connections: what they cost, and what the ones that work notice."""
    size, report = bench.size, bench.report
    (bench.folder / "disk").write_bytes(bytes(DISK))
    for plugin in (("memory", str(DISK)), ("file", str(bench.folder / "disk"))):
        with bench.subject(*plugin) as server:
            start = server.figures()
            idle = size.connections - size.working
            with Workers(server.address, size.working, DISK) as workers:
                paced = [workers.work(size.seconds, size.pause)]
                before = server.figures()
                with crowd.crowd(server.address, IDLE, idle):
                    during = server.figures()
                    paced.append(workers.work(size.seconds, size.pause))
                    tilted = [workers.work(size.seconds / 2)]
                workers.work(size.seconds / 10, size.pause)
                tilted.insert(0, workers.work(size.seconds / 2))
            end, seconds = server.settle(start.threads + 1, start.descriptors)
        name = f"{plugin[0]} plugin"
        each = (during.rss - before.rss) / idle
        threads = (during.threads - before.threads) / idle
        report.tell(f"{name}: an idle connection costs", cost(before, during, idle))
        bench.promise(f"{name}: an idle connection", each / KIB, IDLE_COST / KIB, " KiB")
        bench.promise(f"{name}: threads of an idle connection", threads, IDLE_THREADS)
        for text, (alone, beside) in (("at a pace", paced), ("at full tilt", tilted)):
            what = f"{name}: {size.working} that work {text}, p50 / p99 / max"
            report.tell(f"{what}, alone", f"{alone} at {alone.rate:.0f}/s")
            report.tell(f"{what}, beside {idle} idle", f"{beside} at {beside.rate:.0f}/s")
        slower = paced[0].median * SLOWER + 0.001
        bench.promise(f"{name}: the median beside idle ones", paced[1].median, slower, " s")
        left = f"{(end.rss - start.rss) / MIB:.1f} MiB more than before, after {seconds:.2f} s"
        report.tell(f"{name}: when all have gone", left)


def _burst(sock: socket.socket) -> None:
    crowd.go(sock)
    sock.sendall(crowd.request(crowd.WRITE, count=BURST) + bytes(BURST))
    crowd.receive(sock, 16)


def used(bench: Bench) -> None:
    """Idle connections after a large write."""
    state = State("idle after a write of 2 MiB", _burst, farewell=crowd.request(crowd.DISC))
    count = bench.size.stalled * 2
    with bench.subject() as server:
        crowd.churn(server.address, (state,), 1)
        start = server.quiet()
        with crowd.crowd(server.address, state, count):
            deadline = time.monotonic() + SILENCE
            while (during := server.figures()).rss - start.rss > count * USED_COST:
                if time.monotonic() > deadline:  # nbdkit keeps it
                    break
                time.sleep(LOOK)
        end, _ = server.settle(start.threads + 1, start.descriptors)
    bench.report.tell(f"{state.name}, it costs", cost(start, during, count))
    left = (end.rss - start.rss) / MIB
    bench.report.tell(f"{state.name}: left of {count}", f"{left:.1f} MiB")
    each = (during.rss - start.rss) / count / KIB
    bench.promise(f"{state.name}, it costs", each, USED_COST / KIB, " KiB")
    bench.promise(f"{state.name}: left of {count}", left, LEFT_OF_HOARD / MIB, " MiB")


def churn(bench: Bench) -> None:
    """Connections that come and go, in every state and in every way."""
    visits = bench.size.visits // 2
    for tcp in (False, True):
        with bench.subject(tcp=tcp) as server:
            states = (*NEGOTIATION, *TRANSMISSION)
            warm = max(visits // 10, 100)
            crowd.churn(server.address, states, warm)
            base = server.quiet()
            begin = time.monotonic()
            crowd.churn(server.address, states, visits)
            seconds = time.monotonic() - begin
            end, wait = server.settle(base.threads + 1, base.descriptors)
        kind = "TCP" if tcp else "Unix socket"
        left = end.rss - base.rss
        bench.report.tell(
            f"{visits} connections come and go, {kind}",
            f"{seconds:.1f} s; descriptors and threads as before after {wait:.2f} s more;"
            f" memory {left / KIB:+.0f} KiB",
        )
        limit = max(LEFT_AT_LEAST, visits * LEFT_PER_VISIT)
        bench.promise(f"left of {visits} connections, {kind}", left / KIB, limit / KIB, " KiB")


def stall(bench: Bench) -> None:
    """Connections that stop in the middle of something, beside one that works."""
    size = bench.size
    limited = ("--timeout", str(size.timeout)) if bench.ours else ()
    with bench.subject(*limited, "memory", str(DISK)) as server, ExitStack() as stack:
        workers = stack.enter_context(Workers(server.address, 1, DISK))
        alone = workers.work(size.seconds, 0.002)
        for state in TRANSMISSION:
            start = server.figures()
            with crowd.crowd(server.address, state, size.stalled):
                beside = workers.work(size.seconds / 2, 0.002)
                during = server.figures()
            server.settle(start.threads + 1, start.descriptors)
            each = cost(start, during, size.stalled)
            bench.report.tell(f"{size.stalled} stall: {state.name}", f"{each}; one works: {beside}")
            limit = alone.worst + HARMED
            bench.promise(f"p99 while others stall ({state.name})", beside.p99, limit, " s")
        bench.report.tell("one works, alone", str(alone))
        if bench.ours:
            _handshakes_end(bench, server, workers, NEGOTIATION)


def _handshakes_end(
    bench: Bench, server: Subject, workers: Workers, states: Sequence[State]
) -> None:
    """--timeout ends whoever stalls in the handshake, and nobody else."""
    size = bench.size
    start = server.figures()
    slowly = State("a byte of an option now and then", NEGOTIATION[3].before)
    for group, drip in ((states, b""), ((slowly,), DRIP)):
        with ExitStack() as stack:
            crowds = [
                stack.enter_context(crowd.crowd(server.address, state, size.stalled))
                for state in group
            ]
            socks = [sock for socks in crowds for sock in socks]
            limit = size.timeout + TIMEOUT_SLACK
            try:
                seconds = crowd.ends(socks, limit, drip, size.timeout / 10)
            except TimeoutError as error:
                bench.report.broken.append(f"--timeout {size.timeout}: {error}")
                continue
        for number, state in enumerate(group):
            these = seconds[number * size.stalled : (number + 1) * size.stalled]
            bench.report.tell(
                f"{size.stalled} in the handshake, --timeout {size.timeout}: {state.name}",
                f"ended {min(these):.2f} to {max(these):.2f} s after all had come",
            )
            early = size.timeout - EARLY - min(these)
            bench.promise(f"ended before its time: {state.name}", early, 0, " s")
        server.settle(start.threads, start.descriptors)
    workers.work(0.1, 0.002)  # they still work, long past that time


def secured(bench: Bench) -> None:
    """Clients with TLS, and clients that stop on the way to it."""
    certificate = ("-subj", "/CN=localhost", "-days", "2", "-nodes", "-newkey", "ec", "-pkeyopt",
                   "ec_paramgen_curve:prime256v1", "-keyout", "server-key.pem")  # fmt: skip
    words = ["openssl", "req", "-x509", *certificate, "-out", "server-cert.pem"]
    folder = bench.folder / "certificates"
    folder.mkdir()
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    shutil.copy(folder / "server-cert.pem", folder / "ca-cert.pem")
    limited = ("--timeout", str(bench.size.timeout)) if bench.ours else ()
    options = ("--tls=on", f"--tls-certificates={folder}", *limited)
    count = bench.size.stalled * 2
    with bench.subject(*options, "memory", str(DISK)) as server:
        with crowd.crowd(server.address, IDLE_TLS, 1), crowd.crowd(server.address, IDLE, 1):
            start = server.figures()
            with crowd.crowd(server.address, IDLE_TLS, count):
                during = server.figures()
            server.settle(start.threads, start.descriptors)
            bench.report.tell("an idle connection with TLS costs", cost(start, during, count))
            if bench.ours:  # a peer without a limit may wait for ever for the end of a handshake
                _tls_visits(bench, server, start)
        if bench.ours:
            server.quiet()
            with Workers(server.address, 1, DISK) as workers:
                _handshakes_end(bench, server, workers, crowd.TLS)


def _tls_visits(bench: Bench, server: Subject, start: Figures) -> None:
    visits = bench.size.visits // 10
    states = (*crowd.TLS, IDLE_TLS)
    crowd.churn(server.address, states, max(visits // 10, 50))
    base, _ = server.settle(start.threads, start.descriptors)
    crowd.churn(server.address, states, visits)
    end, _ = server.settle(start.threads, start.descriptors)
    left = (end.rss - base.rss) / KIB
    what = f"left of {visits} connections with TLS, or on the way to it"
    bench.report.tell(what, f"{left:+.0f} KiB")
    limit = max(LEFT_AT_LEAST, visits * LEFT_PER_VISIT) / KIB
    bench.promise(what, left, limit, " KiB")


def hoard(bench: Bench) -> None:
    """Connections that ask for as much as they may, and then do nothing."""
    write = crowd.request(crowd.WRITE, count=LARGEST) + b"x"
    reads = crowd.request(crowd.READ, count=LARGEST) * 16
    disk = bench.folder / "disk"
    with disk.open("wb") as file:
        file.truncate(LARGEST)
        file.write(b"x")
    announcing = State("64 MiB to write announced, one byte sent", crowd.go, write)
    unread = State("16 reads of 64 MiB, no reply read", crowd.go, reads)
    for state, plugin, limit in (
        (announcing, "memory", ANNOUNCED_COST),
        (unread, "file", HOARD_COST),
    ):
        words = (plugin, str(disk) if plugin == "file" else str(DISK))
        try:
            with bench.subject(*words) as server:
                with Workers(server.address, 1, DISK) as workers:
                    start = server.figures()
                    with crowd.crowd(server.address, state, bench.size.hoarders):
                        beside = workers.work(bench.size.seconds / 2, 0.005)
                        during = server.figures()
                    server.settle(start.threads + 1, start.descriptors)
                    end = server.figures()
                each = cost(start, during, bench.size.hoarders)
                left = (end.rss - start.rss) / MIB
                resident = (during.rss - start.rss) / bench.size.hoarders / KIB
                bench.promise(f"it hoards: {state.name}", resident, limit / KIB, " KiB")
                bench.promise(f"left of: {state.name}", left, LEFT_OF_HOARD / MIB, " MiB")
                text = f"{each}; one works: {beside}; afterwards {left:+.1f} MiB"
        except (SubjectError, OSError) as error:
            if bench.ours:
                raise
            text = str(error)
        bench.report.tell(f"{bench.size.hoarders} hoard: {state.name}", text)


UNDER_WAY = State("a read's reply on its way", crowd.go, crowd.request(crowd.READ, count=1 << 16))
"""The reply comes a second later (a delay filter), when the cable has been pulled."""
GONE = (IDLE, TRANSMISSION[3], UNDER_WAY)


def gone(bench: Bench) -> None:
    """TCP clients whose machine has gone without a word."""
    why = half_open.unable()
    if why:
        bench.report.tell("clients gone without a word", f"not measured: {why}")
        return
    patience = _leave_half_open(bench, GONE, HURRY)
    bench.report.tell("patience with a TCP client", str(patience))
    bench.promise("silence until a client is gone", patience.silence, MINUTES, " s")
    if bench.size.minutes and bench.ours:
        _leave_half_open(bench, GONE[:1], 1)


def _leave_half_open(bench: Bench, states: Sequence[State], factor: float) -> half_open.Patience:
    """Clients in these states are gone: how long until the server has noticed?"""
    count = bench.size.gone
    words = ("--filter", "delay", "memory", str(DISK), "rdelay=1")
    with ExitStack() as stack:
        repeats = FEW_REPEATS if factor < 1 else None
        network = stack.enter_context(half_open.Network("load", repeats))
        server = stack.enter_context(
            Subject(bench.folder, words, command=bench.command, network=network)
        )
        start = server.quiet()
        for state in states:
            stack.enter_context(network.as_client(partial(_opened, server, state, count)))
        network.cut()
        with half_open.sockets_of(server.process.pid) as socks:
            patience = half_open.Patience.of(socks[0])
            short = [half_open.Patience.of(sock).scaled(sock, factor) for sock in socks]
        name = ", ".join(state.name for state in states)
        limit = max(short[0].silence, HURRY * MINUTES)
        what = f"{count * len(states)} gone without a word: {name}"
        if limit == float("inf"):
            raise SubjectError(f"{what}: never noticed, {patience}")
        begin = time.monotonic()
        server.settle(start.threads + 1, start.descriptors, limit * 2 + GRACE)
        bench.report.tell(what, f"noticed after {time.monotonic() - begin:.0f} s, {short[0]}")
    return patience


def _opened(server: Subject, state: State, count: int) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(crowd.crowd(server.address, state, count))
    return stack


STAGES: dict[str, Callable[[Bench], None]] = {
    "crowd": idle_crowd,
    "used": used,
    "churn": churn,
    "stall": stall,
    "tls": secured,
    "hoard": hoard,
    "gone": gone,
}


def measure(name: str, command: Sequence[str], size: Size, stages: Sequence[str]) -> Report:
    """Put one server through these stages."""
    report = Report(name)
    crowd.descriptor_limit(size.connections + 200)
    with tempfile.TemporaryDirectory(prefix="load") as folder:
        bench = Bench(report, Path(folder), command, size)
        for stage in stages:
            try:
                STAGES[stage](bench)
            except (SubjectError, OSError, EOFError, RuntimeError) as error:
                if bench.ours:
                    report.broken.append(f"{stage}: {error}")
                else:
                    report.tell(stage, f"ended: {error}")
    return report


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--short", action="store_true", help="the sizes of the test suite")
    parser.add_argument("--alone", action="store_true", help="do not measure nbdkit")
    options = parser.parse_args(words)
    stages = options.stages or list(STAGES)
    for stage in stages:
        if stage not in STAGES:
            parser.error(f"unknown stage {stage!r} (there are {', '.join(STAGES)})")
    size = SHORT if options.short else Size()
    servers: dict[str, Sequence[str]] = {"pynbdkit": PYNBDKIT}
    found = subject.peer()
    if not options.alone:
        if found is None:
            print("nbdkit is not installed: measured without it", file=sys.stderr)
        else:
            servers["nbdkit"] = found
    broken = 0
    for name, command in servers.items():
        report = measure(name, command, size, stages)
        print(f"## {name}\n\n| what | measured |\n| --- | --- |")
        for what, value in report.lines:
            print(f"| {what} | {value} |")
        print()
        for text in report.broken:
            print(f"BROKEN: {text}", file=sys.stderr)
        broken += len(report.broken)
        sys.stdout.flush()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
