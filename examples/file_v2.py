#!/usr/bin/env -S pynbdkit python
"""A disk in a file, with FUA of its own: the script of a dozen lines, grown up a little.

pynbdkit examples/file_v2.py file=disk.img
nbdkit python examples/file_v2.py file=disk.img
"""

from __future__ import annotations

import errno
import os

import nbdkit

API_VERSION = 2

path = ""


def config(key: str, value: str) -> None:
    global path
    if key != "file":
        raise RuntimeError(f"unknown parameter {key!r} (file=PATH)")
    path = os.path.abspath(value)  # a server in the background changes to "/"


def config_complete() -> None:
    if not path:
        raise RuntimeError("file=PATH is missing")


def thread_model() -> int:
    parallel: int = nbdkit.THREAD_MODEL_PARALLEL
    return parallel  # preadv and pwritev need no lock


def open(readonly: bool) -> int:
    return os.open(path, os.O_RDONLY if readonly else os.O_RDWR)


def close(h: int) -> None:
    os.close(h)


def get_size(h: int) -> int:
    return os.fstat(h).st_size


def can_multi_conn(h: int) -> bool:
    return True


def can_fua(h: int) -> int:
    native: int = nbdkit.FUA_NATIVE
    return native


def pread(h: int, buf: memoryview, offset: int, flags: int) -> None:
    while buf:
        count = os.preadv(h, [buf], offset)
        if not count:
            raise RuntimeError("the file is shorter than it was")
        buf, offset = buf[count:], offset + count


def pwrite(h: int, buf: memoryview, offset: int, flags: int) -> None:
    stable = os.RWF_DSYNC if flags & nbdkit.FLAG_FUA else 0
    try:
        while buf:
            count = os.pwritev(h, [buf], offset, stable)
            buf, offset = buf[count:], offset + count
    except OSError as error:
        nbdkit.set_error(error.errno or errno.EIO)  # so that the client learns of a full disk
        raise


def flush(h: int, flags: int) -> None:
    os.fdatasync(h)
