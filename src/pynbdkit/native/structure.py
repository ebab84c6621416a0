"""The structure that a plugin in C hands over: `struct nbdkit_plugin`, of any size and version.

The layout is that of nbdkit-plugin.h. Fields were only ever added at the end, and the structure
says its own size, so what an older header did not have is simply not there: `read` copies no more
than the plugin has, and leaves the rest NULL.
"""

from __future__ import annotations

import ctypes

from ..errors import LoadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

VERSIONS: Final = (1, 2)

_TEXTS: Final = frozenset(
    ("name", "longname", "version", "description", "config_help", "magic_config_key")
)
_ORDER: Final = (
    "name",
    "longname",
    "version",
    "description",
    "load",
    "unload",
    "config",
    "config_complete",
    "config_help",
    "open",
    "close",
    "get_size",
    "can_write",
    "can_flush",
    "is_rotational",
    "can_trim",
    "pread_1",
    "pwrite_1",
    "flush_1",
    "trim_1",
    "zero_1",
    "errno_is_preserved",
    "dump_plugin",
    "can_zero",
    "can_fua",
    "pread",
    "pwrite",
    "flush",
    "trim",
    "zero",
    "magic_config_key",
    "can_multi_conn",
    "can_extents",
    "extents",
    "can_cache",
    "cache",
    "thread_model_function",
    "can_fast_zero",
    "preconnect",
    "get_ready",
    "after_fork",
    "list_exports",
    "default_export",
    "export_description",
    "cleanup",
    "block_size",
)
CALLBACKS: Final = tuple(
    name for name in _ORDER if name not in _TEXTS and name != "errno_is_preserved"
)


class Structure(ctypes.Structure):
    """`struct nbdkit_plugin`; functions are addresses, None where there is none."""

    struct_size: int
    api_version: int
    thread_model: int
    errno_is_preserved: int

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("api_version", ctypes.c_int),
        ("thread_model", ctypes.c_int),
        *(
            (
                name,
                ctypes.c_char_p
                if name in _TEXTS
                else ctypes.c_int
                if name == "errno_is_preserved"
                else ctypes.c_void_p,
            )
            for name in _ORDER
        ),
    ]


SMALLEST: Final = Structure.pread_1.offset + ctypes.sizeof(ctypes.c_void_p)
"""What every plugin has had, since the first release: up to its pread."""


def read(address: int, file: str) -> Structure:
    """The structure at an address. Raises LoadError, naming the file, for what cannot be one."""
    size = ctypes.c_uint64.from_address(address).value
    # A size that is no multiple of a pointer's would have us take half of one for a function.
    if not SMALLEST <= size < 1 << 16 or size % ctypes.sizeof(ctypes.c_void_p):
        raise LoadError(
            f"{file}: not a plugin: its structure says that it has {size} bytes; the smallest has"
            f" {SMALLEST}, and each field has a pointer's size (is NBDKIT_REGISTER_PLUGIN used?)"
        )
    version = Structure.from_address(address).api_version
    if version not in VERSIONS:
        raise LoadError(
            f"{file}: the plugin wants API version {version}; supported are"
            f" {' and '.join(map(str, VERSIONS))}"
        )
    found = Structure()
    ctypes.memmove(ctypes.byref(found), address, min(size, ctypes.sizeof(Structure)))
    return found
