"""The memory plugin, over the wire and as a model."""

from __future__ import annotations

import errno
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pynbdkit
from pynbdkit.chain import Chain
from pynbdkit.complete import Layer
from pynbdkit.plugins.memory import LARGE_WRITE, MADV_POPULATE_WRITE, MappedDisk, SharedDisk
from pynbdkit.session import Session
from support import ServerProcess, run
from support import pynbdkit as command

CHUNK = 1 << 16


def opened(workers: int = 1, **config: str) -> Layer:
    chain = Chain(pynbdkit.load_plugin("memory", **config))
    chain.load()
    chain.complete()
    chain.get_ready(workers)
    return chain.open(Session())


def test_what_a_client_is_offered(serve: Callable[..., ServerProcess], connect: Any) -> None:
    handle = connect(serve("memory", "1M"))
    assert handle.get_size() == 1 << 20
    for able in ("fua", "flush", "trim", "zero", "fast_zero", "multi_conn", "cache", "df"):
        assert getattr(handle, f"can_{able}")(), able
    assert not handle.is_read_only()
    assert not handle.is_rotational()


def test_clients_see_the_same_disk(serve: Callable[..., ServerProcess], connect: Any) -> None:
    server = serve("memory", "1M")
    one, two = connect(server), connect(server)
    one.pwrite(b"from one", 1000)
    assert two.pread(8, 1000) == b"from one"
    two.zero(4, 1000)
    assert one.pread(8, 1000) == b"\0\0\0\0 one"


@pytest.mark.parametrize("allocator", ["sparse", "malloc"])
def test_extents_tell_what_was_written(
    serve: Callable[..., ServerProcess], connect: Any, allocator: str
) -> None:
    handle = connect(serve("memory", "4M", f"allocator={allocator}"))
    handle.pwrite(b"x" * 512, 3 * CHUNK)
    handle.pwrite(b"x" * (CHUNK + 2), 10 * CHUNK - 1)
    found: list[int] = []
    handle.block_status(4 << 20, 0, lambda _name, _offset, entries, _error: found.extend(entries))
    if allocator == "malloc":
        assert found == [4 << 20, 0]
        return
    assert found == [
        *(3 * CHUNK, 3, CHUNK, 0, 5 * CHUNK, 3, 3 * CHUNK, 0),
        *((4 << 20) - 12 * CHUNK, 3),
    ]
    handle.trim(CHUNK, 3 * CHUNK)
    found.clear()
    handle.block_status(4 << 20, 0, lambda _name, _offset, entries, _error: found.extend(entries))
    assert found[:2] == [9 * CHUNK, 3]


