"""The data plugin over the wire, beside nbdkit's: parameters, disks of every kind, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pynbdkit
import support
from pynbdkit.plugins.data import DataPlugin
from pynbdkit.plugins.memory import MappedDisk
from pynbdkit.sparse import SparseArray

OURS = (sys.executable, "-m", "pynbdkit")


def served(command: tuple[str, ...], *arguments: str, folder: Path) -> tuple[int, bytes, str]:
    """What a server says and serves: exit status, the disk, messages."""
    done = subprocess.run(
        [*command, "-U", "-", "data", *arguments, "--run", 'nbdcopy -- "$uri" - | cat'],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, "FROM_ENV": "7 7"},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize(
    "arguments",
    [
        ("0 1 2 3 @0x1fe 0x55 0xaa",),
        ("data=0 1 2 3", "size=1k"),
        ("size=2", "1 2 3"),
        ("1 2 3", "size=0"),
        ("data=",),
        ("raw=Hello, world!",),
        ("raw=h\u00e9", "size=10"),
        ("base64=aGVsbG8gbmJka2l0IHVzZXI=", "size=1K"),
        ("base64=MT Iz\nMTIz",),
        ("base64=",),
        ("$pattern*16", "pattern=0x55 0xAA"),
        ("pattern=1 2", "$pattern $FROM_ENV"),
        ("$FROM_ENV", "FROM_ENV=1"),
        ("$twice", "twice=1", "twice=2"),
        ("<file @^512",),
        ("@1000000 1", "allocator=malloc"),
        ("1", "allocator=malloc,mlock=true"),
        ("1", "allocator=sparse"),
    ],
    ids=" ".join,
)
def test_same_disk_as_nbdkit(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    peer = served((support.program("nbdkit"),), *arguments, folder=tmp_path)
    assert peer[0] == 0, peer[2]
    assert served(OURS, *arguments, folder=tmp_path) == (0, peer[1], "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the disk is not specified: give data=DATA, raw=BYTES or base64=BASE64"),
        (("size=10",), "the disk is not specified"),
        (("1", "raw=2"), "data, raw or base64 must be given exactly once"),
        (("1", "data=2"), "data, raw or base64 must be given exactly once"),
        (("raw=1", "base64=MTIz"), "data, raw or base64 must be given exactly once"),
        (("base64=MTI",), "base64: cannot be decoded"),
        (("base64=MTIz!",), "base64: cannot be decoded"),
        (("base64=MR==",), "base64: cannot be decoded"),
        (("256",), "data: offset 0, at '256': a byte must be"),
        (("1 $x", "x=1 y"), "$x: offset 2, at 'y': no field begins"),
        (("1 <nofile",), "data: offset 2, at '<nofile': nofile: No such file or directory"),
        (("1", "size=-1"), "-1"),
        (("1", "size=8E"), "8E"),
        (("1", "allocator=other"), 'unknown allocator "other"'),
        (("@1000000000000000", "allocator=malloc"), "too large for allocator=malloc"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_as_in_nbdkit(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    peer = served((support.program("nbdkit"),), *arguments, folder=tmp_path)
    assert peer[0] == 1
    status, _, messages = served(OURS, *arguments, folder=tmp_path)
    assert status == 1
    assert message in messages
    assert messages.startswith("pynbdkit: error: ")
    assert messages.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("-r",)], ids=["writable", "read-only"])
def test_offers_what_nbdkit_offers(options: tuple[str, ...]) -> None:
    def offer(*command: str) -> dict[str, object]:
        run = [*command, *options, "-U", "-", "data", "1 @1000000"]
        done = support.run(*run, "--run", 'nbdinfo --json "$uri"')
        (export,) = json.loads(done.stdout)["exports"]
        return {key: value for key, value in export.items() if key not in ("uri", "content")}

    peer = offer("nbdkit")
    assert offer(*OURS) == peer
    assert peer["export-size"] == 1000000


def test_a_parameter_that_nothing_uses_is_told(tmp_path: Path) -> None:
    status, disk, messages = served(OURS, "1 $y", "y=2", "sise=1M", folder=tmp_path)
    assert (status, disk) == (0, b"\1\2")
    assert messages == "pynbdkit: warning: parameter 'sise' is not used: the data has no $sise\n"


def test_dump_plugin_says_what_nbdkit_says() -> None:
    peer = support.run("nbdkit", "data", "--dump-plugin").stdout.splitlines()
    ours = support.pynbdkit("data", "--dump-plugin").stdout.splitlines()
    for line in ("magic_config_key=data", "data_base64=yes", "mlock=yes", "thread_model=parallel"):
        assert line in peer
        assert line in ours


# Disks that are kept in different ways: the text, parameters, how it is kept.
DISKS = {
    "mapped": ("0x11*200000 @+200000 0x22*100000 @0x200000 1", {}, MappedDisk),
    "malloc": ("0x11*200000 @+200000 0x22*100000 @0x200000 1", {"allocator": "malloc"}, MappedDisk),
    "image": ("0x11*1000000000000 @200000 (@200000 0x22*100000)", {}, SparseArray),
    "repeated": ("(0x11*200000 @+200000 0x22*100000)*1000000000", {}, SparseArray),
    "huge": ("(0x11*200000 @+200000 0x22*100000)", {"size": "8191P"}, SparseArray),
}
START = b"\x11" * 200000 + bytes(200000) + b"\x22" * 100000


def plugin(name: str) -> DataPlugin:
    text, parameters, _ = DISKS[name]
    return DataPlugin(data=text, **parameters)


@pytest.mark.parametrize("name", DISKS)
def test_reads_writes_zeros_and_trims(
    name: str, nbd: ModuleType, connect: Callable[..., Any]
) -> None:
    disk = plugin(name)
    with pynbdkit.serve(disk) as server:
        assert type(disk._disk) is DISKS[name][2]
        one, other = connect(server), connect(server)
        assert one.can_multi_conn()
        model = bytearray(START)
        assert one.pread(len(START), 0) == model
        for offset, count in ((0, 1), (199999, 3), (65536, 65536), (131071, 40000), (399000, 2000)):
            content = bytes((offset + index) % 255 + 1 for index in range(count))
            one.pwrite(content, offset, nbd.CMD_FLAG_FUA)
            model[offset : offset + count] = content
            assert other.pread(len(START), 0) == model
        for offset, count in ((5, 10), (60000, 100000), (32768, 32768), (380000, 100000)):
            flags = nbd.CMD_FLAG_FUA | (nbd.CMD_FLAG_FAST_ZERO if count % 3 else 0)
            one.zero(count, offset, flags | (nbd.CMD_FLAG_NO_HOLE if count % 2 else 0))
            model[offset : offset + count] = bytes(count)
            assert other.pread(len(START), 0) == model
        one.trim(100000, 300000, nbd.CMD_FLAG_FUA)
        kept = other.pread(len(START), 0)
        model[300000:400000] = kept[300000:400000]
        assert kept == model
        one.flush()
        one.cache(100000, 0)
        end = one.get_size()
        one.pwrite(b"end", end - 3)
        assert other.pread(4, end - 4)[1:] == b"end"


def extents(client: Any, count: int, offset: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    def take(context: str, start: int, entries: list[int], error: object) -> None:
        found.extend(zip(entries[::2], entries[1::2], strict=True))

    while count:
        before = len(found)
        client.block_status(count, offset, take)
        step = sum(length for length, _ in found[before:])
        offset, count = offset + step, max(count - step, 0)
    return found


@pytest.mark.parametrize("name", [name for name in DISKS if name != "malloc"])
def test_extents_tell_data_and_holes(name: str, connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(plugin(name)) as server:
        client = connect(server)
        flags = [kind for _, kind in extents(client, 450000, 0)]
        assert flags == [0, 3, 0]
        data, hole, _ = (length for length, _ in extents(client, 450000, 0))
        assert 200000 <= data < 200000 + 65536
        assert 400000 - 65536 < data + hole <= 400000
        client.trim(131072, 0)
        assert extents(client, 450000, 0)[0] == (131072, 3)
        client.pwrite(b"x", 65536)
        assert extents(client, 131072, 0)[0][1] == 3
        assert extents(client, 1, 65536) == [(1, 0)]


def test_malloc_is_all_data(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(plugin("malloc")) as server:
        assert extents(connect(server), 450000, 0) == [(450000, 0)]


def test_a_gigantic_disk_of_data_and_holes_is_told_in_parts(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(DataPlugin(data="(1 @0x100000)*1000000000")) as server:
        found = extents(connect(server), 1 << 30, 1 << 40)
        assert sum(length for length, _ in found) >= 1 << 30
        assert [kind for _, kind in found] == [0, 3] * 1024


def test_many_short_pieces_are_not_copied() -> None:
    """10 MB of data, but a page of memory for each byte."""
    disk = DataPlugin(data="(1 @0x100000)*10000000")
    disk.config_complete()
    disk.get_ready()
    assert type(disk._disk) is SparseArray


def test_two_disks_at_once_are_refused_in_a_program_too() -> None:
    with (
        pytest.raises(pynbdkit.ConfigError, match="only one of"),
        pynbdkit.serve(DataPlugin(data="1", raw="2")),
    ):
        pass


def test_size_cuts_an_endless_script(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(DataPlugin(data="<(yes)", size="1K")) as server:
        assert connect(server).pread(1024, 0) == b"y\n" * 512


@pytest.fixture(scope="module")
def shared_disk() -> Iterator[tuple[Any, bytearray]]:
    """A client of one huge disk, and what is written to the first half megabyte of it."""
    nbd = support.libnbd()
    with pynbdkit.serve(plugin("repeated")) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        yield client, bytearray(START)
        client.shutdown()


ranges = st.tuples(st.integers(0, len(START)), st.integers(0, 40000)).map(
    lambda pair: (min(pair[0], len(START) - pair[1]), pair[1])
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(what=st.sampled_from(("write", "zero", "zero no hole")), where=ranges, value=st.integers())
def test_like_a_bytearray(
    shared_disk: tuple[Any, bytearray], what: str, where: tuple[int, int], value: int
) -> None:
    """Copy on write above an image: every example adds to those before it."""
    client, model = shared_disk
    nbd = support.libnbd()
    offset, count = where
    if count:
        content = bytes((value % 256,)) * count if what == "write" else bytes(count)
        if what == "write":
            client.pwrite(content, offset)
        else:
            client.zero(count, offset, 0 if what == "zero" else nbd.CMD_FLAG_NO_HOLE)
        model[offset : offset + count] = content
    assert client.pread(len(START), 0) == model
