"""What was written is what is read, over every path that a write can take.

fio verifies its own writes, on several connections at once. Its nbd engine sends no flags (so no
FUA), has no zero, and cannot verify trims (fio 3.33 ends itself when it is asked to): for these
there is a storm of libnbd's requests with a model (storm.py), and qemu-io.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import support
from storm import Storm

Serve = Callable[..., support.ServerProcess]
Connect = Callable[..., Any]

SIZE = (4 << 20) + 12345
"""Bytes; no sector, block or region divides it."""
REQUESTS = 1500
HIDDEN = 5000
"""Bytes that the offset filter leaves out on either side."""

PATHS = {
    "memory": ("memory", "{size}"),
    "memory, malloc": ("memory", "{size}", "allocator=malloc"),
    "data": ("data", "size={size}", "data=0"),
    "file": ("file", "{disk}"),
    "file, uncached": ("file", "{disk}", "cache=none"),
    "file, FUA by flush": ("-t", "1", "--filter=fua", "file", "{disk}", "fuamode=emulate"),
    "file, all FUA": ("--filter=fua", "file", "{disk}", "fuamode=force"),
    "file, zeros written": ("--filter=nozero", "file", "{disk}", "zeromode=emulate"),
    "file, part": ("--filter=offset", "file", "{disk}", "offset={hidden}", "range={size}"),
    "cow": ("--filter=cow", "file", "{disk}"),
    "cow, small blocks": ("--filter=cow", "file", "{disk}", "cow-block-size=4096"),
    "cow, keeping reads": ("--filter=cow", "file", "{disk}", "cow-on-read=true"),
    "cow, logged": ("--filter=log", "--filter=cow", "file", "{disk}", "logfile={log}"),
}
"""How a request may get to the bytes."""


@pytest.fixture(scope="module")
def old() -> bytes:
    """What is on a file before: data, holes, and data up to the end."""
    rng = random.Random(99)
    content = bytearray(SIZE)
    for place in (0, 1 << 20, (1 << 20) + 170_000, 3_000_000, SIZE - 100_000):
        content[place : place + 100_000] = rng.randbytes(100_000)
    return bytes(content)


class Served:
    """A disk, served in the way that `name` names; `start` may be called again after `stop`."""

    def __init__(self, name: str, serve: Serve, folder: Path, old: bytes) -> None:
        self.name = name
        self.in_file = name.startswith(("file", "cow"))
        self.keeps = name.startswith("file")
        self.content = old if self.in_file else bytes(SIZE)
        self._serve = serve
        self._hidden = HIDDEN if "part" in name else 0
        self._disk = folder / "disk"
        self._values = {
            "size": SIZE, "disk": self._disk, "hidden": self._hidden, "log": folder / "log",
        }  # fmt: skip
        if self.in_file:
            self._write_sparsely(bytes(self._hidden) + old + bytes(self._hidden))
        self.server = self.start()

    def _write_sparsely(self, content: bytes) -> None:
        with self._disk.open("wb") as stream:
            for place in range(0, len(content), 4096):
                block = content[place : place + 4096]
                if any(block):
                    stream.seek(place)
                    stream.write(block)
            stream.truncate(len(content))

    def start(self) -> support.ServerProcess:
        words = [word.format(**self._values) for word in PATHS[self.name]]
        self.server = self._serve(*words)
        return self.server

    def check_file(self, expected: bytes) -> None:
        """After the server has ended: what has to be in the file."""
        found = self._disk.read_bytes()
        size = len(found) - 2 * self._hidden
        assert size == SIZE
        assert not any(found[: self._hidden])
        assert not any(found[self._hidden + size :])
        assert found[self._hidden : self._hidden + size] == (
            expected if self.keeps else self.content
        )


@pytest.fixture
def served(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path, old: bytes) -> Served:
    return Served(request.param, serve, tmp_path, old)


every_path = pytest.mark.parametrize("served", PATHS, indirect=True)


# -- libnbd and a model ----------------------------------------------------------------------------


@every_path
def test_storm(nbd: ModuleType, served: Served, connect: Connect) -> None:
    clients = [connect(served.server) for _ in range(3)]
    for client in clients:
        assert client.can_multi_conn()
        assert client.can_fua()
        assert client.can_flush()
        assert client.can_trim()
        assert client.can_zero()
    storm = Storm(nbd, clients, served.content)
    storm.run(REQUESTS)
    fresh = connect(served.server)
    storm.compare(fresh.pread(SIZE, 0), storm.content, 0, "a new connection")
    assert served.server.stop() == 0
    if not served.in_file:
        return
    served.check_file(bytes(storm.content))
    if served.keeps:
        again = connect(served.start())
        storm.compare(again.pread(SIZE, 0), storm.content, 0, "after a restart")


@pytest.mark.parametrize("served", [name for name in PATHS if "cow" in name], indirect=True)
def test_neighbours(nbd: ModuleType, served: Served, connect: Connect) -> None:
    """Several connections write parts of one untouched block at once, and nobody's part is lost."""
    clients = [connect(served.server) for _ in range(4)]
    rng = random.Random(6)
    content = rng.randbytes(SIZE)
    for block in range(0, SIZE, 65536):
        end = min(block + 65536, SIZE)
        cuts = [block, *sorted(rng.sample(range(block + 1, end), 11)), end]
        waiting = []
        for number, (first, last) in enumerate(itertools.pairwise(cuts)):
            client = clients[number % 4]
            data = nbd.Buffer.from_bytearray(bytearray(content[first:last]))
            waiting.append((client, client.aio_pwrite(data, first)))
        for client, cookie in waiting:
            while not client.aio_command_completed(cookie):
                client.poll(-1)
    assert connect(served.server).pread(SIZE, 0) == content


