"""The cow filter: a disk that can be written, over one that never is."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pynbdkit
import support
from pynbdkit import ConfigError, Device, Flag, OpenError, Session
from pynbdkit.chain import Chain
from pynbdkit.complete import Layer
from pynbdkit.fallocate import KEEP_SIZE, PUNCH_HOLE, fallocate
from pynbdkit.filters import _overlay
from pynbdkit.filters.cow import CowFilter
from recording import Recording, RecordingDisk, WriteOnly

BLOCK = 4096
WRITES = {"pwrite", "trim", "zero", "flush"}


class Untouched(RecordingDisk):
    """A disk that fails the test when it is written to, or opened to be."""

    def __init__(self, data: bytearray, events: list[tuple[Any, ...]]) -> None:
        super().__init__(data, events)
        self.hook: Callable[[int, int], None] = lambda count, offset: None

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        assert flags == 0
        assert count >= 0
        assert 0 <= offset <= len(self.data) - count
        data = super().pread(count, offset, flags)
        self.hook(count, offset)
        return data

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        raise AssertionError("written")

    def trim(self, count: int, offset: int, flags: int) -> None:
        raise AssertionError("trimmed")

    def zero(self, count: int, offset: int, flags: int) -> None:
        raise AssertionError("zeroed")

    def flush(self, flags: int) -> None:
        raise AssertionError("flushed")


class Base(Recording):
    """Random pages, and holes between them; `hook` is called in the middle of each read."""

    blocking = None

    def __init__(self, size: int, kind: type[RecordingDisk] = Untouched) -> None:
        super().__init__(size, kind)
        source = random.Random(1)
        for page in range(0, size, 8192):
            end = min(page + 4096, size)
            self.data[page:end] = source.randbytes(end - page)
        self.original = bytes(self.data)
        self.hook: Callable[[int, int], None] = lambda count, offset: None

    def open(self, session: Session) -> Device:
        assert session.readonly
        device = super().open(session)
        if isinstance(device, Untouched):
            device.hook = lambda count, offset: self.hook(count, offset)
        return device


class Cow:
    """A chain with the filter, ready to be opened; a context that throws the overlay away."""

    def __init__(self, plugin: pynbdkit.Plugin, **parameters: object) -> None:
        parameters.setdefault("cow_block_size", BLOCK)
        self.filter = CowFilter(**parameters)
        self.chain = Chain(plugin, [self.filter])
        self.chain.load()
        self.chain.complete()
        self.chain.get_ready()

    def open(self, name: str = "", readonly: bool = False) -> Layer:
        return self.chain.open(Session(export_name=name, readonly=readonly))

    @property
    def taken(self) -> int:
        """Bytes that the overlay's file takes on the disk."""
        assert self.filter._store is not None
        os.fsync(self.filter._store.fd)
        return os.fstat(self.filter._store.fd).st_blocks * 512

    def __enter__(self) -> Cow:
        return self

    def __exit__(self, *_: object) -> None:
        assert not self.chain.unload()


# -- against a model -------------------------------------------------------------------------------

ranges = st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 17), st.integers(0, 3))
operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "trim", "read", "cache", "flush", "extents"]),
        ranges,
        st.sampled_from([0, Flag.FUA]),
        st.sampled_from([0, Flag.MAY_TRIM]),
        st.sampled_from([0, Flag.FAST_ZERO]),
    ),
    max_size=25,
)


def place(numbers: tuple[int, int, int], size: int, block: int) -> tuple[int, int]:
    """(count, offset) within the disk; often at the edges of blocks, where mistakes live."""
    offset, count, edges = numbers
    offset %= size + 1
    if edges & 1:
        offset -= offset % block
    if edges & 2:
        count = max(block, count - count % block)
    return min(count, size - offset), offset


def check_extents(layer: Layer, count: int, offset: int, model: bytearray) -> None:
    """They cover the start of the range without a gap, and what is called zero reads as zeros."""
    position = offset
    for extent in layer.extents(count, offset, 0):
        assert extent.offset == position
        position += extent.length
        if extent.type:
            assert extent.type == pynbdkit.HOLE | pynbdkit.ZERO
            assert not any(model[extent.offset : position])
    assert offset < position <= offset + count


