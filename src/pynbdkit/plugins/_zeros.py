"""Zeros to read: one shared buffer, so that a read of nothing costs nothing."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from ..device import Buffer

SHARED: Final = 1 << 20
_shared: list[memoryview] = []


def zeros(count: int) -> Buffer:
    """`count` zero bytes that must not be changed; up to 1 MiB without a copy."""
    if count > SHARED:
        return bytes(count)
    if not _shared:
        _shared.append(memoryview(bytes(SHARED)))
    return _shared[0][:count]