def resident(server: ServerProcess) -> int:
    words = Path(f"/proc/{server.process.pid}/statm").read_text().split()
    return int(words[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("how", ["trim", "zero"])
def test_memory_is_given_back(serve: Callable[..., ServerProcess], connect: Any, how: str) -> None:
    server = serve("memory", "1T")
    handle = connect(server)
    handle.pread(1, 0)
    before = resident(server)
    for at in range(0, 64 << 20, 16 << 20):
        handle.pwrite(b"x" * (16 << 20), (1 << 39) + at)
    assert resident(server) - before > 60 << 20
    getattr(handle, how)(64 << 20, 1 << 39)
    handle.flush()
    assert handle.pread(512, 1 << 39) == bytes(512)
    assert resident(server) - before < 24 << 20


def test_the_largest_disk(serve: Callable[..., ServerProcess], connect: Any) -> None:
    handle = connect(serve("memory", str(2**63 - 1)))
    assert handle.get_size() == 2**63 - 1
    handle.pwrite(b"the end", 2**63 - 8)
    assert handle.pread(7, 2**63 - 8) == b"the end"


def test_no_disk_at_all(serve: Callable[..., ServerProcess], connect: Any) -> None:
    assert connect(serve("memory", "0")).get_size() == 0


@pytest.mark.parametrize("allocator", ["malloc", "malloc,mlock=true", "mlock", "malloc,mlock=no"])
def test_allocators(serve: Callable[..., ServerProcess], connect: Any, allocator: str) -> None:
    handle = connect(serve("memory", "1M", f"allocator={allocator}"))
    handle.pwrite(b"x" * 200000, 100)
    handle.trim(100000, 100)
    assert handle.pread(200000, 100) == bytes(100000) + b"x" * 100000


def test_locked_memory_is_locked(serve: Callable[..., ServerProcess]) -> None:
    server = serve("memory", "1M", "allocator=malloc,mlock=true")
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    locked = next(line for line in status.splitlines() if line.startswith("VmLck"))
    assert int(locked.split()[1]) >= 1024


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["memory"], "size=<SIZE>"),
        (["memory", "1X"], "'X'"),
        (["memory", "-1"], "unrecognized option"),
        (["memory", "1M", "allocator=foo"], '"foo"'),
        (["memory", "1M", "allocator=zstd"], "not supported"),
        (["memory", "1M", "allocator=sparse,mlock=true"], "mlock=true"),
        (["memory", "1M", "colour=red"], "unknown parameter 'colour'"),
        (["memory", "1000P", "allocator=malloc"], "too large"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str) -> None:
    done = command("-f", "-U", "/nowhere/socket", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_copies_there_and_back(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as stream:
        stream.truncate(32 << 20)
        for at in (0, 5 << 20, (32 << 20) - 10):
            stream.seek(at)
            stream.write(b"0123456789")
    server = serve("memory", "32M")
    run("nbdcopy", source, server.uri)
    run("nbdcopy", server.uri, target)
    run("cmp", source, target)
    assert target.stat().st_blocks * 512 < 2 << 20


class Advised:
    """A mapping that notes what the kernel is told of it, and may answer with an error."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.heard: list[tuple[int, ...]] = []

    def madvise(self, *advice: int) -> None:
        self.heard.append(advice)
        if self.error:
            raise OSError(self.error, "no")


@pytest.mark.parametrize(
    ("offset", "count", "asked"),
    [
        (0, LARGE_WRITE, (0, LARGE_WRITE)),
        (CHUNK - 1, LARGE_WRITE, (CHUNK - mmap.PAGESIZE, LARGE_WRITE + mmap.PAGESIZE - 1)),
        (20 * CHUNK - LARGE_WRITE, LARGE_WRITE, (20 * CHUNK - LARGE_WRITE, LARGE_WRITE)),
        (0, LARGE_WRITE - 1, None),
    ],
)
def test_a_large_write_gets_its_pages_at_once(
    offset: int, count: int, asked: tuple[int, int] | None
) -> None:
    disk = MappedDisk(20 * CHUNK, True, False)
    device = disk.device()
    disk.map = kernel = Advised()  # type: ignore[assignment]
    for byte in b"xy":
        device.pwrite(memoryview(bytes([byte]) * count), offset, 0)
        assert device.pread(count, offset, 0) == bytes([byte]) * count
    # The second time they are there.
    assert kernel.heard == ([(MADV_POPULATE_WRITE, *asked)] if asked else [])


@pytest.mark.parametrize(("error", "times"), [(errno.EINVAL, 1), (errno.ENOMEM, 3)])
def test_a_kernel_that_does_not_give_them(error: int, times: int) -> None:
    """It does not know how, and is not asked again; or it has none now."""
    disk = MappedDisk(20 * CHUNK, True, False)
    device = disk.device()
    disk.map = kernel = Advised(error)  # type: ignore[assignment]
    for number in range(3):
        device.pwrite(memoryview(b"x" * LARGE_WRITE), number * LARGE_WRITE, 0)
    assert device.pread(3 * LARGE_WRITE, 0, 0) == b"x" * 3 * LARGE_WRITE
    assert len(kernel.heard) == times


@pytest.mark.parametrize("allocator", ["sparse", "malloc"])
def test_a_small_write_takes_a_small_page(
    serve: Callable[..., ServerProcess], connect: Any, allocator: str
) -> None:
    """Also where the system gives large ones unasked; what is reserved is left to it."""
    server = serve("memory", "77M", f"allocator={allocator}")
    connect(server)
    smaps = Path(f"/proc/{server.process.pid}/smaps").read_text()
    found = re.findall(r"^Size: +(\d+) kB$.*?^VmFlags:(.*?)$", smaps, re.MULTILINE | re.DOTALL)
    small = sum(int(size) for size, flags in found if "nh" in flags.split())
    assert (small >= 77 << 10) == (allocator == "sparse")


SIZE = 5 * CHUNK + 1000


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["sparse", "malloc"]),
    st.sampled_from([1, 2]),
    st.lists(
        st.tuples(
            st.sampled_from(["write", "trim", "zero", "zero_hole"]),
            st.integers(0, SIZE - 1),
            st.integers(1, 3 * CHUNK),
            st.integers(1, 255),
        ),
        max_size=12,
    ),
)
def test_it_is_a_disk(allocator: str, workers: int, steps: list[tuple[str, int, int, int]]) -> None:
    layer = opened(workers, size=str(SIZE), allocator=allocator)
    model = bytearray(SIZE)
    for what, offset, length, byte in steps:
        count = min(length, SIZE - offset)
        if what == "write":
            layer.pwrite(memoryview(bytes([byte]) * count), offset, 0)
            model[offset : offset + count] = bytes([byte]) * count
        else:
            call = layer.trim if what == "trim" else layer.zero
            call(count, offset, pynbdkit.Flag.MAY_TRIM if what == "zero_hole" else 0)
            model[offset : offset + count] = bytes(count)
        assert bytes(layer.pread(SIZE, 0, 0)) == model
    position = 0
    for extent in layer.extents(SIZE, 0, 0):
        assert extent.offset == position
        position += extent.length
        if extent.type:
            assert not any(model[extent.offset : position])
    assert position == SIZE


@pytest.mark.parametrize("kind", [MappedDisk, SharedDisk])
def test_locked_memory_is_zeroed_where_it_cannot_be_given_back(kind: type[MappedDisk]) -> None:
    """With --swap the kernel refuses to give pages back: the disk is zeros all the same."""
    disk = kind(4 * CHUNK, True, True)
    device = disk.device()
    device.pwrite(memoryview(b"x" * 4 * CHUNK), 0, 0)
    device.trim(2 * CHUNK, CHUNK, 0)
    assert device.pread(4 * CHUNK, 0, 0) == b"x" * CHUNK + bytes(2 * CHUNK) + b"x" * CHUNK
    assert [kind for _, _, kind in device.extents(4 * CHUNK, 0, 0)] == [0, 3, 0]


def test_a_process_that_is_killed_leaves_nothing_that_is_not_noted() -> None:
    """Else a later zero of a part of it would find nothing to do, and leave the data."""
    disk = SharedDisk(4 * CHUNK, True, False)
    device = disk.device()

    class Killed(BaseException):
        pass

    class View:
        def __setitem__(self, where: slice, what: bytes) -> None:
            disk.view[where] = what
            raise Killed

    device._view = View()  # type: ignore[assignment]
    with pytest.raises(Killed):
        device.pwrite(memoryview(b"x" * 100), CHUNK, 0)
    other = disk.device()
    other.zero(50, CHUNK, pynbdkit.Flag.MAY_TRIM)
    assert other.pread(100, CHUNK, 0) == bytes(50) + b"x" * 50

    class Map:
        """Of one that is killed when it has given memory back for the `times`-th time."""

        def __init__(self, times: int) -> None:
            self.times = times

        def madvise(self, *arguments: int) -> None:
            disk_map.madvise(*arguments)
            self.times -= 1
            if not self.times:
                raise Killed

    disk_map = disk.map
    for times in (1, 2):
        other.pwrite(memoryview(b"y" * CHUNK), 0, 0)
        disk.map = Map(times)  # type: ignore[assignment]
        with pytest.raises(Killed):
            other.trim(CHUNK, 0, 0)
        disk.map = disk_map
        assert disk.view[:CHUNK] == bytes(CHUNK)
