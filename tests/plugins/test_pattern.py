"""The pattern plugin: every 8 bytes are their own offset, whatever is read from where."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pynbdkit
import support
from pynbdkit.plugins.pattern import BLOCK, PatternPlugin, pattern

LARGEST = (1 << 63) - 1


def expected(count: int, offset: int) -> bytes:
    """The definition, a word at a time."""
    first = offset & ~7
    words = range(first, offset + count + 8, 8)
    data = b"".join(struct.pack(">Q", word) for word in words)
    return data[offset - first : offset - first + count]


@given(
    offset=st.one_of(
        st.integers(0, LARGEST),
        st.builds(lambda block, near: max(0, block * BLOCK + near),
                  st.integers(0, LARGEST // BLOCK - 1), st.integers(-20, 20)),
    ),
    count=st.one_of(st.integers(0, 40), st.integers(0, 3 * BLOCK)),
)  # fmt: skip
def test_every_range(offset: int, count: int) -> None:
    count = min(count, LARGEST - offset)
    assert pattern(count, offset) == expected(count, offset)


def test_over_the_wire(nbd: ModuleType, connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(PatternPlugin(size=(1 << 20) + 5)) as server:
        client = connect(server)
        assert client.get_size() == (1 << 20) + 5
        assert client.is_read_only()
        assert client.pread((1 << 20) + 5, 0) == expected((1 << 20) + 5, 0)
        assert client.pread(13, 3) == expected(13, 3)


def test_end_of_the_largest_disk(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(PatternPlugin(size=LARGEST)) as server:
        assert connect(server).pread(21, LARGEST - 21) == expected(21, LARGEST - 21)


def test_size_is_required() -> None:
    done = support.pynbdkit("pattern")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "size" in done.stderr
    with pytest.raises(pynbdkit.ConfigError):
        PatternPlugin(size="-1")


def test_same_bytes_and_flags_as_peer(
    serve: Callable[..., support.ServerProcess], sockdir: Any
) -> None:
    ours = serve("pattern", "1000003")
    theirs = support.ServerProcess(sockdir, ["pattern", "1000003"], [support.program("nbdkit")])
    with theirs:
        answers = [
            json.loads(support.run("nbdinfo", "--json", server.uri).stdout)["exports"][0]
            for server in (ours, theirs)
        ]
        for answer in answers:
            del answer["uri"]
        assert answers[0] == answers[1]
        copies = []
        for index, server in enumerate((ours, theirs)):
            copy = sockdir / f"copy{index}"
            support.run("nbdcopy", server.uri, copy)
            copies.append(copy.read_bytes())
        assert copies[0] == copies[1]
        assert len(copies[0]) == 1000003
