"""The offset filter: a window on the disk, and nothing outside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pynbdkit
import support
from pynbdkit import ConfigError, Flag, OpenError, Session
from pynbdkit.chain import Chain
from pynbdkit.complete import Layer
from pynbdkit.filters.offset import OffsetFilter
from recording import Recording, RecordingDisk

SIZE = 64 << 10


def window(plugin: Recording, **parameters: object) -> Layer:
    chain = Chain(plugin, [OffsetFilter(**parameters)])
    chain.complete()
    return chain.open(Session())


@given(st.data())
def test_every_operation_is_shifted(data: st.DataObject) -> None:
    """With any window and any range in it: the same call below, `offset` further on."""
    start = data.draw(st.integers(0, SIZE))
    length = data.draw(st.none() | st.integers(0, SIZE - start))
    size = SIZE - start if length is None else length
    at = data.draw(st.integers(0, size))
    count = data.draw(st.integers(0, size - at))
    plugin = Recording(SIZE)
    layer = window(plugin, offset=start, range=length)
    assert layer.get_size() == size

    layer.pwrite(b"x" * count, at, Flag.FUA)
    assert bytes(layer.pread(count, at, 0)) == b"x" * count
    expected = bytearray(SIZE)
    expected[start + at : start + at + count] = b"x" * count
    assert plugin.data == expected
    layer.zero(count, at, Flag.MAY_TRIM)
    assert plugin.data == bytearray(SIZE)
    layer.trim(count, at, 0)
    layer.cache(count, at, 0)
    assert plugin.take() == [
        ("pwrite", count, start + at, 0),
        ("flush", 0),
        ("pread", count, start + at, 0),
        ("zero", count, start + at, Flag.MAY_TRIM),
        ("trim", count, start + at, 0),
        ("cache", count, start + at, 0),
    ]

    if count:
        below = list(RecordingDisk(plugin.data, []).extents(count, start + at, 0))
        found = layer.extents(count, at, 0)
        assert found[0].offset == at
        assert sum(extent.length for extent in found) == count
        for extent in found:
            assert any(
                o <= start + extent.offset < o + n and kind == extent.type for o, n, kind in below
            )


def test_a_window_at_0_costs_nothing() -> None:
    """Only the size differs: operations are bound to the layer below."""
    layer = window(Recording(SIZE), range=4096)
    assert layer.get_size() == 4096
    assert layer.next is not None
    for name in ("pread", "pwrite", "flush", "trim", "zero", "cache", "extents"):
        assert getattr(layer, name) == getattr(layer.next, name), name


@pytest.mark.parametrize("offset", [100, 4096])
def test_over_the_wire(nbd: Any, connect: Callable[..., Any], offset: int) -> None:
    plugin = Recording(SIZE)
    plugin.data[:] = bytes(range(256)) * (SIZE // 256)
    filter = OffsetFilter(offset=offset, range=8192)
    with pynbdkit.serve(plugin, filters=[filter]) as server:
        client = connect(server)
        assert client.get_size() == 8192
        assert client.pread(8192, 0) == plugin.data[offset : offset + 8192]
        extents: list[int] = []
        client.block_status(8192, 0, lambda context, at, entries, error: extents.extend(entries))
        if offset == 100:
            assert extents == [3996, 0, 4096, 3, 100, 0]
        else:
            assert extents == [4096, 3, 4096, 0]
        client.pwrite(b"end", 8189)
        assert plugin.data[offset + 8189 : offset + 8192] == b"end"
        client.set_strict_mode(0)
        with pytest.raises(nbd.Error, match="EINVAL"):
            client.pread(2, 8191)
        with pytest.raises(nbd.Error, match="ENOSPC"):
            client.pwrite(b"xy", 8191)


BEYOND = [
    (("offset=64K", "range=1"), r"offset\+range \(65536\+1\) is larger than the size \(65536\)"),
    (("offset=65537",), r"offset \(65537\) is larger than the size \(65536\)"),
    (("range=65K",), r"offset\+range \(0\+66560\) is larger than the size \(65536\)"),
]


@pytest.mark.parametrize(("words", "message"), BEYOND)
def test_beyond_the_end_is_refused_at_open(words: tuple[str, ...], message: str) -> None:
    filter = OffsetFilter()
    for word in words:
        assert filter.config(*word.split("="))
    with pytest.raises(OpenError, match=message):
        Chain(Recording(SIZE), [filter]).open(Session())


@pytest.mark.parametrize("words", [("offset=64K",), ("range=0",), ("offset=64K", "range=0")])
def test_an_empty_window_is_a_disk(words: tuple[str, ...]) -> None:
    filter = OffsetFilter()
    for word in words:
        assert filter.config(*word.split("="))
    assert Chain(Recording(SIZE), [filter]).open(Session()).get_size() == 0


@pytest.mark.parametrize("word", ["offset=-1", "range=-1", "offset=x", "range=8E"])
def test_bad_parameters(word: str) -> None:
    key, value = word.split("=")
    with pytest.raises(ConfigError, match=f"^{key}: could not parse size"):
        OffsetFilter().config(key, value)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (("offset=1000",), SIZE - 1000),
        (("offset=64K",), 0),
        (("range=0",), 0),
        (("offset=512", "range=65024"), 65024),
        *((words, None) for words, _ in BEYOND),
    ],
)
def test_nbdkit_agrees(
    nbd: Any,
    serve: Callable[..., support.ServerProcess],
    sockdir: Path,
    words: tuple[str, ...],
    size: int | None,
) -> None:
    """The same command line: the same size, or the same refusal of the client alone."""
    arguments = ("--filter=offset", "memory", str(SIZE), *words)
    (sockdir / "peer").mkdir()
    command = [support.program("nbdkit")]
    with support.ServerProcess(sockdir / "peer", arguments, command) as peer:
        for server in (peer, serve(*arguments)):
            client = nbd.NBD()
            if size is None:
                with pytest.raises(nbd.Error):
                    client.connect_uri(server.uri)
                assert "is larger than the" in server.log()
            else:
                client.connect_uri(server.uri)
                assert client.get_size() == size
                client.shutdown()
