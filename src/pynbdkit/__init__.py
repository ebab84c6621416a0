"""pynbdkit: make network block devices in Python, and serve them.

The public names, loaded when first used, so that `import pynbdkit` costs next to nothing.
"""

from __future__ import annotations

from ._version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import parameters
    from .complete import Layer
    from .device import Device
    from .embed import RunningServer, load_plugin, serve
    from .errors import ConfigError, LoadError, OpenError, PynbdkitError
    from .extents import HOLE, ZERO, Extent
    from .filter import Filter, FilterDevice
    from .flags import CacheMode, Flag, Fua, ThreadModel, ZeroMode
    from .log import debug, error
    from .parameters import Parameter
    from .parse import parse_bool, parse_int, parse_size
    from .plugin import Plugin
    from .session import Session

__all__ = [
    "HOLE",
    "ZERO",
    "CacheMode",
    "ConfigError",
    "Device",
    "Extent",
    "Filter",
    "FilterDevice",
    "Flag",
    "Fua",
    "Layer",
    "LoadError",
    "OpenError",
    "Parameter",
    "Plugin",
    "PynbdkitError",
    "RunningServer",
    "Session",
    "ThreadModel",
    "ZeroMode",
    "__version__",
    "debug",
    "error",
    "load_plugin",
    "parameters",
    "parse_bool",
    "parse_int",
    "parse_size",
    "serve",
]

_HOME = {
    "complete": ("Layer",),
    "device": ("Device",),
    "embed": ("RunningServer", "load_plugin", "serve"),
    "errors": ("ConfigError", "LoadError", "OpenError", "PynbdkitError"),
    "extents": ("HOLE", "ZERO", "Extent"),
    "filter": ("Filter", "FilterDevice"),
    "flags": ("CacheMode", "Flag", "Fua", "ThreadModel", "ZeroMode"),
    "log": ("debug", "error"),
    "parameters": ("Parameter",),
    "parse": ("parse_bool", "parse_int", "parse_size"),
    "plugin": ("Plugin",),
    "session": ("Session",),
}


def __getattr__(name: str) -> object:
    # Also asked for our own modules' names, before they are imported: then it has to be quick.
    home = next((module for module, names in _HOME.items() if name in names), None)
    if home is None and name != "parameters":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    from importlib import import_module

    if home is None:
        return import_module(".parameters", __name__)
    value: object = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value
