"""Devices of plugins in C: for each callback that a plugin has, a method that calls it.

`device_class` makes a class with just these, so that `complete.py` fills the gaps as for every
other device. Calls are made by ctypes, which lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import os

from ..device import Device
from ..errors import OpenError
from ..flags import Flag
from ..heap import LARGE, keep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from ..device import Buffer
    from .library import Library
    from .structure import Structure

LONGEST: Final = (1 << 32) - (1 << 16)
"""The longest range that is asked for at once: lengths have 32 bits in C; aligned to any block."""
COPIED: Final = 16 << 10
"""Payloads of up to this many bytes are copied: that is quicker than to find out where they are."""
MAX_STRING: Final = 4096
"""The longest name or description that the protocol has, in bytes."""


class _Extent(ctypes.Structure):
    _fields_ = [
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("type", ctypes.c_uint32),
    ]


class NativeDevice(Device):
    """One connection's handle."""

    carries_fua: bool

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._targets: list[Any] = []
        self._read_target = self._write_target = self._fua_target = 0

    def _target(self, function: int, flags: int) -> int:
        """The address of a `struct target` (symbols.c): a function, our handle, the flags."""
        made = (ctypes.c_void_p * 3)(function, self._handle, flags)
        self._targets.append(made)
        return ctypes.addressof(made)

    def aim(self, read: int | None, write: int | None) -> None:
        """Have the targets of pread and pwrite ready, for the functions there are."""
        if read:
            self._read_target = self._target(read, 0)
        if write:
            self._write_target = self._target(write, 0)
            self._fua_target = self._target(write, Flag.FUA)


def device_class(name: str, plugin: Structure, library: Library) -> type[NativeDevice]:
    """The class for a plugin's devices."""
    maker = _Maker(name, plugin, library)
    read, write = maker.function("pread"), maker.function("pwrite")

    def __init__(device: NativeDevice, handle: int) -> None:
        NativeDevice.__init__(device, handle)
        device.aim(read, write)

    methods: dict[str, Any] = {"carries_fua": plugin.api_version >= 2, "__init__": __init__}
    for callback, make in _METHODS.items():
        found = maker.function(callback)
        if found is not None:
            methods[callback] = make(maker, callback, found)
    return type(f"NativeDevice_{name}", (NativeDevice,), methods)


