"""From a name on the command line to a Plugin or Filter.

A name is, in this order: a path (it has a "/" or ends in .py or .so); a module of ours in
`pynbdkit.plugins` or `pynbdkit.filters` (no list: the file's name is the plugin's name, with "_"
for "-"); an entry point of an installed distribution (group `pynbdkit.plugins`,
`pynbdkit.filters`); of plugins, a file that nbdkit would find by that name (`places.py`).
A module has exactly one public class of the kind.

A file is a shared object, a Python file, or a script of a plugin that its first line names.
"""

from __future__ import annotations

import os
import sys

from .device import CONFIGURATION, refuse_async
from .errors import LoadError
from .log import describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import Any, Final

    from .filter import Filter
    from .plugin import Plugin

HOW = "Use 'pynbdkit --help' for the usage, or 'pynbdkit --dump-config' for what is installed."
DEPTH: Final = 4
"""A script's plugin may be a script itself, so many times (the kernel's limit for "#!" lines)."""


def load_plugin(name: str, path: Sequence[str] = ()) -> Plugin:
    """The plugin called `name`, not configured. Raises LoadError in one line.

    `path`: folders of plugins for nbdkit, before those of the system (`places.find`).
    """
    return _load_plugin(name, path, 0)


def _load_plugin(name: str, path: Sequence[str], depth: int) -> Plugin:
    from .plugin import Plugin

    if is_path(name):
        return _plugin_from_file(name, path, depth)
    found = _named("plugin", name, Plugin)
    if found is None:
        from . import places

        file = places.find(name, path)
        if file is None:
            raise _unknown("plugin", name)
        return _plugin_from_file(file, path, depth)
    assert isinstance(found, Plugin)
    return found


def load_filter(name: str) -> Filter:
    """The filter called `name`, not configured. Raises LoadError in one line."""
    from .filter import Filter

    if is_path(name):
        module = _module_from_file(name)
        kind = _class_in(module, Filter, name)
        if kind is None:
            raise LoadError(f"{name}: defines no subclass of pynbdkit.Filter")
        found = _make(kind, name, _stem(name))
    else:
        found = _named("filter", name, Filter)
        if found is None:
            raise _unknown("filter", name)
    assert isinstance(found, Filter)
    return found


def names(kind: str) -> list[str]:
    """The names of our own plugins or filters (kind "plugin" or "filter")."""
    folder = os.path.join(os.path.dirname(__file__), kind + "s")
    return sorted(
        entry[:-3].replace("_", "-")
        for entry in os.listdir(folder)
        if entry.endswith(".py") and not entry.startswith("_")
    )


def is_path(name: str) -> bool:
    """Whether a plugin's name is a path rather than a name to look up."""
    return "/" in name or name.endswith((".py", ".so"))


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _unknown(kind: str, name: str) -> LoadError:
    return LoadError(
        f"cannot open {kind} '{name}': no such {kind}"
        f" (there are: {', '.join(names(kind))}; a file needs its path: ./{name})"
    )


def _named(kind: str, name: str, base: type) -> object:
    """One of ours, or of an installed distribution; None where none has the name."""
    module_name = f"pynbdkit.{kind}s.{name.replace('-', '_')}"
    file = os.path.join(os.path.dirname(__file__), kind + "s", name.replace("-", "_") + ".py")
    if not name.startswith("_") and name.replace("-", "").isidentifier() and os.path.exists(file):
        __import__(module_name)  # importlib.import_module costs an import of its own
        found = _class_in(sys.modules[module_name], base, module_name)
        if found is None:
            raise LoadError(f"{module_name} has no public subclass of {base.__name__}")
    else:
        found = _entry_point(kind, name, base)
        if found is None:
            return None
    return _make(found, name, name)


def _make(kind: type, where: str, name: str) -> Any:
    """An instance, called `name` unless its class says otherwise. Raises LoadError in one line."""
    try:
        made = kind()
    except Exception as failure:
        raise LoadError(f"{where}: {kind.__name__}: {describe(failure)}") from None
    made.name = made.name or name
    refuse_async(made, CONFIGURATION, where)
    return made


