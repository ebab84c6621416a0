"""The file plugin: what clients read is what is in the file, and what they write gets there.

What it promises about stable storage is in test_stable.py, block devices are in test_linux.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pynbdkit
import support
from pynbdkit import fallocate
from pynbdkit.chain import Chain
from pynbdkit.plugins.file import EXTENTS_AT_ONCE, WRITES_BEHIND, FilePlugin

SIZE = 1 << 20
PUNCH = fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE
HOLE_ZERO = pynbdkit.HOLE | pynbdkit.ZERO
Flag = pynbdkit.Flag


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def open_layer() -> Iterator[Callable[..., pynbdkit.Layer]]:
    """A plugin's layer without a server; closed at the end."""
    layers: list[pynbdkit.Layer] = []

    def open_it(plugin: FilePlugin, **session: Any) -> pynbdkit.Layer:
        chain = Chain(plugin)
        chain.load()
        chain.complete()
        layers.append(chain.open(pynbdkit.Session(**session)))
        return layers[-1]

    yield open_it
    for layer in layers:
        layer.close()


def extents_of(client: Any, count: int, offset: int = 0, flags: int = 0) -> list[tuple[int, int]]:
    """(length, type) pairs, as the server answers them."""
    found: list[tuple[int, int]] = []

    def take(context: str, offset: int, entries: list[int], error: Any) -> None:
        found.extend(zip(entries[::2], entries[1::2], strict=True))

    client.block_status(count, offset, take, flags)
    return found


def has_holes(folder: Path, *modes: int) -> None:
    """Skip where the temporary folder's filesystem has no holes to test with."""
    path = folder / "holes"
    with path.open("wb") as stream:
        stream.truncate(1 << 20)
        try:
            for mode in (*modes, PUNCH):
                fallocate.fallocate(stream.fileno(), mode, 0, 4096)
            assert os.lseek(stream.fileno(), 0, os.SEEK_HOLE) == 0
        except (OSError, AssertionError):
            support.lacking(
                "the temporary folder's filesystem has no holes: set TMPDIR to one that has"
            )
    path.unlink()


# -- reading and writing ---------------------------------------------------------------------------