@settings(max_examples=300, deadline=None)
@given(
    operations,
    st.sampled_from([4096, 16384, 65536]),
    st.integers(1, 300_000),
    st.booleans(),
    st.booleans(),
    st.sampled_from([2, 12]),
)
def test_like_a_bytearray(
    operations: list[Any], block: int, size: int, on_read: bool, on_cache: bool, region: int
) -> None:
    """Any operations, any size, any block size, also with regions of four blocks."""
    plugin = Base(size)
    model = bytearray(plugin.data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_overlay, "_REGION_BLOCKS_SHIFT", region)
        with Cow(plugin, cow_block_size=block, cow_on_read=on_read, cow_on_cache=on_cache) as cow:
            layer = cow.open()
            for number, (what, numbers, fua, may_trim, fast) in enumerate(operations):
                count, offset = place(numbers, size, block)
                if what == "write":
                    data = bytes([number % 255 + 1]) * count
                    layer.pwrite(memoryview(data), offset, fua)
                    model[offset : offset + count] = data
                elif what == "zero":
                    try:
                        layer.zero(count, offset, fua | may_trim | fast)
                    except OSError as error:
                        if error.errno != errno.EOPNOTSUPP or not fast:
                            raise
                    else:
                        model[offset : offset + count] = bytes(count)
                elif what == "trim":
                    layer.trim(count, offset, fua)
                    model[offset : offset + count] = bytes(count)
                elif what == "read":
                    assert bytes(layer.pread(count, offset, 0)) == model[offset : offset + count]
                elif what == "cache":
                    layer.cache(count, offset, 0)
                elif what == "flush":
                    layer.flush(0)
                elif count:
                    check_extents(layer, count, offset, model)
            assert bytes(layer.pread(size, 0, 0)) == model
            check_extents(layer, size, 0, model)
            layer.close()
            # The next client sees the same.
            assert bytes(cow.open().pread(size, 0, 0)) == model
    assert plugin.data == plugin.original


@pytest.mark.parametrize("peer_block", ["4096", "65536"])
def test_nbdkit_has_the_same_bytes_in_the_end(
    connect: Callable[..., Any],
    serve: Callable[..., support.ServerProcess],
    sockdir: Path,
    peer_block: str,
) -> None:
    """The same requests over the wire (its zeros are writes: it does not offer them)."""
    base = sockdir / "base"
    content = Base(1_000_000).original
    base.write_bytes(content)
    base.chmod(0o444)
    arguments = ("--filter=cow", "file", str(base), f"cow-block-size={peer_block}")
    (sockdir / "peer").mkdir()
    with support.ServerProcess(sockdir / "peer", arguments, [support.program("nbdkit")]) as peer:
        theirs, ours = connect(peer), connect(serve(*arguments))
        source = random.Random(2)
        for number in range(200):
            offset = source.randrange(1_000_000)
            count = min(source.choice([1, 512, 4096, 70_000]), 1_000_000 - offset)
            kind = source.randrange(3)
            for client in (theirs, ours):
                if kind == 0:
                    client.pwrite(bytes([number + 1]) * count, offset)
                elif kind == 1:
                    client.trim(count, offset)
                elif client is ours:
                    client.zero(count, offset)
                else:
                    client.pwrite(bytes(count), offset)
        assert ours.pread(1_000_000, 0) == theirs.pread(1_000_000, 0)
        theirs.shutdown()
    assert base.read_bytes() == content


# -- parallel requests -----------------------------------------------------------------------------


