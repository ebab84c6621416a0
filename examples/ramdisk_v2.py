#!/usr/bin/env -S pynbdkit python
"""Sparse disks in memory, one an export, as a script of API version 2.

pynbdkit examples/ramdisk_v2.py size=64M disk=system disk=data
nbdkit python examples/ramdisk_v2.py size=64M disk=system disk=data
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import nbdkit

API_VERSION = 2

BLOCK = 65536
Blocks = dict[int, bytearray]

size = 0
disks: dict[str, Blocks] = {}


def config(key: str, value: str) -> None:
    global size
    if key == "size":
        size = nbdkit.parse_size(value)
    elif key == "disk":
        disks[value] = {}
    else:
        raise RuntimeError(f"unknown parameter {key!r} (size=SIZE, disk=NAME)")


def config_complete() -> None:
    if not size or size % BLOCK:
        raise RuntimeError(f"size=SIZE is missing, or not a multiple of {BLOCK}")
    if not disks:
        disks[""] = {}


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return [(name, f"a disk of {size} bytes") for name in disks]


def default_export(readonly: bool, is_tls: bool) -> str:
    return next(iter(disks))


def open(readonly: bool) -> Blocks:
    name: str = nbdkit.export_name()
    if name not in disks:
        nbdkit.set_error(errno.ENOENT)
        raise RuntimeError(f"no disk {name!r}")
    nbdkit.debug(f"serving {name!r}")
    return disks[name]


def get_size(h: Blocks) -> int:
    return size


def block_size(h: Blocks) -> tuple[int, int, int]:
    return 1, BLOCK, 32 << 20


def can_multi_conn(h: Blocks) -> bool:
    return True  # all clients of an export share its blocks


def can_fua(h: Blocks) -> int:
    native: int = nbdkit.FUA_NATIVE
    return native  # memory is as stable as it gets


def can_fast_zero(h: Blocks) -> bool:
    return True


def pieces(offset: int, count: int) -> Iterator[tuple[int, slice, slice]]:
    """(block's number, part of the block, part of the request)."""
    done = 0
    while done < count:
        number, start = divmod(offset + done, BLOCK)
        length = min(BLOCK - start, count - done)
        yield number, slice(start, start + length), slice(done, done + length)
        done += length


def pread(h: Blocks, buf: memoryview, offset: int, flags: int) -> None:
    for number, inside, part in pieces(offset, len(buf)):
        block = h.get(number)
        buf[part] = block[inside] if block is not None else bytes(part.stop - part.start)


def pwrite(h: Blocks, buf: memoryview, offset: int, flags: int) -> None:
    for number, inside, part in pieces(offset, len(buf)):
        h.setdefault(number, bytearray(BLOCK))[inside] = buf[part]


def flush(h: Blocks, flags: int) -> None:
    pass


def trim(h: Blocks, count: int, offset: int, flags: int) -> None:
    zero(h, count, offset, flags | nbdkit.FLAG_MAY_TRIM)


def zero(h: Blocks, count: int, offset: int, flags: int) -> None:
    for number, inside, part in pieces(offset, count):
        if flags & nbdkit.FLAG_MAY_TRIM and part.stop - part.start == BLOCK:
            h.pop(number, None)
        elif flags & nbdkit.FLAG_MAY_TRIM == 0 or number in h:
            h.setdefault(number, bytearray(BLOCK))[inside] = bytes(part.stop - part.start)


def cache(h: Blocks, count: int, offset: int, flags: int) -> None:
    pass  # it is all in memory


def can_cache(h: Blocks) -> int:
    native: int = nbdkit.CACHE_NATIVE
    return native


def extents(h: Blocks, count: int, offset: int, flags: int) -> Iterator[tuple[int, int, int]]:
    for number, inside, part in pieces(offset, count):
        hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
        yield number * BLOCK + inside.start, part.stop - part.start, 0 if number in h else hole