class _Maker:
    """Makes methods out of callbacks."""

    def __init__(self, name: str, plugin: Structure, library: Library) -> None:
        self.name = name
        self.plugin = plugin
        self.library = library
        self.old = plugin.api_version < 2
        self.preserved = plugin.errno_is_preserved

    def function(self, callback: str) -> int | None:
        """The address of a callback; of version 1 plugins, for what has flags, the older one."""
        if callback in ("pread", "pwrite", "flush", "trim", "zero") and self.old:
            callback += "_1"
        found: int | None = getattr(self.plugin, callback)
        return found

    def call(self, callback: str, newer: str, older: str | None = None) -> Any:
        """The function of the library that calls a callback."""
        return getattr(self.library, older if self.old and older else newer)

    def failed(self, callback: str) -> OSError:
        """The error of a request that has just failed, in this thread."""
        number = self.library.error_of_call(self.preserved) or errno.EIO
        return OSError(number, os.strerror(number))

    def unanswered(self, callback: str) -> OpenError:
        """The error of a question that has just failed, in this thread: not to be served."""
        number = self.library.error_of_call(self.preserved)
        why = f": {os.strerror(number)}" if number else ""
        return OpenError(f"{self.name}: {callback} failed{why}")

    # -- the methods -----------------------------------------------------------------------------

    def get_size(self, callback: str, function: int) -> Callable[..., Any]:
        """A question that is answered by a size."""
        call = self.library.pynbdkit_get_size

        def get_size(device: NativeDevice) -> int:
            size: int = call(function, device._handle)
            if size < 0:
                if size < -1:
                    raise OpenError(f"{self.name}: get_size returned {size}, not 0 to 2**63 - 1")
                raise self.unanswered(callback)
            return size

        return get_size

    def question(self, callback: str, function: int) -> Callable[..., Any]:
        """A question that is answered by a number: negative is a failure."""
        call = self.library.pynbdkit_ask
        as_number = callback in ("can_fua", "can_cache")

        def ask(device: NativeDevice) -> int:
            answer: int = call(function, device._handle)
            if answer < 0:
                raise self.unanswered(callback)
            return answer if as_number else bool(answer)

        return ask

    def block_size(self, callback: str, function: int) -> Callable[..., Any]:
        """Three numbers."""
        call = self.library.pynbdkit_block_size

        def block_size(device: NativeDevice) -> tuple[int, int, int]:
            sizes = [ctypes.c_uint32() for _ in range(3)]
            if call(function, device._handle, *map(ctypes.byref, sizes)) < 0:
                raise self.unanswered(callback)
            minimum, preferred, maximum = (size.value for size in sizes)
            return minimum, preferred, maximum

        return block_size

    def export_description(self, callback: str, function: int) -> Callable[..., Any]:
        """A text; NULL is no failure here."""
        call = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(function)

        def export_description(device: NativeDevice) -> str | None:
            text: bytes | None = call(device._handle)
            if text is None or len(text) > MAX_STRING:
                return None
            return text.decode(errors="replace")

        return export_description

    def pread(self, callback: str, function: int) -> Callable[..., Any]:
        """The plugin fills a bytes object that nobody else has seen yet: so nothing is copied."""
        call = self.call(callback, "pynbdkit_pread", "pynbdkit_pread_1")

        def pread(device: NativeDevice, count: int, offset: int, flags: int) -> Buffer:
            if count >= LARGE:
                keep()
            data = bytes(count)
            if call(device._read_target, data, count, offset) < 0:
                raise self.failed(callback)
            return data

        return pread

    def pwrite(self, callback: str, function: int) -> Callable[..., Any]:
        """Write."""
        call = self.call(callback, "pynbdkit_pwrite", "pynbdkit_pwrite_1")
        at, first_of = ctypes.byref, ctypes.c_char.from_buffer

        def pwrite(device: NativeDevice, buf: Buffer, offset: int, flags: int) -> None:
            count = len(buf)
            data: Any = buf
            if type(buf) is not bytes:
                if count <= COPIED:
                    data = bytes(buf)
                else:
                    try:
                        data = at(first_of(buf))
                    except (TypeError, BufferError):  # read-only, as zeros are
                        data = bytes(buf)
            target = device._fua_target if flags else device._write_target
            if call(target, data, count, offset) < 0:
                raise self.failed(callback)

        return pwrite

    def flush(self, callback: str, function: int) -> Callable[..., Any]:
        """Flush."""
        call = self.call(callback, "pynbdkit_flush", "pynbdkit_flush_1")

        def flush(device: NativeDevice, flags: int = 0) -> None:
            if call(function, device._handle, 0) < 0:
                raise self.failed(callback)

        return flush

    def range(self, callback: str, function: int) -> Callable[..., Any]:
        """trim, zero, cache: a range, which may be longer than C can say."""
        older = None if callback == "cache" else f"pynbdkit_{callback}_1"
        call = self.call(callback, "pynbdkit_range", older)
        cannot_be_fast = self.old and callback == "zero"

        def on_range(device: NativeDevice, count: int, offset: int, flags: int) -> None:
            if cannot_be_fast and flags & Flag.FAST_ZERO:  # and cannot be told to
                raise OSError(errno.EOPNOTSUPP, "version 1 has no fast zero")
            while True:
                piece = min(count, LONGEST)
                if call(function, device._handle, piece, offset, flags) < 0:
                    raise self.failed(callback)
                count -= piece
                offset += piece
                if count <= 0:
                    return

        return on_range

    def extents(self, callback: str, function: int) -> Callable[..., Any]:
        """The plugin adds its extents to a list of the library's."""
        library = self.library
        call = library.pynbdkit_extents

        def extents(
            device: NativeDevice, count: int, offset: int, flags: int
        ) -> list[tuple[int, int, int]]:
            count = min(count, LONGEST)  # an answer may be for less than was asked
            found = library.nbdkit_extents_new(offset, offset + count)
            if not found:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            try:
                if call(function, device._handle, count, offset, flags, found) < 0:
                    raise self.failed(callback)
                number = library.nbdkit_extents_count(found)
                address = library.pynbdkit_extents_list(found)
                if not number:
                    raise OSError(errno.EINVAL, "the plugin has added no extent for the offset")
                entries = (_Extent * number).from_address(address)
                return [(entry.offset, entry.length, entry.type) for entry in entries]
            finally:
                library.nbdkit_extents_free(found)

        return extents

    def close(self, callback: str, function: int) -> Callable[..., Any]:
        """The end of a handle."""
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)

        def close(device: NativeDevice) -> None:
            call(device._handle)

        return close


_METHODS: Final[dict[str, Callable[[_Maker, str, int], Callable[..., Any]]]] = {
    "get_size": _Maker.get_size,
    "can_write": _Maker.question,
    "can_flush": _Maker.question,
    "is_rotational": _Maker.question,
    "can_trim": _Maker.question,
    "can_zero": _Maker.question,
    "can_fast_zero": _Maker.question,
    "can_extents": _Maker.question,
    "can_fua": _Maker.question,
    "can_multi_conn": _Maker.question,
    "can_cache": _Maker.question,
    "block_size": _Maker.block_size,
    "export_description": _Maker.export_description,
    "pread": _Maker.pread,
    "pwrite": _Maker.pwrite,
    "flush": _Maker.flush,
    "trim": _Maker.range,
    "zero": _Maker.range,
    "cache": _Maker.range,
    "extents": _Maker.extents,
    "close": _Maker.close,
}
