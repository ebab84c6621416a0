"""The full plugin: reads zeros; whatever needs space fails with ENOSPC."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit.plugins.full import FullPlugin

SIZE = 4 << 20


def test_reads_zeros(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(FullPlugin(size=SIZE)) as server:
        client = connect(server)
        assert client.pread(SIZE, 0) == bytes(SIZE)
        found: list[list[int]] = []
        client.block_status(SIZE, 0, lambda context, offset, entries, error: found.append(entries))
        assert found == [[SIZE, 3]]


def test_has_no_space(nbd: ModuleType, connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(FullPlugin(size=SIZE)) as server:
        client = connect(server)
        requests: list[Callable[[], Any]] = [
            lambda: client.pwrite(b"x", 0),
            lambda: client.pwrite(bytes(4096), 4096),
            lambda: client.trim(4096, 0),
            lambda: client.zero(4096, 0),
            lambda: client.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE),
        ]
        for request in requests:
            with pytest.raises(nbd.Error) as caught:
                request()
            assert caught.value.errno == "ENOSPC"
        assert client.pread(512, 0) == bytes(512)


def test_size_is_required() -> None:
    done = support.pynbdkit("full")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "size" in done.stderr


def test_same_flags_as_peer(serve: Callable[..., support.ServerProcess]) -> None:
    ours = support.run("nbdinfo", "--json", serve("full", "1M").uri)
    theirs = support.run("nbdkit", "-U", "-", "full", "1M", "--run", 'nbdinfo --json "$uri"')

    def flags(text: str) -> dict[str, object]:
        export = json.loads(text)["exports"][0]
        # The peer offers fast zeros that always fail; we do not (there is no zero to be fast).
        return {k: v for k, v in export.items() if k not in ("uri", "can_fast_zero")}

    assert flags(ours.stdout) == flags(theirs.stdout)
