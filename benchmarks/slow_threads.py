"""A disk of which each call takes a while: a script, API version 2, for both servers' threads.

Parameters: `delay`, the seconds that a call takes; `size`. It reads as zeros; writes are forgotten.
"""

from __future__ import annotations

import time

import nbdkit

API_VERSION = 2

values = {"delay": "0.01", "size": "64M"}


def config(key: str, value: str) -> None:
    if key not in values:
        raise ValueError(f"unknown parameter {key}")
    values[key] = value


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL  # type: ignore[no-any-return]


def open(readonly: bool) -> object:
    return object()


def get_size(h: object) -> int:
    return nbdkit.parse_size(values["size"])  # type: ignore[no-any-return]


def pread(h: object, buf: bytearray, offset: int, flags: int) -> None:
    time.sleep(float(values["delay"]))
    buf[:] = bytes(len(buf))


def pwrite(h: object, buf: bytearray, offset: int, flags: int) -> None:
    time.sleep(float(values["delay"]))
