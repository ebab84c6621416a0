"""Our client and libnbd on our server: both sides of the same protocol code meet a real socket."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import pynbdkit
from pynbdkit.cli import pynbd
from pynbdkit.client import Client, connect
from pynbdkit.protocol import constants as nbd
from support import next_peer, run

Connect = Callable[..., Any]


@pytest.fixture
def memory() -> Iterator[pynbdkit.RunningServer]:
    with pynbdkit.serve(pynbdkit.load_plugin("memory", size="1M")) as server:
        yield server


@pytest.mark.parametrize("structured", [True, False])
def test_every_command(memory: pynbdkit.RunningServer, structured: bool) -> None:
    with connect(memory.uri, structured_replies=structured) as client:
        assert client.size == 1024**2
        assert client.structured_replies is structured
        assert client.read(1024**2, 0) == bytes(1024**2)
        client.write(b"hello", 513)
        client.write(b"world", 1000, fua=True)
        assert client.read(492, 513) == b"hello" + bytes(482) + b"world"
        client.zero(5, 513)
        client.zero(5, 1000, fua=True, no_hole=True)
        assert client.read(1024**2, 0) == bytes(1024**2)
        client.write(b"x" * 65536, 65536)
        client.trim(65536, 65536, fua=True)
        assert client.read(65536, 65536) == bytes(65536)
        client.cache(4096, 0)
        client.flush()


@pytest.mark.parametrize("words", [[], ["--list"]])
def test_info_is_nbdinfos(
    memory: pynbdkit.RunningServer, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert pynbd.main(["info", memory.uri, *words]) == 0
    lines = run(next_peer("nbdinfo"), *words, memory.uri).stdout.splitlines(keepends=True)
    expected = "".join(line for line in lines if "content" not in line)
    assert capsys.readouterr().out == expected


def test_info_as_json_is_nbdinfos(
    memory: pynbdkit.RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pynbd.main(["info", "--json", memory.uri]) == 0
    mine = json.loads(capsys.readouterr().out)
    del mine["listing"]
    theirs = run(next_peer("nbdinfo"), "--json", "--no-content", memory.uri).stdout
    assert mine == json.loads(theirs)
    assert mine["extended"] is True


class Sparse(pynbdkit.Device):
    """Data in the second of four 64 KiB blocks; the rest is a hole."""

    def get_size(self) -> int:
        return 4 * 65536

    def pread(self, count: int, offset: int, flags: int = 0) -> bytes:
        content = bytes(65536) + b"x" * 65536 + bytes(2 * 65536)
        return content[offset : offset + count]

    def extents(self, count: int, offset: int, flags: int = 0) -> list[tuple[int, int, int]]:
        hole = pynbdkit.HOLE | pynbdkit.ZERO
        return [(0, 65536, hole), (65536, 65536, 0), (131072, 131072, hole)]


def test_block_status(connect: Connect) -> None:
    with pynbdkit.serve(Sparse) as server:
        client = connect(server)
        found: list[int] = []
        client.block_status(4 * 65536, 0, lambda _c, _o, entries, _e: found.extend(entries))
        assert found == [65536, 3, 65536, 0, 131072, 3]
        found.clear()
        client.block_status(
            131072, 32768, lambda _c, _o, entries, _e: found.extend(entries), nbd.CMD_FLAG_REQ_ONE
        )
        assert found == [32768, 3]


def test_zeros_are_sent_as_holes_in_one_chunk_also_with_df() -> None:
    def kinds(client: Client, offset: int, flags: int = 0) -> list[int | None]:
        return [r.kind for r in client._request(nbd.CMD_READ, offset, 65536, flags)]

    with pynbdkit.serve(Sparse) as server, connect(server.uri) as client:
        assert kinds(client, 0) == [nbd.REPLY_TYPE_OFFSET_HOLE]
        assert kinds(client, 65536) == [nbd.REPLY_TYPE_OFFSET_DATA]
        assert kinds(client, 32768) == [nbd.REPLY_TYPE_OFFSET_DATA]
        assert kinds(client, 0, nbd.CMD_FLAG_DF) == [nbd.REPLY_TYPE_OFFSET_HOLE]
        assert client.read(4 * 65536, 0) == bytes(65536) + b"x" * 65536 + bytes(131072)


ERRORS = {
    "EPERM": "EPERM",
    "EROFS": "EPERM",
    "EIO": "EIO",
    "ENOMEM": "ENOMEM",
    "EINVAL": "EINVAL",
    "ENOSPC": "ENOSPC",
    "EFBIG": "ENOSPC",
    "EDQUOT": "ENOSPC",
    "EOVERFLOW": "EOVERFLOW",
    "EOPNOTSUPP": "ENOTSUP",
    "ESHUTDOWN": "ESHUTDOWN",
    "ENOENT": "EIO",
}


@pytest.mark.parametrize("structured", [True, False])
def test_errors_of_a_device(structured: bool) -> None:
    names = list(ERRORS)

    class Failing(pynbdkit.Device):
        def get_size(self) -> int:
            return 1024**2

        def pread(self, count: int, offset: int, flags: int = 0) -> bytes:
            raise OSError(getattr(errno, names[offset]), f"sector {offset} is lost")

        def pwrite(self, buffer: Any, offset: int, flags: int = 0) -> None:
            raise OSError(getattr(errno, names[offset]), f"sector {offset} is lost")

    with (
        pynbdkit.serve(Failing) as server,
        connect(server.uri, structured_replies=structured) as client,
    ):
        for offset, name in enumerate(names):
            number = getattr(errno, ERRORS[name])
            text = f"sector {offset} is lost" if structured else os.strerror(number)
            for call in (lambda at: client.read(1, at), lambda at: client.write(b"x", at)):
                with pytest.raises(OSError, match=text) as caught:
                    call(offset)
                assert caught.value.errno == number
