"""fallocate(2): what it does to a real file, and the errno when it cannot."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pynbdkit.fallocate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate


def test_punch_and_zero(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    fd = os.open(path, os.O_RDWR)
    try:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 65536, 65536)
        try:
            fallocate(fd, ZERO_RANGE, 262144, 4096)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # this filesystem has it not
                raise
            os.pwrite(fd, bytes(4096), 262144)
        os.fsync(fd)
    finally:
        os.close(fd)
    data = path.read_bytes()
    expected = bytearray(b"x" * (1 << 20))
    expected[65536:131072] = bytes(65536)
    expected[262144:266240] = bytes(4096)
    assert data == expected


def test_beyond_4_gib(tmp_path: Path) -> None:
    """Offsets have 64 bits."""
    with (tmp_path / "file").open("w+b") as file:
        fallocate(file.fileno(), 0, 5 << 30, 4096)
        assert os.fstat(file.fileno()).st_size == (5 << 30) + 4096


def test_errors() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        fallocate(-1, 0, 0, 1)
