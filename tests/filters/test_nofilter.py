"""The nofilter filter: nothing changes, and nothing is in the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import support
from pynbdkit import Session
from pynbdkit.chain import Chain
from pynbdkit.filters.nofilter import NoFilter
from recording import Recording, RecordingDisk, WriteOnly

OPERATIONS = ("pread", "unchecked_pread", "pwrite", "flush", "trim", "zero", "cache", "extents")


class NativeFua(RecordingDisk):
    def can_fua(self) -> int:
        return 2


class NoFua(RecordingDisk):
    def can_fua(self) -> int:
        return 0


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("kind", [RecordingDisk, NativeFua, NoFua, WriteOnly])
def test_operations_are_those_of_the_layer_below(kind: type[RecordingDisk], readonly: bool) -> None:
    """However many are stacked: the very same objects."""
    layer = Chain(Recording(kind=kind), [NoFilter(), NoFilter()]).open(Session(readonly=readonly))
    assert layer.next is not None
    plugin = layer.next.next
    assert plugin is not None
    for name in OPERATIONS:
        assert getattr(layer, name) == getattr(plugin, name), name


@pytest.mark.parametrize("readonly", [(), ("-r",)])
def test_client_sees_the_same(
    serve: Callable[..., support.ServerProcess], readonly: tuple[str, ...]
) -> None:
    """Everything that nbdinfo shows but the address."""

    def info(*arguments: str) -> Any:
        server = serve(*readonly, *arguments)
        shown = json.loads(support.run("nbdinfo", "--json", server.uri).stdout)
        del shown["exports"][0]["uri"]
        return shown

    assert info("--filter=nofilter", "memory", "1M") == info("memory", "1M")