# -- fio -------------------------------------------------------------------------------------------


def fio(uri: str, folder: Path, *options: str) -> dict[str, Any]:
    """Run fio; returns what it says of its jobs together."""
    output = folder / "fio.json"
    support.run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--verify=crc32c",
        "--verify_fatal=1", "--verify_state_save=0", "--randseed=7", "--group_reporting=1",
        "--output-format=json", f"--output={output}", *options,
    )  # fmt: skip
    text = output.read_text()
    (job,) = json.loads(text[text.index("{") :])["jobs"]
    assert job["error"] == 0
    return dict(job)


@pytest.mark.parametrize(
    "served", ["memory", "data", "file", "file, uncached", "cow, small blocks"], indirect=True
)
def test_fio(served: Served, tmp_path: Path) -> None:
    part = 1 << 20
    job = (
        "--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=1", f"--size={part}",
        "--numjobs=4", f"--offset_increment={part}", "--iodepth=16", "--fsync=16",
    )  # fmt: skip
    done = fio(served.server.uri, tmp_path, *job)
    assert done["write"]["io_bytes"] > 3.9 * part
    assert done["read"]["io_bytes"] == done["write"]["io_bytes"]
    assert done["sync"]["total_ios"] > 0
    if served.keeps:
        assert served.server.stop() == 0
        served.start()
    again = fio(served.server.uri, tmp_path, *job, "--verify_only=1")
    assert again["read"]["io_bytes"] == done["write"]["io_bytes"]


# -- qemu-io ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", ["memory", "data", "file", "cow"], indirect=True)
def test_qemu_io(served: Served, connect: Connect) -> None:
    """QEMU's block layer: writes with all its flags, pieces that no sector divides, read back."""
    rng = random.Random(5)
    content = bytearray(served.content)
    ways = (
        "write", "write -f", "aio_write", "aio_write -f", "write -z", "write -z -f", "write -z -u",
        "write -z -u -f", "aio_write -z -u", "discard",
    )  # fmt: skip
    commands: list[str] = []
    for number in range(80):
        way = ways[number % len(ways)]
        count = rng.choice((512, 4096, 65536, 131072, rng.randrange(1, 200_000)))
        offset = rng.randrange(SIZE - count)
        offset -= offset % rng.choice((1, 512, 4096, 65536))
        if way == "discard":  # of other pieces QEMU discards what it sees fit
            offset, count = offset & -65536, 65536
        value = 0 if "-z" in way or way == "discard" else rng.randrange(1, 256)
        pattern = f" -P {value}" if value else ""
        content[offset : offset + count] = bytes((value,)) * count
        commands += [f"{way}{pattern} {offset} {count}", "aio_flush"]
        commands.append(f"read -P {value} {offset} {count}")
        if number % 10 == 0:
            commands.append("flush")
    words = [word for command in commands for word in ("-c", command)]
    done = support.run("qemu-io", "-f", "raw", *words, served.server.uri)
    assert "failed" not in done.stdout, done.stdout
    assert connect(served.server).pread(SIZE, 0) == content
