"""Block devices, and the system calls behind zero and trim.

Loop devices stand for disks; they need root.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit import fallocate
from pynbdkit.chain import Chain
from pynbdkit.plugins import _linux
from pynbdkit.plugins.file import FilePlugin

SIZE = 4 << 20
PUNCH = fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE
Flag = pynbdkit.Flag


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """attach("-r", …): a loop device on tmp_path/"image", which has random content."""
    support.need_root("a loop device")
    image = tmp_path / "image"
    image.write_bytes(random.Random(3).randbytes(SIZE))
    devices: list[str] = []

    def losetup(*options: str) -> str:
        devices.append(support.run("losetup", "-f", "--show", *options, image).stdout.strip())
        return devices[-1]

    yield losetup
    for device in devices:
        support.run("losetup", "-d", device)


@pytest.fixture
def device(attach: Callable[..., str]) -> str:
    return attach()


def open_layer(device: str, **parameters: Any) -> pynbdkit.Layer:
    chain = Chain(FilePlugin(file=device, **parameters))
    chain.load()
    chain.complete()
    return chain.open(pynbdkit.Session())


# -- block devices over the wire -------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["default", "none"])
def test_reads_writes_zeros_and_trims(
    cache: str, nbd: ModuleType, device: str, tmp_path: Path, serve: Callable[..., Any],
    connect: Callable[..., Any],
) -> None:  # fmt: skip
    image = tmp_path / "image"
    content = bytearray(image.read_bytes())
    client = connect(serve("file", device, f"cache={cache}"))
    assert client.get_size() == SIZE
    assert client.pread(SIZE, 0) == content
    client.pwrite(b"x" * 10_000, 1234)
    content[1234:11_234] = b"x" * 10_000
    client.pwrite(b"y" * 512, SIZE - 512, nbd.CMD_FLAG_FUA)
    content[-512:] = b"y" * 512
    fua, no_hole = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE
    for offset, count, flags in (
        (100_000, 50_000, 0),
        (200_001, 50_000, fua),
        (300_000, 50_001, no_hole),
        (400_001, 50_007, no_hole | fua),
        (512_000, 512, no_hole),
        (600_000, 100, 0),
        (1 << 20, 1 << 20, fua),
    ):
        client.zero(count, offset, flags)
        content[offset : offset + count] = bytes(count)
    assert client.pread(SIZE, 0) == content
    client.trim(1 << 20, 3 << 20)
    client.trim(1000, 2_500_001, fua)
    client.flush()
    got = client.pread(SIZE, 0)
    content[3 << 20 :] = got[3 << 20 :]
    content[2_500_001:2_501_001] = got[2_500_001:2_501_001]
    assert got == content
    assert image.read_bytes() == content


def test_trim_gives_space_back(
    device: str, tmp_path: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    image = tmp_path / "image"
    client = connect(serve("file", device))
    client.flush()
    before = image.stat().st_blocks
    client.trim(SIZE, 0)
    client.flush()
    assert image.stat().st_blocks <= before // 4


def test_read_only_device(
    attach: Callable[..., str], serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    """It can be opened for writing, and refuses each write: so it is not offered."""
    client = connect(serve("file", attach("-r")))
    assert client.is_read_only()
    assert len(client.pread(4096, 0)) == 4096


def test_directory_mode_serves_devices(
    device: str, tmp_path: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "disk").symlink_to(device)
    server = serve("file", f"dir={folder}")
    assert connect(server.export_uri("disk")).get_size() == SIZE


def test_same_answers_as_peer(device: str, serve: Callable[..., Any]) -> None:
    ours = serve("file", device)
    peer = support.run("nbdkit", "-U", "-", "file", device, "--run", 'nbdinfo --map "$uri"')
    assert support.run("nbdinfo", "--map", ours.uri).stdout == peer.stdout
    rotational = Path(f"/sys/block/{Path(device).name}/queue/rotational").read_text().strip()
    answer = support.run("nbdinfo", "--is", "rotational", ours.uri, check=False)
    assert (answer.returncode == 0) == (rotational == "1")


# -- which way is taken ----------------------------------------------------------------------------


def test_zero_of_a_device_without_punching(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    zero, punch = _linux.block_zero, fallocate.fallocate

    def refuse(fd: int, mode: int, offset: int, count: int) -> None:
        calls.append("punch")
        raise OSError(errno.EOPNOTSUPP, "no")

    def block_zero(fd: int, offset: int, count: int) -> None:
        calls.append("zero")
        assert offset % 512 == count % 512 == 0
        zero(fd, offset, count)

    monkeypatch.setattr(fallocate, "fallocate", refuse)
    monkeypatch.setattr(_linux, "block_zero", block_zero)
    layer = open_layer(device)
    try:
        layer.zero(10_000, 1000, Flag.MAY_TRIM)
        layer.zero(10_000, 20_001, Flag.MAY_TRIM)
        assert calls == ["punch", "zero", "zero"]
        assert layer.pread(10_000, 1000, 0) == bytes(10_000)
        assert layer.pread(10_000, 20_001, 0) == bytes(10_000)
        assert any(layer.pread(1, 999, 0)) or any(layer.pread(1, 998, 0))
        with pytest.raises(OSError, match="zeros") as caught:  # it might have to write
            layer.zero(10_000, 50_000, Flag.MAY_TRIM | Flag.FAST_ZERO)
        assert caught.value.errno == errno.EOPNOTSUPP
        monkeypatch.setattr(fallocate, "fallocate", punch)
        with pytest.raises(OSError, match="zeros"):
            layer.zero(10_000, 50_000, Flag.FAST_ZERO)
    finally:
        layer.close()


def test_fast_zero_of_a_device(device: str) -> None:
    layer = open_layer(device)
    try:
        layer.zero(10_000, 50_000, Flag.MAY_TRIM | Flag.FAST_ZERO)
        assert layer.pread(10_000, 50_000, 0) == bytes(10_000)
    finally:
        layer.close()


def test_trim_of_a_device_that_cannot(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def refuse(fd: int, offset: int, count: int) -> None:
        calls.append(count)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(_linux, "block_discard", refuse)
    layer = open_layer(device)
    try:
        layer.trim(100, 10, 0)  # no whole sector
        layer.trim(4096, 4000, Flag.FUA)
        layer.trim(4096, 0, 0)
        assert calls == [3584]
    finally:
        layer.close()


# -- the calls themselves --------------------------------------------------------------------------


def test_fallocate_takes_64_bits(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "large", os.O_RDWR | os.O_CREAT)
    try:
        offset = (5 << 32) + 4096
        os.truncate(fd, offset + 8192)
        os.pwrite(fd, b"x" * 8192, offset)
        fallocate.fallocate(fd, PUNCH, offset, 4096)
        assert os.pread(fd, 8192, offset) == bytes(4096) + b"x" * 4096
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip(
                "the temporary folder's filesystem has no holes: set TMPDIR to one that has"
            )
        raise
    finally:
        os.close(fd)


def test_fallocate_raises_what_the_call_says(tmp_path: Path) -> None:
    with (
        (tmp_path / "file").open("wb") as stream,
        pytest.raises(OSError, match="Invalid") as caught,
    ):
        fallocate.fallocate(stream.fileno(), PUNCH, 0, 0)
    assert caught.value.errno == errno.EINVAL
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file") as caught:
            fallocate.fallocate(fd, PUNCH, 0, 4096)
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(fd)


def test_fallocate_goes_on_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [errno.EINTR, errno.EINTR, 0]
    monkeypatch.setattr(fallocate, "_loaded", [lambda *_: answers.pop(0)])
    fallocate.fallocate(0, 0, 0, 1)
    assert answers == []


def test_questions_to_something_that_is_no_device(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        assert _linux.block_sector_size(stream.fileno()) == 512
        assert not _linux.block_is_read_only(stream.fileno())
    assert not _linux.is_rotational(os.makedev(4000, 4000))
