"""What a shared object says it needs, read from the file (elf(5)).

The loader knows it too, but tells it by no function that every C library has.
"""

from __future__ import annotations

import mmap
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_LOAD: Final = 1
_DYNAMIC: Final = 2
_NEEDED: Final = 1
_STRINGS: Final = 5


def needed(path: str) -> list[str]:
    """The names of the libraries that a file is linked with; [] for what is no shared object.

    Raises OSError where the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
                return _needed(content)
        except (ValueError, IndexError, struct.error):  # an empty file, or one that is cut off
            return []


def _needed(content: mmap.mmap) -> list[str]:
    if content[:4] != b"\x7fELF":
        return []
    order = "<" if content[5] == 1 else ">"
    wide = content[4] == 2
    # Of the header: where the program headers are, the size of one, their number.
    (table,) = struct.unpack_from(order + ("Q" if wide else "I"), content, 32 if wide else 28)
    size, number = struct.unpack_from(order + "HH", content, 54 if wide else 42)
    loads = []
    dynamic = None
    for at in range(table, table + size * number, size or 1):
        if wide:
            kind, _, offset, address, _, length = struct.unpack_from(order + "IIQQQQ", content, at)
        else:
            kind, offset, address, _, length = struct.unpack_from(order + "IIIII", content, at)
        if kind == _LOAD:
            loads.append((address, offset, length))
        elif kind == _DYNAMIC:
            dynamic = (offset, length)
    if dynamic is None:
        return []
    entry = struct.Struct(order + ("qQ" if wide else "iI"))
    names, strings = [], None
    for at in range(dynamic[0], sum(dynamic) - entry.size + 1, entry.size):
        tag, value = entry.unpack_from(content, at)
        if tag == 0:
            break
        if tag == _NEEDED:
            names.append(value)
        elif tag == _STRINGS:
            strings = value
    for address, offset, length in loads:
        if strings is not None and address <= strings < address + length:
            start = strings - address + offset
            return [_text(content, start + name) for name in names]
    return []


def _text(content: mmap.mmap, at: int) -> str:
    end = content.find(b"\0", at)
    return content[at:end].decode(errors="surrogateescape") if end > at else ""