def test_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has sectors of its own in blocks that it shares with others, and blocks of its
    own between those; what it wrote last is what it reads, whatever the others do beside it."""
    monkeypatch.setattr(_overlay, "_REGION_BLOCKS_SHIFT", 2)
    count, blocks, sector = 6, 48, 512
    sectors = BLOCK // sector
    size = blocks * BLOCK - 100
    plugin = Base(size)
    plugin.hook = lambda count, offset: os.sched_yield()
    failures: list[BaseException] = []
    owned: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for block in range(blocks):
        if block % 3 == 2:
            start = block * BLOCK
            owned[block % count].append((min(BLOCK, size - start), start))
        else:
            for index in range(sectors):
                owned[index % count].append((sector, block * BLOCK + index * sector))
    start_line = threading.Barrier(count)

    def work(cow: Cow, number: int) -> None:
        try:
            layer = cow.open()
            source = random.Random(number)
            mine = [part for part in owned[number] if sum(part) <= size]
            model = {at: plugin.original[at : at + length] for length, at in mine}
            start_line.wait(30)
            for turn in range(400):
                length, at = source.choice(mine)
                kind = source.randrange(6)
                if kind <= 1:
                    data = bytes([turn % 255 + 1]) * length
                    layer.pwrite(memoryview(data), at, 0)
                    model[at] = data
                elif kind == 2:
                    layer.zero(length, at, source.choice([0, Flag.MAY_TRIM]))
                    model[at] = bytes(length)
                elif kind == 3:
                    layer.trim(length, at, 0)
                    model[at] = bytes(length)
                elif kind == 4:
                    layer.cache(min(20_000, size - at), at, 0)
                else:
                    begin = max(0, at - source.randrange(9000))
                    end = min(size, at + length + source.randrange(9000))
                    data = bytes(layer.pread(end - begin, begin, 0))
                    for own, content in model.items():
                        if begin <= own and own + len(content) <= end:
                            assert data[own - begin : own - begin + len(content)] == content
            for at, content in model.items():
                assert bytes(layer.pread(len(content), at, 0)) == content
            layer.close()
        except BaseException as failure:
            failures.append(failure)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for on_read in (False, True):
            with Cow(plugin, cow_on_cache=True, cow_on_read=on_read) as cow:
                threads = [threading.Thread(target=work, args=(cow, n)) for n in range(count)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert not failures, failures
    finally:
        sys.setswitchinterval(interval)
    assert plugin.data == plugin.original


class Paused:
    """The first read of the disk below stops in the middle until `go`."""

    def __init__(self, plugin: Base) -> None:
        self.reached = threading.Event()
        self._go = threading.Event()
        self._threads: list[threading.Thread] = []
        plugin.hook = self._stop

    def _stop(self, count: int, offset: int) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self._go.wait(30)

    def start(self, call: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=call, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def go(self) -> None:
        """Let it go on, and wait until all that was started has ended."""
        self._go.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def paused() -> Iterator[tuple[Base, Layer, Paused]]:
    plugin = Base(16 * BLOCK)
    with Cow(plugin, cow_on_cache=True) as cow:
        yield plugin, cow.open(), Paused(plugin)


def wait_until_held(layer: Layer, count: int) -> None:
    """Until `count` requests change blocks or wait to."""
    overlay = layer.device._overlay  # type: ignore[attr-defined]
    while len(overlay._held) < count:
        os.sched_yield()


def test_two_writes_to_one_block_both_stay(paused: tuple[Base, Layer, Paused]) -> None:
    plugin, layer, pause = paused
    pause.start(lambda: layer.pwrite(memoryview(b"a" * 512), 0, 0))
    pause.reached.wait(30)  # the first has read the rest of the block and not written yet
    pause.start(lambda: layer.pwrite(memoryview(b"b" * 512), 1024, 0))
    wait_until_held(layer, 2)
    pause.go()
    expected = bytearray(plugin.original[:BLOCK])
    expected[:512], expected[1024:1536] = b"a" * 512, b"b" * 512
    assert bytes(layer.pread(BLOCK, 0, 0)) == expected


def test_a_write_of_the_block_is_not_covered_by_an_older_one(
    paused: tuple[Base, Layer, Paused],
) -> None:
    _, layer, pause = paused
    pause.start(lambda: layer.pwrite(memoryview(b"a" * 512), 0, 0))
    pause.reached.wait(30)
    pause.start(lambda: layer.pwrite(memoryview(b"b" * BLOCK), 0, 0))
    wait_until_held(layer, 2)
    pause.go()
    data = bytes(layer.pread(BLOCK, 0, 0))
    assert data[512:] == b"b" * (BLOCK - 512)
    assert data[:512] in (b"a" * 512, b"b" * 512)


@pytest.mark.parametrize("how", ["write", "cache"])
def test_a_trim_is_not_undone_by_what_was_read_before(
    paused: tuple[Base, Layer, Paused], how: str
) -> None:
    _, layer, pause = paused
    if how == "write":
        pause.start(lambda: layer.pwrite(memoryview(b"a" * 512), 0, 0))
    else:
        pause.start(lambda: layer.cache(BLOCK, 0, 0))
    pause.reached.wait(30)
    pause.start(lambda: layer.trim(BLOCK, 0, 0))
    wait_until_held(layer, 2)
    pause.go()
    data = bytes(layer.pread(BLOCK, 0, 0))
    assert data[512:] == bytes(BLOCK - 512)
    assert data[:512] in (bytes(512), b"a" * 512)


def test_other_blocks_do_not_wait(paused: tuple[Base, Layer, Paused]) -> None:
    """A slow disk below holds up the requests for that block alone."""
    plugin, layer, pause = paused
    pause.start(lambda: layer.pwrite(memoryview(b"a" * 512), 0, 0))
    pause.reached.wait(30)
    layer.pwrite(memoryview(b"b" * 512), BLOCK, 0)
    layer.trim(BLOCK, 2 * BLOCK, 0)
    assert bytes(layer.pread(512, BLOCK, 0)) == b"b" * 512
    # A read waits for nobody, not even in the same block.
    assert bytes(layer.pread(BLOCK, 0, 0)) == plugin.original[:BLOCK]
    pause.go()
    assert bytes(layer.pread(512, 0, 0)) == b"a" * 512


def test_a_write_to_a_block_in_the_overlay_waits_for_nobody() -> None:
    """It changes no block's state and touches the client's own bytes alone."""
    with Cow(Base(16 * BLOCK)) as cow:
        layer = cow.open()
        layer.pwrite(memoryview(b"x" * 2 * BLOCK), 0, 0)
        overlay = layer.device._overlay  # type: ignore[attr-defined]
        hold = overlay.hold(0, 15)
        layer.pwrite(memoryview(b"y" * BLOCK), 100, 0)
        overlay.release(hold)
        assert bytes(layer.pread(2 * BLOCK, 0, 0)) == b"x" * 100 + b"y" * BLOCK + b"x" * (
            BLOCK - 100
        )


# -- what a client is told -------------------------------------------------------------------------


def offers(server: Any) -> dict[str, Any]:
    shown = json.loads(support.run("nbdinfo", "--json", server.uri).stdout)["exports"][0]
    del shown["uri"]
    assert isinstance(shown, dict)
    return shown


@pytest.mark.parametrize("readonly", [(), ("-r",)])
@pytest.mark.parametrize("plugin", ["memory", "pattern"])
def test_offers_as_nbdkit(
    serve: Callable[..., support.ServerProcess],
    sockdir: Path,
    readonly: tuple[str, ...],
    plugin: str,
) -> None:
    """Over a disk that can be written and one that cannot; and zeros, which nbdkit does not."""
    arguments = (*readonly, "--filter=cow", plugin, "1M")
    ours = offers(serve(*arguments))
    (sockdir / "peer").mkdir()
    with support.ServerProcess(sockdir / "peer", arguments, [support.program("nbdkit")]) as peer:
        theirs = offers(peer)
    zeros = {"can_zero": not readonly, "can_fast_zero": not readonly}
    assert ours == theirs | zeros
    assert ours["is_read_only"] == bool(readonly)
    assert ours["can_multi_conn"]
    assert ours["block_size_preferred"] == 65536


def test_block_sizes_of_the_layer_below_stay() -> None:
    class Picky(Untouched):
        def block_size(self) -> tuple[int, int, int]:
            return 512, 8192, 8192

    plugin = Base(1 << 20, Picky)
    with Cow(plugin, cow_block_size=65536, cow_on_cache=True) as cow:
        layer = cow.open()
        assert layer.block_size() == (512, 8192, 8192)
        layer.pwrite(memoryview(b"x" * 512), 65536, 0)
        layer.cache(200_000, 200_000, 0)
        assert max(event[1] for event in plugin.take() if event[0] == "pread") <= 8192
        assert bytes(layer.pread(65536, 65536 + 512, 0)) == plugin.original[66048:131584]


def test_a_disk_with_nothing_but_reads() -> None:
    """No extents, no cache, no flush below: each is there."""
    plugin = Base(16 * BLOCK, WriteOnly)
    with Cow(plugin) as cow:
        layer = cow.open()
        layer.pwrite(memoryview(b"x"), 5, Flag.FUA)
        layer.trim(BLOCK, 2 * BLOCK, 0)
        layer.flush(0)
        layer.cache(16 * BLOCK, 0, 0)
        assert [tuple(extent) for extent in layer.extents(16 * BLOCK, 0, 0)] == [
            (0, 2 * BLOCK, 0),
            (2 * BLOCK, BLOCK, 3),
            (3 * BLOCK, 13 * BLOCK, 0),
        ]
    assert not [event for event in plugin.take() if event[0] in WRITES]


def test_extents_of_each_state(connect: Callable[..., Any]) -> None:
    """Written: data, also over a hole. Trimmed: a hole. Else: what the layer below says."""
    plugin = Base(8 * BLOCK)
    with pynbdkit.serve(plugin, filters=[CowFilter(cow_block_size=BLOCK)]) as server:
        client = connect(server)

        def extents(count: int, offset: int, flags: int = 0) -> list[int]:
            found: list[int] = []
            client.block_status(
                count, offset, lambda context, at, entries, error: found.extend(entries), flags
            )
            return found

        assert extents(8 * BLOCK, 0) == [BLOCK, 0, BLOCK, 3] * 4
        client.pwrite(b"x", BLOCK)  # over a hole
        client.trim(BLOCK, 4 * BLOCK)  # over data
        client.zero(BLOCK, 7 * BLOCK, 2)  # over a hole, to be allocated (NO_HOLE)
        assert extents(8 * BLOCK, 0) == [3 * BLOCK, 0, 3 * BLOCK, 3, 2 * BLOCK, 0]
        assert extents(5 * BLOCK, 2 * BLOCK, 8) == [BLOCK, 0]  # REQ_ONE
        assert client.pread(3 * BLOCK, 3 * BLOCK) == bytes(3 * BLOCK)


# -- zeros, trim and space -------------------------------------------------------------------------


def test_trim_gives_space_back_and_no_hole_takes_it() -> None:
    size = 4 << 20
    with Cow(Base(size), cow_block_size=65536) as cow:
        assert cow.filter._store is not None
        try:
            fallocate(cow.filter._store.fd, PUNCH_HOLE | KEEP_SIZE, 0, 4096)
        except OSError as error:
            pytest.skip(f"set TMPDIR to a filesystem that can punch holes: {error}")
        layer = cow.open()
        layer.pwrite(memoryview(b"x" * size), 0, 0)
        assert cow.taken >= size
        layer.trim(size, 0, 0)
        assert cow.taken < size // 10
        layer.zero(size, 0, 0)
        assert cow.taken >= size
        assert bytes(layer.pread(size, 0, 0)) == bytes(size)
        layer.zero(size, 0, Flag.MAY_TRIM)
        assert cow.taken < size // 10
        layer.pwrite(memoryview(b"x" * 65536), 0, 0)
        layer.trim(32768, 16384, 0)  # a part of a block
        assert 32768 <= cow.taken < 65536
        expected = b"x" * 16384 + bytes(32768) + b"x" * 16384
        assert bytes(layer.pread(65536, 0, 0)) == expected


def test_trim_of_what_was_never_written_takes_no_space() -> None:
    """The last block is a whole one where the disk ends in it."""
    size = (4 << 20) - 100
    with Cow(Base(size), cow_block_size=65536) as cow:
        layer = cow.open()
        layer.trim(size, 0, 0)
        layer.trim(100, 50, 0)
        assert cow.taken == 0
        assert bytes(layer.pread(size, 0, 0)) == bytes(size)
        assert [tuple(extent) for extent in layer.extents(size, 0, 0)] == [(0, size, 3)]


@pytest.mark.parametrize("has_zero_range", [True, False])
def test_fast_zero_is_fast_or_refused(
    monkeypatch: pytest.MonkeyPatch, has_zero_range: bool
) -> None:
    """Where it is refused, nothing has changed."""
    plugin = Base(16 * BLOCK)
    model = bytearray(plugin.original)
    if not has_zero_range:

        def refuse(fd: int, mode: int, offset: int, count: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "no such mode")

        monkeypatch.setattr(_overlay, "fallocate", refuse)
    with Cow(plugin) as cow:
        layer = cow.open()
        layer.zero(4 * BLOCK, 100, Flag.FAST_ZERO | Flag.MAY_TRIM)
        model[100 : 100 + 4 * BLOCK] = bytes(4 * BLOCK)
        for count, offset in ((BLOCK - 1, 8 * BLOCK), (BLOCK, 8 * BLOCK + 1)):  # no whole block
            with pytest.raises(OSError, match="no whole block") as caught:
                layer.zero(count, offset, Flag.FAST_ZERO | Flag.MAY_TRIM)
            assert caught.value.errno == errno.EOPNOTSUPP
        if has_zero_range:
            layer.zero(2 * BLOCK, 10 * BLOCK, Flag.FAST_ZERO)
            model[10 * BLOCK : 12 * BLOCK] = bytes(2 * BLOCK)
        else:
            with pytest.raises(OSError, match="no fast zero") as caught:
                layer.zero(2 * BLOCK + 9, 10 * BLOCK - 5, Flag.FAST_ZERO)
            assert caught.value.errno == errno.EOPNOTSUPP
        assert bytes(layer.pread(16 * BLOCK, 0, 0)) == model
        layer.zero(3 * BLOCK, 12 * BLOCK, 0)
        model[12 * BLOCK : 15 * BLOCK] = bytes(3 * BLOCK)
        assert bytes(layer.pread(16 * BLOCK, 0, 0)) == model


# -- durability and errors -------------------------------------------------------------------------


def test_fua_and_flush_reach_the_overlays_disk(
    monkeypatch: pytest.MonkeyPatch, connect: Callable[..., Any], nbd: Any
) -> None:
    """A write with FUA is one stable write; flush, and zero or trim with FUA, sync the file."""
    calls: list[tuple[str, int]] = []
    real_pwritev, real_sync = os.pwritev, os.fdatasync

    def pwritev(fd: int, parts: Any, position: int, flags: int = 0) -> int:
        calls.append(("pwritev", flags))
        return real_pwritev(fd, parts, position, flags)

    def fdatasync(fd: int) -> None:
        calls.append(("fdatasync", 0))
        real_sync(fd)

    with pynbdkit.serve(Base(16 * BLOCK), filters=[CowFilter(cow_block_size=BLOCK)]) as server:
        client = connect(server)
        monkeypatch.setattr(os, "pwritev", pwritev)
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        client.pwrite(b"x" * 512, 0, nbd.CMD_FLAG_FUA)
        client.pwrite(b"y" * 512, 0, nbd.CMD_FLAG_FUA)
        assert calls == [("pwritev", os.RWF_DSYNC)] * 2
        calls.clear()
        client.pwrite(b"z" * 512, BLOCK)
        assert calls == [("pwritev", 0)]
        for call in (
            client.flush,
            lambda: client.trim(BLOCK, 0, nbd.CMD_FLAG_FUA),
            lambda: client.zero(BLOCK, BLOCK, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE),
        ):
            calls.clear()
            call()
            assert calls[-1] == ("fdatasync", 0)


def test_a_failed_flush_is_the_clients_error_for_good(
    monkeypatch: pytest.MonkeyPatch, connect: Callable[..., Any], nbd: Any
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "bad disk")

    with pynbdkit.serve(Base(16 * BLOCK), filters=[CowFilter()]) as server:
        client = connect(server)
        client.pwrite(b"x" * 512, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(nbd.Error, match="EIO"):
                client.flush()
        with pytest.raises(nbd.Error, match="EIO"):
            client.flush()
        with pytest.raises(nbd.Error, match="EIO"):
            connect(server).flush()
        assert client.pread(512, 0) == b"x" * 512


def test_no_space_left_is_that_requests_error(
    connect: Callable[..., Any], sockdir: Path, nbd: Any
) -> None:
    """Over the wire, with a file that cannot grow: ENOSPC, nothing else is lost, all goes on."""
    command = [support.program("prlimit"), f"--fsize={8 * 65536}"]
    command += [sys.executable, "-m", "pynbdkit"]
    with support.ServerProcess(sockdir, ["--filter=cow", "memory", "2M"], command) as server:
        client = connect(server)
        client.pwrite(b"a" * 4096, 4096)
        client.trim(65536, 20 * 65536)
        for call, what, offset, flags in (
            (client.pwrite, b"b" * 4096, 8 * 65536, 0),
            (client.pwrite, b"b" * 4096, 20 * 65536 + 4096, 0),
            (client.pwrite, b"b" * 2 * 65536, 7 * 65536 + 4096, nbd.CMD_FLAG_FUA),
            (client.zero, 65536, 9 * 65536, nbd.CMD_FLAG_NO_HOLE),
        ):
            with pytest.raises(nbd.Error, match="ENOSPC"):
                call(what, offset, flags)
        expected = bytearray(2 << 20)
        expected[4096:8192] = b"a" * 4096
        assert client.pread(2 << 20, 0) == expected
        client.pwrite(b"c" * 4096, 7 * 65536)
        expected[7 * 65536 : 7 * 65536 + 4096] = b"c" * 4096
        client.flush()
        assert client.pread(2 << 20, 0) == expected
        client.shutdown()


def test_an_error_below_is_that_requests_error() -> None:
    """A block that cannot be brought along stays as it was."""
    plugin = Base(16 * BLOCK)

    def fail(count: int, offset: int) -> None:
        if offset < BLOCK:
            raise OSError(errno.EIO, "bad sector")

    plugin.hook = fail
    with Cow(plugin, cow_on_read=True) as cow:
        layer = cow.open()
        for call in (
            lambda: layer.pwrite(memoryview(b"x" * 512), 512, 0),
            lambda: layer.zero(512, 512, 0),
            lambda: layer.pread(512, 0, 0),
        ):
            with pytest.raises(OSError, match="bad sector"):
                call()
        layer.pwrite(memoryview(b"x" * BLOCK), 0, 0)  # a whole block needs nothing from below
        assert bytes(layer.pread(BLOCK, 0, 0)) == b"x" * BLOCK


# -- keeping what was read -------------------------------------------------------------------------


def test_cow_on_read(tmp_path: Path) -> None:
    """With true; with a path, while that exists."""
    plugin = Base(64 * BLOCK)
    switch = tmp_path / "switch"
    for value in ("true", str(switch)):
        filter = CowFilter()
        filter.config("cow-on-read", value)
        with Cow(plugin, cow_on_read=filter.cow_on_read) as cow:
            layer = cow.open()
            if value != "true":
                layer.pread(512, 100, 0)
                assert plugin.take() == [("pread", 512, 100, 0)]
                assert cow.taken == 0
                switch.touch()
            assert bytes(layer.pread(512, 100, 0)) == plugin.original[100:612]
            assert plugin.take() == [("pread", BLOCK, 0, 0)]
            assert bytes(layer.pread(BLOCK, 0, 0)) == plugin.original[:BLOCK]
            assert plugin.take() == []
            if value != "true":
                switch.unlink()
                layer.pread(512, 2 * BLOCK, 0)
                layer.pread(512, 2 * BLOCK, 0)
                assert len(plugin.take()) == 2


def test_a_read_that_cannot_be_kept_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, buf: Any, position: int) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    plugin = Base(16 * BLOCK)
    with Cow(plugin, cow_on_read=True, cow_on_cache=True) as cow:
        layer = cow.open()
        monkeypatch.setattr(os, "pwrite", full)
        assert bytes(layer.pread(5000, 100, 0)) == plugin.original[100:5100]
        with pytest.raises(OSError, match="no space left"):
            layer.cache(5000, 100, 0)


def test_cow_on_cache() -> None:
    plugin = Base(16 * BLOCK)
    for keeps in (False, True):
        with Cow(plugin, cow_on_cache=keeps) as cow:
            layer = cow.open()
            layer.pwrite(memoryview(b"x" * BLOCK), BLOCK, 0)
            layer.trim(BLOCK, 2 * BLOCK, 0)
            plugin.take()
            layer.cache(4 * BLOCK, 100, 0)
            if not keeps:
                assert plugin.take() == [
                    ("cache", BLOCK - 100, 100, 0),
                    ("cache", BLOCK + 100, 3 * BLOCK, 0),
                ]
                continue
            assert plugin.take() == [("pread", BLOCK, 0, 0), ("pread", 2 * BLOCK, 3 * BLOCK, 0)]
            layer.pread(5 * BLOCK, 0, 0)
            assert plugin.take() == []


def test_blocks_larger_than_a_piece() -> None:
    """They are brought along in bounded pieces."""
    plugin = Base(9_000_000)
    model = bytearray(plugin.original)
    with Cow(plugin, cow_block_size=4 << 20) as cow:
        layer = cow.open()
        layer.pwrite(memoryview(b"x" * 100), 6_000_000, 0)
        model[6_000_000:6_000_100] = b"x" * 100
        assert max(event[1] for event in plugin.take()) <= 1 << 20
        layer.zero(3_000_000, 1000, 0)
        model[1000:3_001_000] = bytes(3_000_000)
        layer.pwrite(memoryview(b"y" * 700_000), 8_300_000, 0)
        model[8_300_000:] = b"y" * 700_000
        layer.trim(4 << 20, 0, 0)
        model[: 4 << 20] = bytes(4 << 20)
        layer.pwrite(memoryview(b"z"), 2 << 20, 0)
        model[2 << 20] = ord("z")
        assert bytes(layer.pread(9_000_000, 0, 0)) == model


# -- who shares what -------------------------------------------------------------------------------


class Named(Recording):
    """A disk per export name."""

    def open(self, session: Session) -> Device:
        letter = session.export_name.encode() or b"d"
        return Untouched(bytearray(letter[:1] * (1 << 17)), self.events)

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        return "d"


def test_connections_share_an_export_and_exports_share_nothing(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(Named(), filters=["cow"]) as server:
        first, other = connect(server.export_uri("a")), connect(server.export_uri("b"))
        first.pwrite(b"x" * 512, 1024)
        assert connect(server.export_uri("a")).pread(1024, 1024) == b"x" * 512 + b"a" * 512
        assert other.pread(65536, 0) == b"b" * 65536
        # "" is the default export under another name.
        connect(server.export_uri("")).pwrite(b"y", 0)
        assert connect(server.export_uri("d")).pread(2, 0) == b"yd"


def test_what_was_written_outlives_its_clients_and_nothing_else_does() -> None:
    """A client that asks for many names and writes to none leaves nothing behind."""
    with Cow(Named()) as cow:
        for number in range(100):
            layer = cow.open(f"name{number}")
            layer.pread(512, 0, 0)
            layer.close()
        assert not cow.filter._overlays
        layer = cow.open("a")
        layer.pwrite(memoryview(b"x"), 0, 0)
        layer.close()
        assert bytes(cow.open("a").pread(2, 0, 0)) == b"xa"


def test_a_disk_that_was_resized_is_refused() -> None:
    """… once something lies over it."""
    plugin = Recording(1 << 20)
    with Cow(plugin) as cow:
        cow.open().close()
        plugin.data.extend(bytes(100))
        layer = cow.open()
        assert layer.get_size() == (1 << 20) + 100
        layer.pwrite(memoryview(b"x"), 0, 0)
        layer.close()
        plugin.data.extend(bytes(100))
        plugin.take()
        with pytest.raises(OpenError, match="had 1048676 bytes, now it has 1048776"):
            cow.open()
        assert plugin.take() == [("close",)]


def test_a_disk_of_nearly_8_eib(connect: Callable[..., Any]) -> None:
    """Both ends and the middle, though no file is that large; memory and space stay small."""
    size = (1 << 63) - 1
    plugin = pynbdkit.load_plugin("memory", size=str(size))
    filter = CowFilter()
    with pynbdkit.serve(plugin, filters=[filter]) as server:
        client = connect(server)
        assert client.get_size() == size
        for offset in (0, 1 << 62, size - 1000):
            client.pwrite(b"x" * 1000, offset)
        client.trim(1 << 31, 1 << 60)
        for offset in (0, 1 << 62, size - 1000):
            assert client.pread(1000, offset) == b"x" * 1000
        assert client.pread(4096, size - 4096) == bytes(3096) + b"x" * 1000
        assert client.pread(4096, 1 << 60) == bytes(4096)
        found: list[int] = []
        client.block_status(
            1 << 20, 1 << 62, lambda context, at, entries, error: found.extend(entries)
        )
        assert found == [65536, 0, (1 << 20) - 65536, 3]
        (overlay,) = filter._overlays.values()
        assert sum(len(region.states) for region in overlay.map.regions.values()) <= 11 * 1024
        assert filter._store is not None
        assert os.fstat(filter._store.fd).st_size < 1 << 30


# -- start and end ---------------------------------------------------------------------------------


class Vast(Device):
    """A disk of 4 EiB of zeros."""

    def get_size(self) -> int:
        return 1 << 62

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return bytes(count)


class VastPlugin(pynbdkit.Plugin):
    name = "vast"

    def open(self, session: Session) -> Device:
        return Vast()


def test_requests_of_64_bits_take_no_longer_than_their_client_waits() -> None:
    """An answer to extents looks at a bounded range; what goes on for ever can be ended."""
    chain = Chain(VastPlugin(), [CowFilter()])
    chain.load()
    chain.complete()
    chain.get_ready()
    asked: list[float] = []

    def gone(seconds: float) -> bool:
        asked.append(seconds)
        return len(asked) > 2

    layer = chain.open(Session(stopping=gone))
    assert layer.extents(1 << 62, 0, 0) == [(0, 1 << 42, 0)]
    assert asked == []
    for operation in (layer.zero, layer.trim):
        asked.clear()
        with pytest.raises(OSError, match="gone") as failure:
            operation(1 << 62, 0, Flag.MAY_TRIM if operation is layer.zero else 0)
        assert failure.value.errno == errno.ESHUTDOWN
        assert len(asked) == 3
    asked.clear()
    layer.zero(1 << 20, 0, Flag.MAY_TRIM)
    assert asked == []  # what ends at once is not asked about
    layer.close()
    chain.cleanup()


def test_the_overlay_is_a_file_without_a_name_in_tmpdir(
    serve: Callable[..., support.ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server = serve("--filter=cow", "memory", "1M")
    assert not list(tmp_path.iterdir())
    links = support.open_files(server.process.pid)
    assert [link for link in links if link.startswith(str(tmp_path)) and "(deleted)" in link]


def test_no_folder_for_the_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    done = support.pynbdkit("-U", "-", "--filter=cow", "memory", "1M", "--run", "true")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "cannot make a temporary file in /nonexistent: No such file" in done.stderr


@pytest.mark.parametrize("size", ["3000", "2048", "5000", "0", "4G"])
def test_bad_block_sizes(size: str) -> None:
    filter = CowFilter()
    filter.config("cow-block-size", size)
    with pytest.raises(ConfigError, match=r"cow-block-size must be a power of 2 from 4K to 2G"):
        filter.config_complete()


@pytest.mark.parametrize(
    ("key", "value"), [("cow-on-read", "maybe"), ("cow-on-read", "x/y"), ("cow-on-cache", "/x")]
)
def test_bad_parameters(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: could not decipher boolean"):
        CowFilter().config(key, value)


def test_defaults() -> None:
    filter = CowFilter()
    assert (filter.cow_block_size, filter.cow_on_cache, filter.cow_on_read) == (65536, False, False)


def test_a_copy_in_and_out_is_the_same(
    serve: Callable[..., support.ServerProcess], tmp_path: Path
) -> None:
    """nbdcopy with its many connections; the disk below is as it was."""
    size = 20_000_000
    base, image, back = tmp_path / "base", tmp_path / "image", tmp_path / "back"
    base.write_bytes(random.Random(3).randbytes(size))
    before = base.read_bytes()
    content = bytearray(size)
    source = random.Random(4)
    for _ in range(30):
        offset = source.randrange(size - 300_000)
        content[offset : offset + 300_000] = source.randbytes(300_000)
    image.write_bytes(content)
    server = serve("--filter=cow", "file", base)
    support.run("nbdcopy", "--flush", image, server.uri)
    support.run("nbdcopy", server.uri, back)
    assert back.read_bytes() == content
    assert base.read_bytes() == before
