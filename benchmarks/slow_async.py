"""A disk of zeros whose every request takes a while: coroutines, on one event loop.

A script of API version 2. Parameters: size= (bytes, default 1G), delay= (seconds, default 0.010).
`slow_threads.py` is the same with calls that block a thread.
"""

from __future__ import annotations

import asyncio

import nbdkit

API_VERSION = 2

size = 1 << 30
delay = 0.010


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    global size, delay
    if key == "size":
        size = nbdkit.parse_size(value)
    elif key == "delay":
        delay = float(value)
    else:
        raise ValueError(f"unknown parameter {key}")


def open(readonly: bool) -> object:
    return object()


def get_size(h: object) -> int:
    return size


async def pread(h: object, buf: bytearray, offset: int, flags: int) -> None:
    await asyncio.sleep(delay)


async def pwrite(h: object, buf: bytearray, offset: int, flags: int) -> None:
    await asyncio.sleep(delay)
