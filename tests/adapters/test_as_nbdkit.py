"""The same scripts under nbdkit and here: what the script is called with, what the client gets."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import support
from command import wait_for_file

EXAMPLES = support.ROOT / "examples"
REGION = 4096
ERRNOS = (
    errno.EPERM,
    errno.EIO,
    errno.ENOMEM,
    errno.EINVAL,
    errno.ENOSPC,
    errno.EROFS,
    errno.EFBIG,
    errno.EDQUOT,
    errno.ESHUTDOWN,
    0,
)
"""What set_error is told. Not compared: ENOTSUP, after which the peer ends in an assertion when the
zeros that it writes instead fail in the same way; and errnos that the protocol does not know, which
are EINVAL there and EIO here (the contract)."""
ODD = (
    'raise OSError(errno.ENOSPC, "full")',
    "nbdkit.set_error(errno.ENOMEM)",
    'raise ValueError("after a set_error that was not needed")',
    "raise SystemExit(4)",
    "raise MemoryError",
    "nothing()",
    'nbdkit.set_error("text")',
    "try:\n            nbdkit.set_error(errno.EPERM)\n            raise KeyError\n"
    "        except KeyError:\n            raise RuntimeError",
)
REGIONS = len(ERRNOS) + len(ODD) + 1
HEAD = """
import errno, nbdkit

log = None
def config(key, value):
    global log
    log = __builtins__["open"](value, "a") if isinstance(__builtins__, dict) else \\
        __builtins__.open(value, "a")

def told(*event):
    print(repr(tuple(shown(e) for e in event)), file=log, flush=True)

def shown(value):
    if isinstance(value, memoryview):
        data = bytes(value[:4]) if value.readonly else ""  # the peer's may hold anything
        return f"memoryview {value.format} {value.ndim} {data}"
    return value

def open(readonly):
    told("open", readonly, nbdkit.export_name())
    return ["handle"]

def close(h):
    told("close", h)

def get_size(h):
    return SIZE

def behave(offset):
    region = offset // REGION
    if region < len(ERRNOS):
        nbdkit.set_error(ERRNOS[region])
        raise RuntimeError("told to fail")