def test_reads_and_writes_the_file(
    nbd: ModuleType, disk: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    content = bytearray(disk.read_bytes())
    client = connect(serve("file", disk))
    assert client.get_size() == SIZE
    assert client.pread(SIZE, 0) == content
    assert client.pread(1000, 12345) == content[12345:13345]
    client.pwrite(b"one" * 1000, 777)
    content[777:3777] = b"one" * 1000
    client.pwrite(b"two" * 1000, 500_001, nbd.CMD_FLAG_FUA)
    content[500_001:503_001] = b"two" * 1000
    client.zero(5000, 100_000)
    content[100_000:105_000] = bytes(5000)
    client.zero(5000, 200_000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    content[200_000:205_000] = bytes(5000)
    client.flush()
    assert disk.read_bytes() == content
    assert client.pread(SIZE, 0) == content
    client.cache(SIZE, 0)


def test_a_size_that_no_sector_divides(
    tmp_path: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"0123456789abc")
    client = connect(serve("file", f"file={path}"))
    assert client.get_size() == 13
    assert client.pread(13, 0) == b"0123456789abc"
    client.pwrite(b"X", 12)
    assert path.read_bytes() == b"0123456789abX"


def test_empty_file(tmp_path: Path, serve: Callable[..., Any], connect: Callable[..., Any]) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert connect(serve("file", path)).get_size() == 0


def test_qemu_img_convert_and_compare(
    disk: Path, tmp_path: Path, serve: Callable[..., Any]
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * SIZE)
    server = serve("file", target)
    support.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", disk, server.uri)
    support.run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk, server.uri)
    assert target.read_bytes() == disk.read_bytes()


def test_same_flags_as_peer(disk: Path, sockdir: Path, serve: Callable[..., Any]) -> None:
    for options in ([], ["-r"]):
        peer = support.run(
            "nbdkit", "-U", "-", *options, "file", disk, "--run", 'nbdinfo --json "$uri"'
        )
        ours = support.run("nbdinfo", "--json", serve(*options, "file", disk).uri)
        flags = []
        for text in (ours.stdout, peer.stdout):
            export = json.loads(text)["exports"][0]
            del export["uri"]
            del export["can_fast_zero"]  # we can, the peer cannot
            flags.append(export)
        assert flags[0] == flags[1]


def test_short_transfers_are_continued(
    disk: Path, open_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may do less than it was asked for; the client must not notice."""
    layer = open_layer(FilePlugin(file=disk))
    content = bytearray(disk.read_bytes())
    pread, preadv, pwrite, pwritev = os.pread, os.preadv, os.pwrite, os.pwritev
    monkeypatch.setattr(os, "pread", lambda fd, n, o: pread(fd, max(1, n // 3), o))
    monkeypatch.setattr(os, "preadv", lambda fd, b, o: preadv(fd, [b[0][: len(b[0]) // 2 + 1]], o))
    monkeypatch.setattr(os, "pwrite", lambda fd, b, o: pwrite(fd, b[: len(b) // 2 + 1], o))
    monkeypatch.setattr(
        os, "pwritev", lambda fd, b, o, f: pwritev(fd, [b[0][: len(b[0]) // 2 + 1]], o, f)
    )
    assert layer.pread(100_000, 5, 0) == content[5:100_005]
    for flags in (0, Flag.FUA):
        data = memoryview(random.Random(flags).randbytes(70_000))
        place = 11 + flags * 200_000
        layer.pwrite(data, place, flags)
        content[place : place + len(data)] = data
    monkeypatch.undo()
    assert disk.read_bytes() == content


def test_truncated_under_the_server(
    nbd: ModuleType, disk: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    """Never short data, never zeros that were not there: EIO, and the server lives."""
    content = disk.read_bytes()
    server = serve("file", disk)
    client = connect(server)
    os.truncate(disk, 10_000)
    for count, offset in ((SIZE, 0), (4096, 8192), (512, 10_000), (512, SIZE - 512)):
        with pytest.raises(nbd.Error) as caught:
            client.pread(count, offset)
        assert caught.value.errno == "EIO"
    assert "truncated" in server.log()
    assert client.pread(10_000, 0) == content[:10_000]
    # What is gone is not a hole, or a copy would have zeros for it.
    kinds = {kind for _, kind in extents_of(client, SIZE - 12_288, 12_288)}
    assert kinds == {0}
    assert connect(server).get_size() == 10_000
    # A zero that was answered reads as zeros, as a write that was answered is there.
    client.zero(4096, 16_384)
    assert client.pread(4096, 16_384) == bytes(4096)
    assert server.process.poll() is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_requests_against_a_model(data: st.DataObject) -> None:
    size = 40_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk"
        model = bytearray(random.Random(2).randbytes(size))
        path.write_bytes(model)
        cache = data.draw(st.sampled_from(("default", "none")))
        chain = Chain(FilePlugin(file=path, cache=cache))
        chain.load()
        chain.complete()
        layers = [chain.open(pynbdkit.Session()) for _ in range(2)]
        try:
            for _ in range(data.draw(st.integers(1, 12))):
                layer = data.draw(st.sampled_from(layers))
                offset = data.draw(st.integers(0, size - 1))
                count = data.draw(st.integers(1, size - offset))
                end = offset + count
                action = data.draw(st.sampled_from(("read", "write", "zero", "trim", "extents")))
                fua = data.draw(st.sampled_from((0, Flag.FUA)))
                if action == "read":
                    assert layer.pread(count, offset, 0) == model[offset:end]
                elif action == "write":
                    text = bytes([data.draw(st.integers(0, 255))]) * count
                    layer.pwrite(memoryview(text), offset, fua)
                    model[offset:end] = text
                elif action == "zero":
                    trim = data.draw(st.sampled_from((0, Flag.MAY_TRIM)))
                    layer.zero(count, offset, fua | trim)
                    model[offset:end] = bytes(count)
                elif action == "trim":
                    layer.trim(count, offset, fua)
                    got = bytes(layer.pread(count, offset, 0))
                    # Each byte is as it was, or zero.
                    assert all(
                        a == b or b == 0 for a, b in zip(model[offset:end], got, strict=True)
                    )
                    model[offset:end] = got
                else:
                    position = offset
                    for start, length, kind in layer.extents(count, offset, 0):
                        assert start == position
                        position += length
                        if kind & pynbdkit.ZERO:
                            assert not any(model[start:position])
                    assert position == end
        finally:
            for layer in layers:
                layer.close()
        assert path.read_bytes() == model


# -- read-only -------------------------------------------------------------------------------------


def open_modes(pid: int, path: Path) -> set[int]:
    """With which access modes a process has a file open."""
    modes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.path.realpath(entry) == os.path.realpath(path):
            info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
            flags = next(line for line in info.splitlines() if line.startswith("flags:"))
            modes.add(int(flags.split()[1], 8) & os.O_ACCMODE)
    return modes


def test_read_only_server_opens_read_only(
    nbd: ModuleType, disk: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    server = serve("-r", "file", disk)
    client = connect(server, strict=False)
    assert client.is_read_only()
    assert open_modes(server.process.pid, disk) == {os.O_RDONLY}
    client.flush()
    requests: list[Callable[[], Any]] = [
        lambda: client.pwrite(b"x", 0),
        lambda: client.trim(512, 0),
    ]
    for request in requests:
        with pytest.raises(nbd.Error) as caught:
            request()
        assert caught.value.errno == "EPERM"


def test_falls_back_to_read_only(disk: Path, connect: Callable[..., Any]) -> None:
    """A file that may be read and not be written is served read-only."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "disk"
    path.write_bytes(disk.read_bytes())
    path.chmod(0o444)
    folder.chmod(0o755)
    try:
        with pynbdkit.serve(FilePlugin(file=path), tcp=("127.0.0.1", 0)) as server:
            if os.geteuid() == 0:
                os.seteuid(65534)  # permission bits mean nothing to root
            try:
                client = connect(server)
            finally:
                if os.getuid() == 0:
                    os.seteuid(0)
            assert client.is_read_only()
            assert client.pread(SIZE, 0) == disk.read_bytes()
            assert open_modes(os.getpid(), path) == {os.O_RDONLY}
    finally:
        path.unlink()
        folder.rmdir()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_falls_back_for_each_reason(
    number: int, disk: Path, open_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_ACCMODE == os.O_RDWR:
            raise OSError(number, os.strerror(number), path)
        return really(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    layer = open_layer(FilePlugin(file=disk))
    assert not layer.can_write()
    assert layer.pread(512, 0, 0) == disk.read_bytes()[:512]


def test_other_errors_of_opening_are_errors(
    disk: Path, open_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_ACCMODE == os.O_RDWR:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return really(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        open_layer(FilePlugin(file=disk))


# -- what may be served ----------------------------------------------------------------------------


def test_wrong_parameters(tmp_path: Path, disk: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    # The path of a Unix socket is short.
    with socket.socket(socket.AF_UNIX) as sock, contextlib.chdir(tmp_path):
        sock.bind("sock")
    cases: list[tuple[list[Any], str]] = [
        ([], "you must supply [file=]<FILENAME>"),
        ([disk, f"dir={tmp_path}"], "file= and dir= cannot be used at the same time"),
        (["fd=7", "dirfd=8"], "fd= and dirfd= cannot be used at the same time"),
        ([tmp_path], f"use dir= to serve files within {tmp_path}"),
        ([tmp_path / "pipe"], f"file is not regular or block device: {tmp_path}/pipe"),
        ([tmp_path / "sock"], f"file is not regular or block device: {tmp_path}/sock"),
        (["/dev/null"], "file is not regular or block device: /dev/null"),
        ([tmp_path / "none"], f"{tmp_path}/none: No such file or directory"),
        ([f"dir={disk}"], f"expecting a directory: {disk}"),
        ([f"dir={tmp_path}/none"], f"{tmp_path}/none: No such file or directory"),
        (["file="], "file: the path is empty"),
        (["dir="], "dir: the path is empty"),
        ([disk, "cache=some"], "unknown cache 'some'"),
        ([disk, "fadvise=often"], "unknown fadvise 'often'"),
        ([disk, "rdelay=1"], "add --filter=delay"),
        ([disk, "speed=1"], "unknown parameter 'speed'"),
        (["fd=0"], "fd=0: must be 3 or more"),
        (["dirfd=2"], "dirfd=2: must be 3 or more"),
        (["fd=1000"], "fd=1000: Bad file descriptor"),
        (["fd=x"], "fd: could not parse number"),
    ]
    for arguments, message in cases:
        plugin = FilePlugin()
        chain = Chain(plugin)
        chain.load()
        with pytest.raises(pynbdkit.ConfigError) as caught:
            for argument in arguments:
                text = str(argument)
                key, _, value = text.partition("=") if "=" in text else ("file", "", text)
                chain.config(key, value)
            chain.complete()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_mistake_is_one_line_and_status_1(tmp_path: Path) -> None:
    done = support.pynbdkit("file", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"use dir= to serve files within {tmp_path}" in done.stderr


def test_relative_path(
    disk: Path, sockdir: Path, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server in the background is in "/" when it opens the file."""
    monkeypatch.chdir(disk.parent)
    plugin = FilePlugin(file=Path("disk"))
    with pynbdkit.serve(plugin) as server:
        monkeypatch.chdir("/")
        assert connect(server).get_size() == SIZE
    monkeypatch.chdir(disk.parent)
    pid_file, path = sockdir / "pid", sockdir / "sock"
    done = support.pynbdkit("-U", path, "-P", pid_file, "file", "disk")
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    pid = int(pid_file.read_text())
    try:
        assert connect(f"nbd+unix:///?socket={path}").get_size() == SIZE
    finally:
        os.kill(pid, 15)


# -- a directory -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two disks, and everything that must not be served."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"a" * 1024)
    (folder / "b c").write_bytes(b"b" * 2048)
    (tmp_path / "outside").write_bytes(b"secret" * 100)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep").write_bytes(b"deep" * 256)
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")).write_bytes(b"no name" * 100)
    return folder


EXPORTS = {"a": 1024, "b c": 2048, "link": 600}
NOT_EXPORTS = (
    "..", ".", "/", "/etc/passwd", "../outside", "sub/deep", "sub", "pipe", "zero", "dangling",
    "./a", "a/", "none", "x" * 300,
)  # fmt: skip


def check_folder(nbd: ModuleType, socket_path: str | Path) -> None:
    def connected(name: str) -> Any:
        client = nbd.NBD()
        client.set_export_name(name)
        client.connect_unix(str(socket_path))
        return client

    for name, size in EXPORTS.items():
        client = connected(name)
        assert client.get_size() == size
        assert not client.is_read_only()
        assert client.pread(2, 0) == {"a": b"aa", "b c": b"bb", "link": b"se"}[name]
        client.shutdown()
    for name in (*NOT_EXPORTS, ""):
        with pytest.raises(nbd.Error):
            connected(name)
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_unix(str(socket_path))
    names: list[str] = []
    client.opt_list(lambda name, description: names.append(name))
    client.opt_abort()
    assert names == sorted(EXPORTS)


def test_directory(
    nbd: ModuleType, folder: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    assert list(FilePlugin(dir=folder).list_exports(False, False)) == sorted(EXPORTS)
    server = serve("file", f"dir={folder}")
    check_folder(nbd, server.socket)
    (folder / "new").write_bytes(bytes(512))
    assert connect(server.export_uri("new")).get_size() == 512


def test_directory_descriptor(nbd: ModuleType, folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pynbdkit.serve(FilePlugin(dirfd=fd)) as server:
            assert server.socket is not None
            check_folder(nbd, server.socket)
            check_folder(nbd, server.socket)  # listing has not moved the position
        with pytest.raises(pynbdkit.ConfigError, match=f"use dirfd= to serve files within fd={fd}"):
            FilePlugin(fd=fd).config_complete()
    finally:
        os.close(fd)


def test_a_name_that_becomes_a_pipe_is_not_waited_for(
    folder: Path, open_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a name and its opening, somebody may put a pipe there."""
    really = os.stat

    def late(path: Any, **options: Any) -> os.stat_result:
        return really(folder / "a" if str(path).endswith("pipe") else path, **options)

    monkeypatch.setattr(os, "stat", late)
    for readonly in (False, True):
        with pytest.raises(OSError, match="not regular"):
            open_layer(FilePlugin(dir=folder), readonly=readonly, export_name="pipe")


# -- descriptors -----------------------------------------------------------------------------------


def test_descriptor(disk: Path, connect: Callable[..., Any]) -> None:
    """Also of a file that has no name any more; and the descriptor stays as it was."""
    fd = os.open(disk, os.O_RDWR)
    disk.unlink()
    try:
        os.lseek(fd, 4321, os.SEEK_SET)
        with pynbdkit.serve(FilePlugin(fd=fd)) as server:
            first, second = connect(server), connect(server)
            first.pwrite(b"hello", 100)
            first.flush()
            assert second.pread(5, 100) == b"hello"
            extents_of(second, SIZE)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 4321
        assert os.pread(fd, 5, 100) == b"hello"
    finally:
        os.close(fd)


def test_descriptor_without_proc(
    disk: Path, connect: Callable[..., Any], nbd: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, "no /proc", path)
        return really(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    fd = os.open(disk, os.O_RDWR)
    try:
        with pynbdkit.serve(FilePlugin(fd=fd)) as server:
            for _ in range(2):
                client = connect(server)
                client.pwrite(b"x" * 512, 512, nbd.CMD_FLAG_FUA)
                client.flush()
                assert client.pread(512, 512) == b"x" * 512
                client.shutdown()
    finally:
        os.close(fd)


def test_descriptor_from_the_parent(disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pynbdkit", "-U", "-", "file", f"fd={fd}",
             "--run", f'{support.program("nbdinfo")} --size "$uri"'],
            pass_fds=(fd,), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert (done.stdout.strip(), done.stderr) == (str(SIZE), "")
    finally:
        os.close(fd)


def test_descriptor_is_not_written_to_beyond_its_mode(
    disk: Path, tmp_path: Path, open_layer: Callable[..., Any]
) -> None:
    fd = os.open(disk, os.O_RDONLY)
    try:
        assert not open_layer(FilePlugin(fd=fd)).can_write()
    finally:
        os.close(fd)
    for flags, message in (
        (os.O_WRONLY, "not open for reading"),
        (os.O_RDWR | os.O_APPEND, "O_APPEND"),
        (os.O_PATH, "O_PATH"),
    ):
        fd = os.open(disk, flags)
        try:
            with pytest.raises(pynbdkit.ConfigError, match=message):
                FilePlugin(fd=fd).config_complete()
        finally:
            os.close(fd)


def test_no_descriptor_is_left(disk: Path, connect: Callable[..., Any], nbd: ModuleType) -> None:
    with pynbdkit.serve(FilePlugin(file=disk)) as server:
        for _ in range(3):
            client = connect(server)
            client.pwrite(b"x", 0, nbd.CMD_FLAG_FUA)
            client.flush()
            client.shutdown()
        deadline = time.monotonic() + 30
        while server.connections and time.monotonic() < deadline:
            time.sleep(0.005)
        assert open_modes(os.getpid(), disk) == set()


# -- holes and zeros -------------------------------------------------------------------------------


def test_sparse_copies_keep_the_holes(tmp_path: Path, serve: Callable[..., Any]) -> None:
    has_holes(tmp_path)
    source = tmp_path / "source"
    with source.open("wb") as stream:
        stream.truncate(64 << 20)
        for offset in (0, 10 << 20, (40 << 20) + 8192):
            stream.seek(offset)
            stream.write(b"data" * 4096)
    used = source.stat().st_blocks
    assert used < 1000
    (tmp_path / "copy").touch()
    os.truncate(tmp_path / "copy", 64 << 20)
    reader, writer = serve("-r", "file", source), serve("file", tmp_path / "copy")
    support.run("nbdcopy", reader.uri, tmp_path / "out")
    support.run("nbdcopy", source, writer.uri)
    for copy in ("out", "copy"):
        assert (tmp_path / copy).read_bytes() == source.read_bytes()
        assert (tmp_path / copy).stat().st_blocks <= used + 16
    peer = support.run("nbdkit", "-U", "-", "-r", "file", source, "--run", 'nbdinfo --map "$uri"')
    assert support.run("nbdinfo", "--map", reader.uri).stdout == peer.stdout


def test_trim_makes_holes(
    nbd: ModuleType, tmp_path: Path, disk: Path, serve: Callable[..., Any],
    connect: Callable[..., Any],
) -> None:  # fmt: skip
    has_holes(tmp_path)
    client = connect(serve("file", disk))
    before = disk.stat().st_blocks
    client.trim(SIZE // 2, 0)
    client.trim(SIZE // 4, SIZE // 2, nbd.CMD_FLAG_FUA)
    assert disk.stat().st_blocks <= before // 4 + 8
    assert disk.stat().st_size == SIZE
    assert extents_of(client, SIZE) == [(SIZE * 3 // 4, HOLE_ZERO), (SIZE // 4, 0)]
    assert extents_of(client, SIZE, 0, nbd.CMD_FLAG_REQ_ONE) == [(SIZE * 3 // 4, HOLE_ZERO)]


def test_zero_allocates_unless_it_may_not(
    nbd: ModuleType, tmp_path: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    has_holes(tmp_path)
    path = tmp_path / "disk"
    path.write_bytes(b"x" * SIZE)
    client = connect(serve("file", path))
    client.zero(SIZE, 0)
    assert path.stat().st_blocks <= 8
    client.zero(SIZE // 2, 0, nbd.CMD_FLAG_NO_HOLE)
    assert path.stat().st_blocks * 512 >= SIZE // 2
    assert client.pread(SIZE, 0) == bytes(SIZE)


def test_many_extents_are_answered_in_parts(
    tmp_path: Path, open_layer: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    has_holes(tmp_path)
    path = tmp_path / "comb"
    step = 2 * os.statvfs(tmp_path).f_frsize
    count = EXTENTS_AT_ONCE
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(fd, count * step)
    for index in range(count):
        os.pwrite(fd, b"x", index * step)
    os.close(fd)
    layer = open_layer(FilePlugin(file=path))
    found: list[Any] = []
    offset, answers = 0, 0
    while offset < count * step:
        answer = layer.extents(count * step - offset, offset, 0)
        assert len(answer) <= EXTENTS_AT_ONCE
        found += answer
        offset = answer[-1].offset + answer[-1].length
        answers += 1
    assert answers > 1
    assert len(found) == 2 * count
    with pynbdkit.serve(FilePlugin(file=path)) as server:
        text = support.run("nbdinfo", "--map", server.uri).stdout
        assert text.count("\n") == 2 * count


class Refusing:
    """fallocate of a filesystem that has only some modes; counts the calls."""

    def __init__(self, modes: tuple[int, ...]) -> None:
        self.modes = modes
        self.calls: list[int] = []
        self._really = fallocate.fallocate

    def __call__(self, fd: int, mode: int, offset: int, count: int) -> None:
        self.calls.append(mode)
        if mode not in self.modes:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        self._really(fd, mode, offset, count)


ZERO = fallocate.ZERO_RANGE


@pytest.mark.parametrize(
    ("has", "flags", "first", "again", "fast"),
    [
        ((PUNCH, ZERO, 0), Flag.MAY_TRIM, [PUNCH], [PUNCH], True),
        ((PUNCH, ZERO, 0), 0, [ZERO], [ZERO], True),
        ((ZERO,), Flag.MAY_TRIM, [PUNCH, ZERO], [ZERO], True),
        ((PUNCH, 0), 0, [ZERO, PUNCH, 0], [PUNCH, 0], True),
        ((PUNCH,), 0, [ZERO, PUNCH, 0], [PUNCH], False),
        ((), Flag.MAY_TRIM, [PUNCH, ZERO], [], False),
        ((), 0, [ZERO, PUNCH], [], False),
    ],
)
def test_zero_uses_what_there_is(
    has: tuple[int, ...], flags: int, first: list[int], again: list[int], fast: bool,
    disk: Path, open_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    has_holes(disk.parent, ZERO, 0)
    refusing = Refusing(has)
    monkeypatch.setattr(fallocate, "fallocate", refusing)
    content = bytearray(disk.read_bytes())
    layer = open_layer(FilePlugin(file=disk))
    for offset, expected in ((5000, first), (100_000, again)):
        refusing.calls.clear()
        layer.zero(50_000, offset, flags)
        content[offset : offset + 50_000] = bytes(50_000)
        assert refusing.calls == expected
        assert disk.read_bytes() == content
    assert layer.can_fast_zero()
    if fast:
        layer.zero(1000, 300_000, flags | Flag.FAST_ZERO)
        content[300_000:301_000] = bytes(1000)
    else:
        with pytest.raises(OSError, match="zeros") as caught:
            layer.zero(1000, 300_000, flags | Flag.FAST_ZERO)
        assert caught.value.errno == errno.EOPNOTSUPP
    if PUNCH not in has or fast:
        assert disk.read_bytes() == content


def test_trim_is_only_advice(
    disk: Path, open_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = Refusing(())
    monkeypatch.setattr(fallocate, "fallocate", refusing)
    content = disk.read_bytes()
    layer = open_layer(FilePlugin(file=disk))
    layer.trim(4096, 0, 0)
    layer.trim(4096, 0, Flag.FUA)
    assert refusing.calls == [PUNCH]
    assert disk.read_bytes() == content


def test_errors_of_fallocate_reach_the_client(
    disk: Path, open_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fallocate, "fallocate", full)
    layer = open_layer(FilePlugin(file=disk))
    for request in (layer.zero, layer.trim):
        with pytest.raises(OSError, match="No space left") as caught:
            request(4096, 0, 0)
        assert caught.value.errno == errno.ENOSPC


# -- the page cache --------------------------------------------------------------------------------


def cached(path: Path, offset: int, count: int = 4096) -> bool:
    """Whether a part of a file is in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(count)], offset, os.RWF_NOWAIT) == count
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def can_be_dropped(folder: Path) -> None:
    """Skip where the temporary folder is in memory anyway."""
    path = folder / "probe"
    path.write_bytes(bytes(1 << 16))
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached(path, 8192):
            support.lacking("the temporary folder is kept in memory: set TMPDIR to one on a disk")
    except OSError as error:
        support.lacking(f"the temporary folder's filesystem does not tell what is cached: {error}")
    finally:
        os.close(fd)
        path.unlink()


def test_cache_none_keeps_next_to_nothing(tmp_path: Path, open_layer: Callable[..., Any]) -> None:
    can_be_dropped(tmp_path)
    path = tmp_path / "disk"
    size, step = 16 << 20, 1 << 18
    path.write_bytes(bytes(size))
    places = range(0, size, 1 << 16)

    def in_cache() -> int:
        return sum(cached(path, place) for place in places)

    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert in_cache() == len(places)
    layer = open_layer(FilePlugin(file=path, cache="none"))
    for offset in range(0, size, step):
        assert layer.pread(step, offset, 0) == bytes(step)
    assert in_cache() < len(places) // 4
    for offset in range(0, size, step):
        layer.pwrite(b"x" * step, offset, 0)
    layer.flush(0)
    assert in_cache() < len(places) // 4
    for offset in range(0, size, step):
        layer.pwrite(b"y" * step, offset, Flag.FUA)
    assert in_cache() < len(places) // 4
    assert layer.pread(5, 3 << 20, 0) == b"yyyyy"


def test_cache_none_drops_written_ranges_later(
    disk: Path, open_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = open_layer(FilePlugin(file=disk, cache="none"))
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: calls.append(rest))
    for index in range(WRITES_BEHIND + 2):
        layer.pwrite(memoryview(b"x" * 512), index * 512, 0)
    dropped = os.POSIX_FADV_DONTNEED
    last = WRITES_BEHIND + 2
    expected = [(0, index * 512 + 512, dropped) for index in range(last)]  # each when written
    expected.insert(last - 1, (0, 512, dropped))  # and the first two again, later
    expected.append((0, 1024, dropped))
    assert calls == expected


def test_advice_to_the_kernel(
    disk: Path, open_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: calls.append(rest))
    open_layer(FilePlugin(file=disk))
    assert calls == []
    open_layer(FilePlugin(file=disk, fadvise="random"))
    open_layer(FilePlugin(file=disk, fadvise="sequential"))
    layer = open_layer(FilePlugin(file=disk, fadvise="normal"))
    layer.cache(4096, 8192, 0)
    assert calls == [
        (0, 0, os.POSIX_FADV_RANDOM),
        (0, 0, os.POSIX_FADV_SEQUENTIAL),
        (8192, 4096, os.POSIX_FADV_WILLNEED),
    ]


def test_dump_plugin(disk: Path) -> None:
    done = support.pynbdkit("file", "--dump-plugin")
    assert done.returncode == 0
    for line in ("file_blkzeroout=yes", "file_falloc_fl_punch_hole=yes", "magic_config_key=file"):
        assert line in done.stdout.splitlines()


def test_blocking_mode_of_the_descriptor(disk: Path, open_layer: Callable[..., Any]) -> None:
    """It is opened without waiting (see the pipes), but used as usual."""
    layer = open_layer(FilePlugin(file=disk))
    fd = layer.device._fd
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
