"""The overlay's file and its holds: what waits for what, and how a failure is remembered."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbdkit.filters import _overlay
from pynbdkit.filters._overlay import Overlay, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path))
    yield store
    store.close()


def test_the_file_has_no_name(tmp_path: Path, store: Store) -> None:
    assert not list(tmp_path.iterdir())
    assert os.fstat(store.fd).st_nlink == 0


def test_without_o_tmpfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that has it not gets an ordinary file, unlinked at once."""
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    store = Store(str(tmp_path))
    store.write([b"data"], 10, False)
    assert store.read(4, 10) == b"data"
    assert not list(tmp_path.iterdir())
    store.close()


def test_a_write_in_pieces_is_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may take less than it was given."""
    real = os.pwritev
    calls: list[int] = []

    def less(fd: int, parts: list[bytes], position: int, flags: int = 0) -> int:
        calls.append(flags)
        return real(fd, [b"".join(map(bytes, parts))[:5]], position)

    monkeypatch.setattr(os, "pwritev", less)
    store.write([b"abc", memoryview(b"defghij"), b"klm"], 7, True)
    assert store.read(13, 7) == b"abcdefghijklm"
    assert calls == [os.RWF_DSYNC] * 3


def test_a_file_that_was_cut_off_is_an_error(store: Store) -> None:
    store.write([b"x" * 100], 0, False)
    with pytest.raises(OSError, match="cut off"):
        store.read(101, 0)


def test_a_failed_sync_is_never_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    store.sync()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="no space left"):
            store.sync()
    with pytest.raises(OSError, match="an earlier flush") as caught:
        store.sync()
    assert caught.value.errno == errno.ENOSPC


def test_a_failed_stable_write_fails_later_flushes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, parts: list[bytes], position: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, "bad disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(OSError, match="bad disk"):
            store.write([b"x"], 0, True)
    with pytest.raises(OSError, match="an earlier flush"):
        store.sync()


def test_an_fallocate_mode_that_is_not_there_is_asked_for_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def refuse(fd: int, mode: int, offset: int, count: int) -> None:
        calls.append(mode)
        raise OSError(errno.EOPNOTSUPP, "no such mode")

    monkeypatch.setattr(_overlay, "fallocate", refuse)
    assert not store.allocate(16, 4096, 0)
    assert not store.allocate(16, 4096, 0)
    assert not store.allocate(3, 4096, 0)
    assert calls == [16, 3]


def test_pieces_lie_in_one_region_each(store: Store) -> None:
    overlay = Overlay(store, 1 << 40, 16)
    region = 1 << 28
    assert list(overlay.pieces(10, region - 10)) == [(10, region - 10)]
    assert list(overlay.pieces(2 * region, region - 1)) == [
        (1, region - 1),
        (region, region),
        (region - 1, 2 * region),
    ]
    assert list(overlay.pieces(0, 5)) == []


def test_regions_are_laid_side_by_side(store: Store) -> None:
    """A place far out on the disk is not far out in the file."""
    overlay = Overlay(store, (1 << 63) - 1, 16)
    for offset in (1 << 62, 0, 1 << 50):
        overlay.write([b"x" * 65536], offset)
    assert os.fstat(store.fd).st_size == (2 << 28) + 65536
    other = Overlay(store, 1 << 20, 16)
    other.write([b"y" * 65536], 0)
    assert overlay.read(65536, 1 << 62) == b"x" * 65536
    assert other.read(65536, 0) == b"y" * 65536


def test_holds_that_overlap_wait_in_their_order(store: Store) -> None:
    overlay = Overlay(store, 1 << 30, 16)
    order: list[str] = []
    first = overlay.hold(0, 9)
    waiting = []
    for name, low, high in (("a", 5, 15), ("b", 10, 20), ("c", 9, 9)):

        def work(name: str = name, low: int = low, high: int = high) -> None:
            hold = overlay.hold(low, high)
            order.append(name)
            overlay.release(hold)

        thread = threading.Thread(target=work)
        waiting.append(thread)
        before = len(overlay._held)
        thread.start()
        while len(overlay._held) == before:
            pass
    free = overlay.hold(30, 40)  # waits for nobody
    overlay.release(free)
    assert order == []  # b does not overlap what is held, but a, which came before it
    overlay.release(first)
    for thread in waiting:
        thread.join()
    assert order.index("a") < order.index("b")
    assert order.index("a") < order.index("c")
    assert not overlay._held


@pytest.mark.parametrize(
    ("first", "last", "waits"),
    [(0, 4, False), (0, 5, True), (5, 9, True), (6, 7, True), (9, 12, True), (10, 12, False)],
)
def test_only_holds_that_overlap_wait(store: Store, first: int, last: int, waits: bool) -> None:
    overlay = Overlay(store, 1 << 30, 16)
    overlay._held += [_overlay._Hold(5, 9), _overlay._Hold(first, last)]
    assert overlay._is_first(overlay._held[0])
    assert overlay._is_first(overlay._held[1]) != waits
