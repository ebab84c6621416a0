"""A reply to a write with FUA, and to a flush, means stable storage: looked at from three sides.

- The server is killed (SIGKILL) amid a stream of requests: what it has promised is in the file.
  Whatever a process has handed to the kernel survives its end, so this shows only that replies do
  not run ahead of the writing.
- strace sees that each reply is sent after the sync that it speaks of, in batches and in threads.
- A power cut: the file is on a filesystem of its own, whose device is copied at the moment of the
  kill. What the kernel had not yet written back is not in the copy; what was promised is. (The
  cache of a real disk comes after that. That it is flushed too is the kernel's part of a sync.)

The `fua` filter has a mode that throws FUA and flush away: with it the second and the third must
fail, which shows that they would.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import support
from acknowledged import SLOT, Writer
from block_device import mounted, needs
from command import wait_for_end
from system_calls import CALLS, Trace

Serve = Callable[..., support.ServerProcess]
Connect = Callable[..., Any]

SLOTS = 4096
HONEST: dict[str, tuple[str, ...]] = {
    "file": ("file", "{disk}"),
    "file, FUA by flush": ("--filter=fua", "file", "{disk}", "fuamode=emulate"),
    "file, in threads": ("--filter=delay", "file", "{disk}", "wdelay=1ms"),
    "file, in several processes": ("--workers=2", "file", "{disk}"),
}
TRACED = HONEST | {"cow": ("--filter=cow", "file", "{disk}")}
PROMISES = {
    "flush": {"write": 90, "flush": 10},
    "write, fua": {"write": 50, "write, fua": 50},
    "zero, fua": {"write": 50, "zero, fua": 25, "trim, fua": 25},
}
"""Requests of one kind that promises something, amid writes that do not."""
LYING = ("--filter=fua", "file", "{disk}", "fuamode=discard")


def make_disk(path: Path) -> None:
    """Half of it full of something else, half a hole, and all of that stable."""
    with path.open("wb") as stream:
        stream.write(random.Random(7).randbytes(SLOTS // 2 * SLOT))
        stream.truncate(SLOTS * SLOT)
        os.fsync(stream.fileno())


def words(path: tuple[str, ...], disk: Path) -> list[str]:
    return [word.format(disk=disk) for word in path]


def lost(disk: Path, writer: Writer) -> list[int]:
    """The slots in which something else is than what was promised."""
    with disk.open("rb") as stream:
        return [
            slot
            for slot, data in writer.promised.items()
            if os.pread(stream.fileno(), SLOT, slot * SLOT) != data
        ]


@pytest.mark.parametrize("path", HONEST)
@pytest.mark.parametrize("requests", [150, 1000, 2500])
def test_killed(
    nbd: ModuleType, path: str, requests: int, tmp_path: Path, serve: Serve, connect: Connect
) -> None:
    disk = tmp_path / "disk"
    make_disk(disk)
    server = serve(*words(HONEST[path], disk))
    writer = Writer(nbd, [connect(server) for _ in range(3)], SLOTS, seed=requests)
    writer.run(requests, at_half=lambda: kill(server))
    assert server.stop() == -signal.SIGKILL
    assert len(writer.promised) > requests // 8
    assert not lost(disk, writer)


# -- the order of system calls ---------------------------------------------------------------------


def traced(
    nbd: ModuleType, path: tuple[str, ...], folder: Path, disk: Path, connect: Connect
) -> Trace:
    """Some hundred requests to a server under strace."""
    trace, pidfile = folder / "trace", folder / "pid"
    command = [
        support.program("strace"), "-f", "-y", "-xx", "-s", "300000", "-e", f"trace={CALLS}",
        "-o", str(trace), sys.executable, "-m", "pynbdkit", "-P", str(pidfile),
    ]  # fmt: skip
    server = support.ServerProcess(folder, words(path, disk), command)
    try:
        writer = Writer(nbd, [connect(server) for _ in range(3)], SLOTS)
        writer.run(400)
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGTERM)
        try:
            status = server.process.wait(30)  # after it, strace has written its last line
        except subprocess.TimeoutExpired:
            os.kill(int(pidfile.read_text()), signal.SIGKILL)
            raise
    assert status == 0, server.log()
    return Trace(trace)


@pytest.mark.parametrize("path", TRACED)
def test_no_reply_before_the_sync(
    nbd: ModuleType, path: str, tmp_path: Path, sockdir: Path, connect: Connect
) -> None:
    disk = tmp_path / "disk"
    make_disk(disk)
    trace = traced(nbd, TRACED[path], sockdir, disk, connect)
    assert not trace.broken
    assert trace.checked.keys() == {"write", "write, fua", "zero, fua", "trim, fua", "flush"}
    assert sum(trace.checked.values()) == 400


def test_a_reply_before_the_sync_would_be_seen(
    nbd: ModuleType, tmp_path: Path, sockdir: Path, connect: Connect
) -> None:
    disk = tmp_path / "disk"
    make_disk(disk)
    trace = traced(nbd, LYING, sockdir, disk, connect)
    broken = {re.sub(r" at .*", "", line) for line in trace.broken}
    assert broken == {"write, fua", "zero, fua", "trim, fua", "flush"}


# -- the power fails -------------------------------------------------------------------------------


def kill(server: support.ServerProcess) -> None:
    """End a server and its workers (--workers) at once; none of these is replaced meanwhile."""
    pid = server.process.pid
    os.kill(pid, signal.SIGSTOP)
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pidfds = [os.pidfd_open(int(worker)) for worker in workers]
    for fd in pidfds:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    for fd in pidfds:
        assert wait_for_end(fd)
        os.close(fd)
    server.process.kill()
    server.process.wait()


class Machine:
    """A filesystem with a disk on it, on a device of its own: an image."""

    def __init__(self, folder: Path, nbd: ModuleType, serve: Serve, connect: Connect) -> None:
        self._folder = folder
        self._nbd = nbd
        self._serve = serve
        self._connect = connect

    def cut_power(
        self, path: tuple[str, ...], kinds: Mapping[str, int], seed: int = 1
    ) -> list[int]:
        """Serve the disk, let the power fail while it is written to; returns what was lost."""
        image, after, point = (self._folder / name for name in ("image", "after", "mnt"))
        with image.open("wb") as stream:
            stream.truncate(64 << 20)
        support.run("mkfs.ext4", "-q", "-F", image)
        with mounted(image, point, "loop") as root:
            make_disk(root / "disk")
            support.run("sync", "-f", root)
            server = self._serve(*words(path, root / "disk"))
            clients = [self._connect(server) for _ in range(3)]
            writer = Writer(self._nbd, clients, SLOTS, seed, kinds)

            def cut() -> None:
                kill(server)
                support.run("cp", "--sparse=always", image, after)

            writer.run(1600, at_half=cut)
        assert len(writer.promised) > 200
        with mounted(after, point, "loop") as root:
            return lost(root / "disk", writer)


@pytest.fixture
def machine(tmp_path: Path, nbd: ModuleType, serve: Serve, connect: Connect) -> Machine:
    needs("mkfs.ext4", "cp")
    return Machine(tmp_path, nbd, serve, connect)


@pytest.mark.parametrize("kinds", PROMISES)
@pytest.mark.parametrize("path", HONEST)
def test_power_cut(path: str, kinds: str, machine: Machine) -> None:
    assert not machine.cut_power(HONEST[path], PROMISES[kinds])


@pytest.mark.parametrize("kinds", PROMISES)
def test_a_power_cut_would_lose_what_is_not_stable(kinds: str, machine: Machine) -> None:
    """Three times, as somebody else's sync may save what the server has not."""
    assert any(machine.cut_power(LYING, PROMISES[kinds], seed) for seed in range(3))
