"""What disks are for: ext4 and xfs on an export, used by the kernel.

mkfs, a tree of files, trim, unmount, check, and again, on the file plugin and on cow over it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import file_tree
import support
from block_device import attached, mounted, needs

SIZE = 320 << 20
"""Bytes; xfs wants at least 300 MiB."""
SLACK = 2 << 20
BLOCK = 1 << 16

Tree = dict[bytes, tuple[object, ...]]
Serve = Callable[..., support.ServerProcess]


class Filesystem:
    """How one kind of filesystem is made and checked."""

    def __init__(self, name: str, make: tuple[str, ...], check: tuple[str, ...]) -> None:
        self.name = name
        self._make = make
        self._check = check

    def make(self, device: Path) -> None:
        support.run(*self._make, device)

    def check(self, device: Path) -> None:
        """Raise AssertionError with what is wrong, if anything is; nothing is repaired."""
        support.run(*self._check, device)


FILESYSTEMS = {
    "ext4": Filesystem("ext4", ("mkfs.ext4", "-q", "-F"), ("e2fsck", "-f", "-n")),
    "xfs": Filesystem("xfs", ("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n")),
}


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    needs("mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair", "fstrim", "cp")


@pytest.fixture(params=FILESYSTEMS)
def filesystem(request: pytest.FixtureRequest) -> Filesystem:
    return FILESYSTEMS[request.param]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree") / "tree"
    file_tree.make(root)
    return root


@pytest.fixture(scope="module")
def contents(tree: Path) -> Tree:
    """What `tree` looks like."""
    return file_tree.look(tree)


def copy(tree: Path, target: Path) -> None:
    support.run("cp", "-a", f"{tree}/.", target)


def allocated(path: Path) -> int:
    """Bytes that a file takes on its filesystem."""
    return path.stat().st_blocks * 512


def fingerprint(path: Path) -> tuple[object, ...]:
    """All that would tell if somebody had written to a file."""
    digest = hashlib.sha256()
    with path.open("r+b") as stream:
        os.fsync(stream.fileno())  # what is still to be allocated for earlier writes
        info = path.stat()
        for place in data_blocks(stream.fileno(), info.st_size):
            block = os.pread(stream.fileno(), BLOCK, place)
            if block.count(0) < len(block):
                digest.update(b"%d:" % place + block)
    times = info.st_mtime_ns, info.st_ctime_ns
    return digest.hexdigest(), info.st_size, info.st_blocks, times


def data_blocks(fd: int, size: int) -> Iterator[int]:
    """Offsets of the blocks that are not wholly in a hole."""
    place = 0
    while place < size:
        try:
            place = os.lseek(fd, place, os.SEEK_DATA) // BLOCK * BLOCK
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        yield place
        place += BLOCK


def requests(log: Path, kind: str) -> int:
    """How many requests of a kind the log filter has seen."""
    return log.read_text().count(f" {kind} id=")


def test_tree_on_a_file(
    filesystem: Filesystem, tree: Path, contents: Tree, tmp_path: Path, serve: Serve
) -> None:
    disk, log, folder = tmp_path / "disk", tmp_path / "log", tmp_path / "nbd"
    with disk.open("wb") as stream:
        stream.truncate(SIZE)
    server = serve("--filter=log", "file", disk, f"logfile={log}")
    with attached(server.uri, folder) as device:
        filesystem.make(device)
        assert requests(log, "Trim")
        assert requests(log, "Zero")
        with mounted(device, tmp_path / "mnt", "discard") as root:
            copy(tree, root)
            assert not file_tree.difference(contents, file_tree.look(root))
        filesystem.check(device)
        assert requests(log, "Flush")
    assert server.stop() == 0

    server = serve("file", disk)
    with attached(server.uri, folder) as device:
        filesystem.check(device)
        with mounted(device, tmp_path / "mnt") as root:
            assert not file_tree.difference(contents, file_tree.look(root))
            shutil.rmtree(root / "large")
        before = allocated(disk)
        with mounted(device, tmp_path / "mnt") as root:
            support.run("fstrim", root)
            left = {name: what for name, what in contents.items() if not name.startswith(b"large")}
            assert not file_tree.difference(left, file_tree.look(root))
        # Only now it is certain: xfs does not wait for the answers to its discards.
        assert allocated(disk) < before - 4 * file_tree.LARGE + SLACK
        filesystem.check(device)
    assert server.stop() == 0
    filesystem.check(disk)


def test_tree_on_cow(
    filesystem: Filesystem, tree: Path, contents: Tree, tmp_path: Path, serve: Serve
) -> None:
    """A new filesystem over a disk that is full of something else."""
    disk, folder = tmp_path / "disk", tmp_path / "nbd"
    junk = random.Random(2).randbytes(BLOCK)
    with disk.open("wb") as stream:
        stream.truncate(SIZE)
        for place in range(0, SIZE, 8 * BLOCK):
            os.pwrite(stream.fileno(), junk, place)
    before = fingerprint(disk)
    server = serve("--filter=cow", "file", disk)
    with attached(server.uri, folder) as device:
        filesystem.make(device)
        with mounted(device, tmp_path / "mnt", "discard") as root:
            copy(tree, root)
            shutil.rmtree(root / "large")
        with mounted(device, tmp_path / "mnt", "discard") as root:
            support.run("fstrim", root)
            copy(tree, root)
        filesystem.check(device)
    with attached(server.uri, folder) as device:  # other connections, the same overlay
        filesystem.check(device)
        with mounted(device, tmp_path / "mnt", "ro") as root:
            assert not file_tree.difference(contents, file_tree.look(root))
    assert server.stop() == 0
    assert fingerprint(disk) == before


def test_changes_over_a_tree(
    filesystem: Filesystem, tree: Path, contents: Tree, tmp_path: Path, serve: Serve
) -> None:
    """A filesystem that is used over cow, and is what it was, without."""
    disk, folder = tmp_path / "disk", tmp_path / "nbd"
    with disk.open("wb") as stream:
        stream.truncate(SIZE)
    filesystem.make(disk)
    with mounted(disk, tmp_path / "mnt", "loop") as root:
        copy(tree, root)
    before = fingerprint(disk)
    server = serve("--filter=cow", "file", disk, "cow-block-size=4096")
    with attached(server.uri, folder) as device:
        with mounted(device, tmp_path / "mnt", "discard") as root:
            assert not file_tree.difference(contents, file_tree.look(root))
            shutil.rmtree(root / "small3")
            (root / "large" / "0").unlink()
            with (root / "large" / "1").open("r+b") as stream:
                stream.seek(1_000_001)
                stream.write(b"changed" * 100_000)
            with (root / "holes").open("r+b") as stream:
                stream.truncate(6 << 20)
            shutil.copytree(root / "large", root / "copied")
            support.run("fstrim", root)
            changed = file_tree.look(root)
        filesystem.check(device)
    with attached(server.uri, folder) as device:
        filesystem.check(device)
        with mounted(device, tmp_path / "mnt", "ro") as root:
            assert not file_tree.difference(changed, file_tree.look(root))
            assert (root / "copied" / "1").read_bytes()[1_000_001:].startswith(b"changedchanged")
    assert server.stop() == 0
    assert fingerprint(disk) == before
    server = serve("-r", "file", disk)
    with attached(server.uri, folder) as device:
        filesystem.check(device)
        with mounted(device, tmp_path / "mnt", "ro") as root:
            assert not file_tree.difference(contents, file_tree.look(root))
