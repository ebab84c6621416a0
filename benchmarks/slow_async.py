"""A disk of which each call takes a while, native. Parameters as in slow_threads.py."""

from __future__ import annotations

import time

from pynbdkit import Device, Plugin, Session, parameters


class Slow(Plugin):
    delay = parameters.text("Seconds that a call takes", default="0.01")
    size = parameters.size("Size of the disk", default=64 << 20)

    def open(self, session: Session) -> Device:
        return SlowDevice(self.size, float(self.delay))


class SlowDevice(Device):
    blocking = True

    def __init__(self, size: int, delay: float) -> None:
        self.size = size
        self.delay = delay

    def get_size(self) -> int:
        return self.size

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        time.sleep(self.delay)
        return bytes(count)

    def pwrite(self, buf: object, offset: int, flags: int) -> None:
        time.sleep(self.delay)
