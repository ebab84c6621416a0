"""The null plugin: everything succeeds, nothing is kept; flags as the peer's."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit.plugins.null import NullPlugin

SIZE = 8 << 20


def test_reads_zeros_and_forgets_writes(nbd: ModuleType, connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(NullPlugin(size=SIZE)) as server:
        client = connect(server)
        assert client.get_size() == SIZE
        client.pwrite(b"x" * 4096, 512, nbd.CMD_FLAG_FUA)
        client.flush()
        client.trim(4096, 0)
        client.zero(SIZE, 0, nbd.CMD_FLAG_FAST_ZERO)
        client.cache(SIZE, 0)
        for count in (1, 4096, 1 << 20, (1 << 20) + 1, SIZE):
            assert client.pread(count, 0) == bytes(count)


def test_is_one_hole(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(NullPlugin(size="1T")) as server:
        client = connect(server)
        found: list[list[int]] = []
        client.block_status(
            1 << 30, 4096, lambda context, offset, entries, error: found.append(entries)
        )
        assert found == [[1 << 30, 3]]


def test_size_is_optional(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(NullPlugin()) as server:
        assert connect(server).get_size() == 0


def test_largest_disk(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(NullPlugin(size=(1 << 63) - 1)) as server:
        assert connect(server).pread(512, (1 << 63) - 513) == bytes(512)


def test_wrong_parameters() -> None:
    with pytest.raises(pynbdkit.ConfigError, match="size"):
        NullPlugin(size="lots")
    done = support.pynbdkit("null", "1M", "colour=red")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "colour" in done.stderr


def test_same_flags_as_peer(serve: Callable[..., support.ServerProcess]) -> None:
    ours = support.run("nbdinfo", "--json", serve("null", "1M").uri)
    theirs = support.run("nbdkit", "-U", "-", "null", "1M", "--run", 'nbdinfo --json "$uri"')

    def flags(text: str) -> dict[str, object]:
        export = json.loads(text)["exports"][0]
        return {key: value for key, value in export.items() if key != "uri"}

    assert flags(ours.stdout) == flags(theirs.stdout)
