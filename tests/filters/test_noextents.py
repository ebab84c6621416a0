"""The noextents filter: everything looks allocated, and nobody below is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynbdkit
import support
from pynbdkit import Session
from pynbdkit.chain import Chain
from pynbdkit.filters.noextents import NoExtentsFilter
from recording import Recording

SIZE = 1 << 20


def extents(client: Any) -> list[int]:
    found: list[int] = []
    client.block_status(SIZE, 0, lambda context, offset, entries, error: found.extend(entries))
    return found


def test_one_extent_of_data(connect: Callable[..., Any]) -> None:
    plugin = Recording(SIZE)
    with pynbdkit.serve(plugin) as server:
        assert len(extents(connect(server))) > 2
    plugin.take()
    with pynbdkit.serve(plugin, filters=[NoExtentsFilter()]) as server:
        client = connect(server)
        assert client.can_meta_context("base:allocation")
        assert extents(client) == [SIZE, 0]
        assert not [event for event in plugin.take() if event[0] == "extents"]


def test_nbdkit_agrees(connect: Callable[..., Any], sockdir: Path) -> None:
    """A disk of holes is a disk of data there as well, and the context stays."""
    command = [support.program("nbdkit")]
    arguments = ["--filter=noextents", "memory", str(SIZE)]
    with support.ServerProcess(sockdir, arguments, command) as server:
        client = connect(server)
        assert client.can_meta_context("base:allocation")
        assert extents(client) == [SIZE, 0]
        client.shutdown()


def test_all_else_is_the_layer_below() -> None:
    layer = Chain(Recording(SIZE), [NoExtentsFilter()]).open(Session())
    assert layer.next is not None
    assert not layer.can_extents()
    for name in ("pread", "pwrite", "flush", "trim", "zero", "cache"):
        assert getattr(layer, name) == getattr(layer.next, name), name
