"""Whole disks copied to and from an export, by qemu-img and nbdcopy: same bytes, same holes.

And what nbdinfo and QEMU are told of the holes is what the filesystem says.
"""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import support

Serve = Callable[..., support.ServerProcess]
Map = list[tuple[int, int, bool]]
"""(offset, length, whether it is data) from 0 to the end, no two neighbours alike."""

SIZE = (64 << 20) + 4096 * 3
SLACK = 1 << 20
"""Bytes that a filesystem may add for its own purposes, or a client for its block size."""
PIECES = 60
CLUSTER = 65536
"""What qcow2, memory and cow allocate at least."""
FULL = b"\xee" * (1 << 20)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse image: some 4 MiB of data in 64 MiB, in pieces of all sizes, one at the end."""
    path = tmp_path_factory.mktemp("image") / "image"
    rng = random.Random(3)
    with path.open("wb") as stream:
        stream.truncate(SIZE)
        for _ in range(PIECES):
            place = rng.randrange(SIZE >> 12) << 12
            count = min(rng.choice((1, 4096, 5000, 65536, 200_000)), SIZE - place)
            os.pwrite(stream.fileno(), rng.randbytes(count), place)
        os.pwrite(stream.fileno(), b"the end", SIZE - 7)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())  # filesystems may decide only now what they allocate
    return path


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk of the same size, without a hole, full of something else."""
    path = tmp_path / "full"
    with path.open("wb") as stream:
        for place in range(0, SIZE, len(FULL)):
            stream.write(FULL[: SIZE - place])
    yield path
    path.unlink()  # pytest keeps its folders for a while


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A disk of the same size that is one hole."""
    path = tmp_path / "empty"
    with path.open("wb") as stream:
        stream.truncate(SIZE)
    return path


def allocated(path: Path) -> int:
    """Bytes that the file takes on its filesystem, when all is written."""
    with path.open("r+b") as stream:
        os.fsync(stream.fileno())
    return path.stat().st_blocks * 512


def is_copy(image: Path, copy: Path) -> None:
    """Raise AssertionError unless it has the same bytes and is as sparse."""
    assert filecmp.cmp(image, copy, shallow=False)
    assert allocated(copy) <= allocated(image) + SLACK


def bytes_read(log: Path) -> int:
    """How much was asked for, as the log filter saw it."""
    counts = re.findall(r" Read id=\d+ offset=\w+ count=(\w+)", log.read_text())
    return sum(int(count, 16) for count in counts)


# -- qemu-img --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["empty", "full"])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_qemu_img_to_a_file(
    image: Path,
    kind: str,
    target: str,
    tmp_path: Path,
    serve: Serve,
    request: pytest.FixtureRequest,
) -> None:
    source = tmp_path / "source"
    support.run("qemu-img", "convert", "-f", "raw", "-O", kind, image, source)
    disk = request.getfixturevalue(target)
    uri = serve("file", disk).uri
    support.run("qemu-img", "convert", "-n", "-f", kind, "-O", "raw", source, uri)
    support.run("qemu-img", "compare", "-f", kind, "-F", "raw", source, uri)
    is_copy(image, disk)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_qemu_img_from_a_file(image: Path, kind: str, tmp_path: Path, serve: Serve) -> None:
    log, copy, back = tmp_path / "log", tmp_path / "copy", tmp_path / "back"
    uri = serve("-r", "--filter=log", "file", image, f"logfile={log}").uri
    support.run("qemu-img", "convert", "-f", "raw", "-O", kind, uri, copy)
    assert bytes_read(log) <= allocated(image) + SLACK
    support.run("qemu-img", "compare", "-f", "raw", "-F", kind, uri, copy)
    rounding = 0 if kind == "raw" else PIECES * CLUSTER
    assert allocated(copy) <= allocated(image) + rounding + SLACK
    support.run("qemu-img", "convert", "-f", kind, "-O", "raw", copy, back)
    is_copy(image, back)


@pytest.mark.parametrize(
    "words",
    [
        ("memory", str(SIZE)),
        ("data", "0", f"size={SIZE}"),
        ("--filter=cow", "file", "{full}"),
        ("--filter=cow", "file", "{full}", "cow-block-size=4096"),
    ],
    ids=["memory", "data", "cow", "cow, small blocks"],
)
def test_qemu_img_round_trip(
    image: Path, full: Path, words: tuple[str, ...], tmp_path: Path, serve: Serve
) -> None:
    """There and back: where the disk is not a file, it is as sparse all the same."""
    back, log = tmp_path / "back", tmp_path / "log"
    disk = [word.format(full=full) for word in words]
    uri = serve("--filter=log", *disk, f"logfile={log}").uri
    support.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
    support.run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri)
    before = bytes_read(log)
    support.run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, back)
    assert bytes_read(log) - before <= allocated(image) + PIECES * CLUSTER + SLACK
    is_copy(image, back)
    with full.open("rb") as stream:
        assert all(block == FULL[: len(block)] for block in iter(lambda: stream.read(1 << 20), b""))


def test_qemu_img_compare_sees_one_byte(image: Path, tmp_path: Path, serve: Serve) -> None:
    other = tmp_path / "other"
    support.run("cp", "--sparse=always", image, other)
    with other.open("r+b") as stream:
        os.pwrite(stream.fileno(), b"!", SIZE // 2)
    first, second = serve("-r", "file", image).uri, serve("-r", "file", other).uri
    words = ("qemu-img", "compare", "-f", "raw", "-F", "raw")
    assert support.run(*words, first, first).returncode == 0
    assert support.run(*words, first, second, check=False).returncode == 1


# -- nbdcopy ---------------------------------------------------------------------------------------

WAYS = [
    ("--connections=1", "--requests=1"),
    ("--connections=4", "--requests=64"),
    ("--synchronous",),
]


@pytest.mark.parametrize("options", WAYS, ids=" ".join)
@pytest.mark.parametrize("target", ["empty", "full"])
def test_nbdcopy_to_a_file(
    image: Path, target: str, options: tuple[str, ...], serve: Serve, request: pytest.FixtureRequest
) -> None:
    disk = request.getfixturevalue(target)
    support.run("nbdcopy", "--flush", *options, image, serve("file", disk).uri)
    is_copy(image, disk)


@pytest.mark.parametrize("options", WAYS, ids=" ".join)
def test_nbdcopy_from_a_file(
    image: Path, options: tuple[str, ...], tmp_path: Path, serve: Serve
) -> None:
    log, copy = tmp_path / "log", tmp_path / "copy"
    server = serve("-r", "--filter=log", "file", image, f"logfile={log}")
    support.run("nbdcopy", *options, server.uri, copy)
    # It reads 256 KiB at a time where a part of them is data, so more than the data; not all.
    assert bytes_read(log) < SIZE // 3
    is_copy(image, copy)


@pytest.mark.parametrize("through", ["memory", "cow"])
def test_nbdcopy_between_exports(
    image: Path, full: Path, empty: Path, through: str, serve: Serve
) -> None:
    """From a file to another disk, and from there to a file."""
    words = ("memory", str(SIZE)) if through == "memory" else ("--filter=cow", "file", full)
    middle = serve(*words).uri
    support.run("nbdcopy", serve("-r", "file", image).uri, middle)
    support.run("nbdcopy", middle, serve("file", empty).uri)
    is_copy(image, empty)


# -- where the holes are ---------------------------------------------------------------------------


def joined(pieces: Iterable[tuple[int, bool]]) -> Map:
    """(length, data) pieces as a Map."""
    found: Map = []
    place = 0
    for is_data, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
        length = sum(piece[0] for piece in group)
        found.append((place, length, is_data))
        place += length
    return found


def map_of_file(path: Path) -> Map:
    """What the filesystem says."""

    def pieces() -> Iterator[tuple[int, bool]]:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            end = 0
            while end < size:
                try:
                    data = os.lseek(stream.fileno(), end, os.SEEK_DATA)
                except OSError:  # ENXIO: a hole to the end
                    data = size
                if data > end:
                    yield data - end, False
                if data < size:
                    end = os.lseek(stream.fileno(), data, os.SEEK_HOLE)
                    yield end - data, True
                else:
                    end = size

    return joined(pieces())


def map_of_nbdinfo(uri: str) -> Map:
    entries = json.loads(support.run("nbdinfo", "--map", "--json", uri).stdout)
    assert {entry["type"] for entry in entries} <= {0, 3}
    return joined((entry["length"], entry["type"] == 0) for entry in entries)


def map_of_qemu(uri: str) -> Map:
    entries = json.loads(support.run("qemu-img", "map", "-f", "raw", "--output=json", uri).stdout)
    return joined((entry["length"], entry["data"]) for entry in entries)


@pytest.fixture
def riddled(tmp_path: Path) -> Path:
    """A file with more extents than are answered at once, and a hole at its end."""
    path = tmp_path / "riddled"
    rng = random.Random(4)
    with path.open("wb") as stream:
        place = 0
        for _ in range(2600):
            place += rng.randrange(1, 4) * 4096
            count = rng.randrange(1, 4) * 4096
            os.pwrite(stream.fileno(), b"x" * count, place)
            place += count
        stream.truncate(place + (1 << 20))
        os.fsync(stream.fileno())
    assert len(map_of_file(path)) > 4096
    return path


@pytest.mark.parametrize("which", ["image", "riddled", "empty", "full"])
def test_map(which: str, sockdir: Path, serve: Serve, request: pytest.FixtureRequest) -> None:
    """The filesystem, nbdinfo, QEMU, and nbdinfo with nbdkit on the same file, all say the same."""
    path = request.getfixturevalue(which)
    expected = map_of_file(path)
    uri = serve("-r", "file", path).uri
    assert map_of_nbdinfo(uri) == expected
    assert map_of_qemu(uri) == expected
    over = serve("--filter=cow", "file", path).uri
    assert map_of_nbdinfo(over) == expected
    peer_dir = sockdir / "peer"
    peer_dir.mkdir()
    with support.ServerProcess(
        peer_dir, ["-r", "file", path], (support.program("nbdkit"),)
    ) as peer:
        assert map_of_nbdinfo(peer.uri) == expected


def test_map_follows_writes(image: Path, full: Path, serve: Serve) -> None:
    """What is trimmed and written through the export shows in the answers, and in the file."""
    uri = serve("file", full).uri
    support.run(
        "qemu-io", "-f", "raw", "-c", "discard 1M 2M", "-c", "write -z -u 8M 1M",
        "-c", "write -P 5 2M 64k", uri,
    )  # fmt: skip
    expected = joined(
        [
            (1 << 20, True), (1 << 20, False), (65536, True), ((1 << 20) - 65536, False),
            (5 << 20, True), (1 << 20, False), (SIZE - (9 << 20), True),
        ]
    )  # fmt: skip
    assert map_of_nbdinfo(uri) == expected
    assert map_of_file(full) == expected