"""
BODY_1 = """
def pread(h, count, offset):
    told("pread", h, count, offset)
    behave(offset)
    return bytearray(b"abcdefgh" * (count // 8) + b"more")
def pwrite(h, buf, offset):
    told("pwrite", h, buf, offset)
    behave(offset)
def flush(h):
    told("flush", h)
def trim(h, count, offset):
    told("trim", h, count, offset)
    behave(offset)
def zero(h, count, offset, may_trim):
    told("zero", h, count, offset, may_trim)
    behave(offset)
"""
BODY_2 = """
API_VERSION = 2
def pread(h, buf, offset, flags):
    told("pread", h, buf, len(buf), offset, flags)
    behave(offset)
    buf[:] = b"abcdefgh" * (len(buf) // 8)
    return "something"
def pwrite(h, buf, offset, flags):
    told("pwrite", h, buf, len(buf), offset, flags)
    behave(offset)
    return 0
def flush(h, flags):
    told("flush", h, flags)
def trim(h, count, offset, flags):
    told("trim", h, count, offset, flags)
    behave(offset)
def zero(h, count, offset, flags):
    told("zero", h, count, offset, flags)
    behave(offset)
def cache(h, count, offset, flags):
    told("cache", h, count, offset, flags)
    behave(offset)
def can_cache(h):
    return nbdkit.CACHE_NATIVE
def extents(h, count, offset, flags):
    told("extents", h, count, offset, flags)
    behave(offset)
    half = offset + count // 2
    both = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    return iter([(offset, count // 2, nbdkit.EXTENT_HOLE), (half, count // 2, both)])
def can_fua(h):
    return nbdkit.FUA_NATIVE
def can_fast_zero(h):
    return True
def block_size(h):
    return 1, 4096, 0xffffffff
def export_description(h):
    return "a description"
"""


def script(version: int) -> str:
    odd = "".join(
        f"    if region == {len(ERRNOS) + number}:\n        {text}\n"
        for number, text in enumerate(ODD)
    )
    constants = f"SIZE, REGION, ERRNOS = {REGIONS * REGION}, {REGION}, {ERRNOS!r}\n"
    return constants + HEAD + odd + (BODY_1 if version == 1 else BODY_2)


@contextmanager
def server(kind: str, folder: Path, *arguments: str | Path) -> Iterator[support.ServerProcess]:
    """The script under nbdkit or under us."""
    folder.mkdir()
    if kind == "nbdkit":
        command = [support.program("nbdkit")]
    else:
        command = [sys.executable, "-m", "pynbdkit"]
    with support.ServerProcess(folder, ["python", *arguments], command) as running:
        yield running


def requests(nbd: Any, h: Any, version: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every request, at every region: (name, how to make it)."""
    fua, no_hole, fast = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO
    for number in range(REGIONS):
        at = number * REGION
        data = bytes([number + 1]) * 512
        extents: list[object] = []

        def status(context: str, offset: int, entries: list[int], error: Any) -> int:
            extents.append((context, offset, tuple(entries)))  # noqa: B023 (called at once)
            return 0

        yield f"pread {number}", lambda at=at: bytes(h.pread(512, at))  # type: ignore[misc]
        yield f"pwrite {number}", lambda at=at, d=data: h.pwrite(d, at)  # type: ignore[misc]
        yield f"trim {number}", lambda at=at: h.trim(512, at)  # type: ignore[misc]
        yield f"zero {number}", lambda at=at: h.zero(512, at)  # type: ignore[misc]
        yield f"zero no hole {number}", lambda at=at: h.zero(512, at, no_hole)  # type: ignore[misc]
        if version == 2:
            yield f"pwrite fua {number}", lambda at=at, d=data: h.pwrite(d, at, fua)  # type: ignore[misc]
            yield f"trim fua {number}", lambda at=at: h.trim(512, at, fua)  # type: ignore[misc]
            yield f"zero fua {number}", lambda at=at: h.zero(512, at, fua)  # type: ignore[misc]
            yield f"zero fast {number}", lambda at=at: h.zero(512, at, fast)  # type: ignore[misc]
            yield f"cache {number}", lambda at=at: h.cache(512, at)  # type: ignore[misc]
            yield (
                f"extents {number}",
                lambda at=at, found=extents: (h.block_status(512, at, status), tuple(found)),  # type: ignore[misc]
            )
    yield "flush", h.flush


@pytest.mark.parametrize("version", [1, 2])
def test_every_request_and_every_error(
    nbd: Any, connect: Callable[..., Any], sockdir: Path, version: int
) -> None:
    (sockdir / "disk.py").write_text(script(version))
    outcomes: dict[str, dict[str, object]] = {}
    events: dict[str, list[str]] = {}
    offers: dict[str, object] = {}
    for kind in ("nbdkit", "pynbdkit"):
        told = sockdir / f"{kind}.events"
        with server(kind, sockdir / kind, sockdir / "disk.py", f"log={told}") as running:
            h = connect(running, strict=False)
            outcome = outcomes[kind] = {}
            for name, request in requests(nbd, h, version):
                try:
                    outcome[name] = request()
                except nbd.Error as error:
                    outcome[name] = errno.errorcode[error.errnum]
            offers[kind] = (
                h.get_size(),
                h.is_read_only(),
                h.can_flush(),
                h.can_trim(),
                h.can_zero(),
                version == 1 or (h.can_fua(), h.can_fast_zero(), h.can_cache()),
                h.can_multi_conn(),
                h.get_block_size(nbd.SIZE_MAXIMUM),
            )
            h.shutdown()
            wait_for_file(told, "'close'")  # nbdkit, told to stop too early, leaves it out
        events[kind] = told.read_text().splitlines()
        assert "Traceback" in running.log()
    assert offers["pynbdkit"] == offers["nbdkit"]
    assert outcomes["pynbdkit"] == outcomes["nbdkit"]
    assert events["pynbdkit"] == events["nbdkit"]
    assert len(events["pynbdkit"]) > 4 * REGIONS


@pytest.mark.parametrize(
    ("example", "parameters"),
    [
        ("ramdisk_v1.py", ("size=1M",)),
        ("ramdisk_v2.py", ("size=1M", "disk=first", "disk=second")),
        ("file_v2.py", ("file=disk.img",)),
    ],
)
def test_the_examples(
    nbd: Any,
    connect: Callable[..., Any],
    sockdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    example: str,
    parameters: tuple[str, ...],
) -> None:
    monkeypatch.chdir(sockdir)
    seen = {}
    for kind in ("nbdkit", "pynbdkit"):
        Path("disk.img").write_bytes(b"old" * 349525 + b"!")
        with server(kind, sockdir / kind, EXAMPLES / example, *parameters) as running:
            h = connect(running)
            h.pwrite(b"a" * 70_000, 65_000, nbd.CMD_FLAG_FUA if h.can_fua() else 0)
            h.zero(300, 70_000)
            h.zero(300, 80_000, nbd.CMD_FLAG_NO_HOLE)
            if h.can_trim():
                h.trim(65_536, 65_536)
            h.flush()
            extents: list[tuple[int, ...]] = []
            h.block_status(
                1 << 20, 0, lambda name, offset, entries, error, e=extents: e.append((*entries,))
            )
            info = support.run("nbdinfo", "--list", running.uri).stdout.replace(kind, "")
            # The peer offers fast zero where there is no zero at all; the contract does not.
            info = "".join(line for line in info.splitlines(True) if "can_fast_zero" not in line)
            seen[kind] = (bytes(h.pread(1 << 20, 0)), extents, info)
            h.shutdown()
    assert seen["pynbdkit"][0] == seen["nbdkit"][0]
    assert seen["pynbdkit"][1:] == seen["nbdkit"][1:]
