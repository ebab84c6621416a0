"""pattern: each 8 bytes are their own offset, 64 bits big endian (nbdkit-pattern-plugin(1)).

Within an aligned block of 64 KiB the upper six bytes of all words are the same and the lower two
are the same as in every other block. So a block is a copy of a template, with a strided assignment
for each upper byte that is not zero: no loop over words.
"""

from __future__ import annotations

from .. import parameters
from ..device import Device
from ..plugin import Plugin
from ._fixed import FixedDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from ..device import Buffer
    from ..session import Session

BLOCK: Final = 1 << 16
_template: list[bytes] = []


def _block_template() -> bytes:
    if not _template:
        _template.append(b"".join(word.to_bytes(8, "big") for word in range(0, BLOCK, 8)))
    return _template[0]


def pattern(count: int, offset: int) -> memoryview:
    """The pattern's `count` bytes from `offset` on."""
    template = _block_template()
    start = offset & ~7
    end = (offset + count + 7) & ~7
    result = bytearray(end - start)
    position = start
    while position < end:
        first = position & (BLOCK - 1)
        last = min(BLOCK, first + end - position)
        piece = bytearray(template[first:last])
        words = (last - first) // 8
        for index, byte in enumerate(position.to_bytes(8, "big")[:6]):
            if byte:
                piece[index::8] = bytes((byte,)) * words
        result[position - start : position - start + len(piece)] = piece
        position += len(piece)
    skip = offset - start
    return memoryview(result)[skip : skip + count]


class PatternPlugin(Plugin):
    """A read-only disk whose content says where it is from."""

    name = "pattern"
    longname = "nbdkit pattern plugin"
    description = "A read-only disk with a fixed pattern: every 8 bytes are their own offset"
    blocking = False
    forkable = True

    size = parameters.size("Size of the disk", required=True, magic=True)

    def open(self, session: Session) -> Device:
        """A device without any state."""
        return PatternDevice(self.size)


class PatternDevice(FixedDevice):
    """The pattern, read-only."""

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """The pattern at this place."""
        return pattern(count, offset)
