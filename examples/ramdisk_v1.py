#!/usr/bin/env -S pynbdkit python
"""A disk in memory, as a script of API version 1 (a script that says nothing is version 1).

pynbdkit examples/ramdisk_v1.py size=64M
nbdkit python examples/ramdisk_v1.py size=64M
"""

from __future__ import annotations

import errno

import nbdkit

disk = bytearray()


def config(key: str, value: str) -> None:
    global disk
    if key != "size":
        raise RuntimeError(f"unknown parameter {key!r} (size=SIZE)")
    disk = bytearray(nbdkit.parse_size(value))


def config_complete() -> None:
    if not disk:
        raise RuntimeError("size=SIZE is missing")


def open(readonly: bool) -> int:
    return 1


def get_size(h: int) -> int:
    return len(disk)


def pread(h: int, count: int, offset: int) -> bytearray:
    return disk[offset : offset + count]


def pwrite(h: int, buf: memoryview, offset: int) -> None:
    disk[offset : offset + len(buf)] = buf


def flush(h: int) -> None:
    pass  # memory is as stable as it gets


def trim(h: int, count: int, offset: int) -> None:
    disk[offset : offset + count] = bytes(count)


def zero(h: int, count: int, offset: int, may_trim: bool) -> None:
    if may_trim:
        trim(h, count, offset)
    else:
        nbdkit.set_error(errno.EOPNOTSUPP)  # then the server writes zeros
        raise RuntimeError("nothing is gained by zeroing here")
