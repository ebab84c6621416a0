"""The script plugin of the comparison: a disk in a bytearray, API version 2.

The same file runs under nbdkit's python plugin and under pynbdkit, so what differs is the server.
"""

from __future__ import annotations

import nbdkit

API_VERSION = 2

disk = bytearray()


def config(key: str, value: str) -> None:
    global disk
    if key != "size":
        raise ValueError(f"unknown parameter {key}")
    disk = bytearray(nbdkit.parse_size(value))


def open(readonly: bool) -> object:
    return object()


def get_size(h: object) -> int:
    return len(disk)


def pread(h: object, buf: bytearray, offset: int, flags: int) -> None:
    end = offset + len(buf)
    buf[:] = disk[offset:end]


def pwrite(h: object, buf: bytearray, offset: int, flags: int) -> None:
    end = offset + len(buf)
    disk[offset:end] = buf
