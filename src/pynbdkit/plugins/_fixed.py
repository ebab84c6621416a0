"""What disks without any state have in common: a size, and that every connection sees the same."""

from __future__ import annotations

from ..device import Device
from ..flags import CacheMode


class FixedDevice(Device):
    """A disk of `size` bytes whose content no client can change."""

    def __init__(self, size: int) -> None:
        self._size = size

    def get_size(self) -> int:
        """As configured."""
        return self._size

    def can_multi_conn(self) -> bool:
        """All connections see the same."""
        return True

    def can_cache(self) -> int:
        """There is nothing to prefetch."""
        return CacheMode.NATIVE

    def cache(self, count: int, offset: int, flags: int) -> None:
        """Nothing to do."""