def _entry_point(kind: str, name: str, base: type) -> type | None:
    from importlib.metadata import entry_points

    for point in entry_points(group=f"pynbdkit.{kind}s", name=name):
        try:
            found = point.load()
        except Exception as error:
            raise LoadError(f"cannot open {kind} '{name}' ({point.value}): {error}") from None
        if not (isinstance(found, type) and issubclass(found, base)):
            raise LoadError(f"{kind} '{name}' ({point.value}) is not a {base.__name__}")
        return found
    return None


def _class_in(module: ModuleType, base: type, where: str) -> type | None:
    found = {  # each once, for a class may have another name as well
        value: None
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    }
    # Of a class and its subclass in one file, the last in line is the one that is meant.
    leaves = [
        c for c in found if not any(other is not c and issubclass(other, c) for other in found)
    ]
    if len(leaves) > 1:
        names = ", ".join(leaf.__name__ for leaf in leaves)
        raise LoadError(
            f"{where}: more than one {base.__name__} ({names});"
            " keep one, or begin the others' names with _"
        )
    return leaves[0] if leaves else None


def _plugin_from_file(path: str, folders: Sequence[str], depth: int) -> Plugin:
    try:
        with open(path, "rb") as stream:
            head = stream.read(256)
    except OSError as error:
        raise LoadError(f"cannot open plugin '{path}': {error.strerror}") from None
    if head.startswith(b"\x7fELF") or path.endswith(".so"):
        return _plugin_from_object(path)
    if not path.endswith(".py"):
        from .places import wanted_by

        words = wanted_by(head)
        if words and words[0] != "python":
            return _plugin_of_script(path, words, folders, depth)
    first = head.split(b"\n", 1)[0]
    if not path.endswith(".py") and not (first.startswith(b"#!") and b"python" in first):
        raise LoadError(
            f"cannot open plugin '{path}': not a Python file"
            " (its name ends in .py, or its first line is '#!/usr/bin/env -S pynbdkit python')"
        )
    from .places import plain_name

    plugin = plugin_from_python_file(path)
    if plugin.name == _stem(path):
        plugin.name = plain_name(path)
    return plugin


def _plugin_from_object(path: str) -> Plugin:
    from .native.plugin import NativePlugin

    plugin = NativePlugin(path)
    if plugin.name == "python":  # it brings another Python, and there can only be one
        raise LoadError(f"{path}: the python plugin is built in: pynbdkit python FILE")
    return plugin


def _plugin_of_script(
    path: str, words: Sequence[str], folders: Sequence[str], depth: int
) -> Plugin:
    """The plugin that a script's first line names; the script is its first parameter."""
    name = words[0]
    if name.startswith("-"):
        raise LoadError(
            f"cannot open plugin '{path}': its first line has an option ({name}):"
            " run the file itself, or give the option here and take it out there"
        )
    if name == "sh":  # it would run the file for each request, and so this server again
        raise LoadError(
            f"cannot open plugin '{path}': its first line has to name a shell, as '#!/bin/sh' does:"
            f" then 'pynbdkit sh {path}' runs it"
        )
    if depth == DEPTH:
        raise LoadError(f"cannot open plugin '{path}': more than {DEPTH} scripts call each other")
    try:
        plugin = _load_plugin(name, folders, depth + 1)
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from None
    magic = plugin.magic_config_key() or "script"
    pairs = [word.split("=", 1) if "=" in word else [magic, word] for word in words[1:]]
    pairs.append([magic, path])

    def load_and_hand_over() -> None:
        del vars(plugin)["load"]
        plugin.load()
        for key, value in pairs:
            plugin.config(key, value)

    vars(plugin)["load"] = load_and_hand_over
    return plugin


def plugin_from_python_file(path: str) -> Plugin:
    """The native plugin or script in a file, whatever its name. Raises LoadError in one line."""
    from .adapters.script import ScriptPlugin, load_module
    from .plugin import Plugin

    module = load_module(path)
    kind = _class_in(module, Plugin, path)
    if kind is not None:
        found = _make(kind, path, _stem(path))
        assert isinstance(found, Plugin)
        return found
    return ScriptPlugin(path, module)


def _module_from_file(path: str) -> ModuleType:
    from .adapters.script import load_module

    return load_module(path)
