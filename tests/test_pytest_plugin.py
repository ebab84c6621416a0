"""The fixture that gives a test a disk, as somebody else's tests use it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pynbdkit import ConfigError, Device, LoadError, Plugin, Session
from pynbdkit.pytest_plugin import Disks
from raw import Raw
from support import run

MIB = 1 << 20


class Plain(Device):
    def get_size(self) -> int:
        return 512

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return b"p" * count


class Plug(Plugin):
    name = "plug"

    def open(self, session: Session) -> Device:
        return Plain()


def test_the_examples_of_the_docstring(nbd_disk: Disks, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    disks = [
        nbd_disk(size="1M"),
        nbd_disk("file", file=str(tmp_path / "disk.img")),
        nbd_disk(Plug(), filters=["nozero"]),
    ]
    sizes = [run("nbdinfo", "--size", disk.uri).stdout.strip() for disk in disks]
    assert sizes == [str(MIB), "4096", "512"]


def test_a_disk_without_a_word_is_a_ram_disk(nbd_disk: Disks, connect: Callable[..., Any]) -> None:
    client = connect(nbd_disk())
    assert client.get_size() == MIB
    client.pwrite(b"hello", 5)
    assert client.pread(5, 5) == b"hello"


def test_values_are_made_texts(
    nbd_disk: Disks, tmp_path: Path, connect: Callable[..., Any]
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1024))
    assert connect(nbd_disk(size=4096)).get_size() == 4096
    assert connect(nbd_disk("file", file=image)).get_size() == 1024
    assert connect(nbd_disk(Plain(), readonly=True)).is_read_only()
    assert connect(nbd_disk(Plain)).get_size() == 512
    assert connect(nbd_disk(Plug())).get_size() == 512


def test_mistakes_are_told(nbd_disk: Disks) -> None:
    with pytest.raises(LoadError, match="nosuch"):
        nbd_disk("nosuch")
    with pytest.raises(ConfigError, match="colour"):
        nbd_disk(colour="red")
    with pytest.raises(ConfigError, match="file"):
        nbd_disk("file")


def test_every_disk_is_stopped(nbd_disk: Disks) -> None:
    disks = Disks()
    threads = threading.active_count()
    servers = [disks(), disks(Plain), disks("memory", size="2M")]
    assert threading.active_count() > threads
    disks.stop()
    disks.stop()
    assert threading.active_count() == threads
    assert not any(os.path.exists(server.socket or "") for server in servers)


def test_a_disk_may_be_stopped_by_the_test_itself(nbd_disk: Disks) -> None:
    disk = nbd_disk()
    assert disk.socket is not None
    with Raw(disk.socket) as client:
        disk.stop()
        assert client.at_end()


def test_it_comes_with_the_package(tmp_path: Path) -> None:
    """No conftest, no import: pytest finds it; and it is loaded for others' tests in no time."""
    (tmp_path / "test_theirs.py").write_text(
        "import socket, sys\n"
        "kept = []\n"
        "def test_that_uses_no_disk():\n"
        "    assert 'pynbdkit.server.server' not in sys.modules\n"
        "def test_with_a_disk(nbd_disk):\n"
        "    disk = nbd_disk(size='1M')\n"
        "    kept.append(disk.socket)\n"
        "    with socket.socket(socket.AF_UNIX) as client:\n"
        "        client.connect(disk.socket)\n"
        "        assert client.recv(8) == b'NBDMAGIC'\n"
        "def test_afterwards_it_is_gone():\n"
        "    import os\n"
        "    assert not os.path.exists(kept[0])\n"
        "def test_that_fails_with_a_client(nbd_disk):\n"
        "    kept.append(socket.socket(socket.AF_UNIX))\n"
        "    kept[-1].connect(nbd_disk().socket)\n"
        "    assert False\n"
    )
    words: Sequence[str] = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    done = subprocess.run(
        [*words, "test_theirs.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "3 passed" in done.stdout, done.stdout
    assert "1 failed" in done.stdout
    assert done.returncode == 1
    shown = run(*words, "--fixtures", tmp_path / "test_theirs.py").stdout
    assert "nbd_disk" in shown
