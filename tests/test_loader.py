"""Names and paths to plugins and filters, and one clear line where there is none."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest

from pynbdkit import Filter, LoadError, Plugin, loader

PLUGIN = """
from pynbdkit import Plugin, Device, parameters

class Disk(Plugin):
    "A disk."
    size = parameters.size("How large", default=1024)
"""
FILTER = """
from pynbdkit import Filter

class Layer(Filter):
    "A layer."
"""
SCRIPT = """
def open(readonly): return 1
def get_size(h): return 512
def pread(h, count, offset): return bytes(count)
"""


def file(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


# -- by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", loader.names("plugin"))
def test_every_plugin_of_ours(name: str) -> None:
    """Loads by its name alone, and can tell what it is."""
    plugin = loader.load_plugin(name)
    assert isinstance(plugin, Plugin)
    assert plugin.name == name
    assert all(line.strip() for line in plugin.config_help().splitlines())
    assert type(plugin).__doc__


@pytest.mark.parametrize("name", loader.names("filter"))
def test_every_filter_of_ours(name: str) -> None:
    filter = loader.load_filter(name)
    assert isinstance(filter, Filter)
    assert filter.name == name
    assert all(line.strip() for line in filter.config_help().splitlines())
    assert type(filter).__doc__


def test_names_are_the_files() -> None:
    """No list to keep: a file is a plugin, unless its name begins with "_"."""
    for kind in ("plugin", "filter"):
        folder = Path(loader.__file__).parent / f"{kind}s"
        files = {path.stem.replace("_", "-") for path in folder.glob("[a-z]*.py")}
        assert loader.names(kind) == sorted(files)
        assert files
    assert "memory" in loader.names("plugin")
    assert "log" in loader.names("filter")


@pytest.mark.parametrize(
    "name", ["nosuch", "", "_linux", "__init__", "memory.", "me mory", "Memory"]
)
def test_unknown_names(name: str) -> None:
    """The line says what there is."""
    with pytest.raises(LoadError) as caught:
        loader.load_plugin(name)
    message = str(caught.value)
    assert message.startswith(f"cannot open plugin '{name}': no such plugin (there are: ")
    assert "memory" in message
    assert f"./{name}" in message
    assert "\n" not in message
    with pytest.raises(LoadError, match=r"no such filter \(there are: .*log"):
        loader.load_filter(name)


class Point:
    """An entry point, as an installed distribution has it."""

    value = "their.module:Thing"

    def __init__(self, found: Any) -> None:
        self.found = found

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """What is installed: (group, name) to what the entry point loads, or raises."""
    points: dict[tuple[str, str], Any] = {}

    def entry_points(*, group: str, name: str) -> list[Point]:
        return [Point(points[group, name])] if (group, name) in points else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return points


def test_entry_points(installed: dict[tuple[str, str], Any]) -> None:
    class Theirs(Plugin):
        pass

    class TheirFilter(Filter):
        name = "own-name"

    installed["pynbdkit.plugins", "theirs"] = Theirs
    installed["pynbdkit.filters", "theirs"] = TheirFilter
    plugin = loader.load_plugin("theirs")
    assert isinstance(plugin, Theirs)
    assert plugin.name == "theirs"
    assert loader.load_filter("theirs").name == "own-name"


def test_ours_come_first(installed: dict[tuple[str, str], Any]) -> None:
    """A distribution cannot take the place of a built-in plugin."""
    installed["pynbdkit.plugins", "memory"] = Plugin
    assert type(loader.load_plugin("memory")).__module__ == "pynbdkit.plugins.memory"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (ImportError("No module named 'their'"), "No module named 'their'"),
        (AttributeError("no Thing"), "no Thing"),
        (Filter, "is not a Plugin"),
        (5, "is not a Plugin"),
    ],
)
def test_entry_points_that_are_broken(
    installed: dict[tuple[str, str], Any], found: Any, words: str
) -> None:
    installed["pynbdkit.plugins", "theirs"] = found
    with pytest.raises(LoadError, match=rf"'theirs' \(their.module:Thing\).*{words}"):
        loader.load_plugin("theirs")


# -- by path ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./x", "/x/y", "x.py", "x/y", "x.so"])
def test_paths(name: str) -> None:
    assert loader.is_path(name)


@pytest.mark.parametrize("name", ["x", "x-y", "py", "so", "x.pyc", ""])
def test_no_paths(name: str) -> None:
    assert not loader.is_path(name)


def test_native_plugin(tmp_path: Path) -> None:
    plugin = loader.load_plugin(file(tmp_path, "my-disk.py", PLUGIN))
    assert type(plugin).__name__ == "Disk"
    assert plugin.name == "my-disk"
    plugin.config("size", "2K")


def test_script(tmp_path: Path) -> None:
    plugin = loader.load_plugin(file(tmp_path, "old.py", SCRIPT))
    assert (plugin.name, plugin.api_version) == ("old", 1)


def test_filter_from_a_file(tmp_path: Path) -> None:
    filter = loader.load_filter(file(tmp_path, "thin.py", FILTER))
    assert (type(filter).__name__, filter.name) == ("Layer", "thin")


@pytest.mark.parametrize("first", ["#!/usr/bin/env -S pynbdkit python", "#!/usr/bin/nbdkit python"])
def test_a_hash_bang_is_enough(tmp_path: Path, first: str) -> None:
    """A script that can be run need not end in .py."""
    assert loader.load_plugin(file(tmp_path, "disk", f"{first}\n{SCRIPT}")).name == "disk"


def test_two_files_of_one_name(tmp_path: Path) -> None:
    """Each is itself."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file(tmp_path / folder, "disk.py", f"{PLUGIN}\n    folder = {folder!r}\n")
    a, b = (loader.load_plugin(str(tmp_path / folder / "disk.py")) for folder in ("a", "b"))
    assert (getattr(a, "folder", 0), getattr(b, "folder", 0)) == ("a", "b")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (f"{PLUGIN}\nclass _Helper(Plugin): pass\n", "Disk"),
        (f"{PLUGIN}\nclass Larger(Disk): pass\n", "Larger"),
        (f"{PLUGIN}\nclass A(Disk): pass\nclass B(A): pass\n", "B"),
        (f"{PLUGIN}\nAlias = Disk\n", "Disk"),
        (f"{PLUGIN}\nfrom pynbdkit.plugins.memory import Memory\n", "Disk"),
        ("from pynbdkit.plugins.memory import *\nfrom pynbdkit.plugins import memory, null\n"
         "class Mine(memory.Memory): pass\n", "Mine"),
        (f"{FILTER}\n{PLUGIN}", "Disk"),
    ],
)  # fmt: skip
def test_which_class_is_meant(tmp_path: Path, text: str, chosen: str) -> None:
    """The public class that the file itself defines; of a class and its subclass, the latter."""
    assert type(loader.load_plugin(file(tmp_path, "disk.py", text))).__name__ == chosen


NO_FILE = "No such file or directory"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing.py", None, f"cannot open plugin 'PATH': {NO_FILE}"),
        ("missing", None, f"cannot open plugin 'PATH': {NO_FILE}"),
        ("missing.so", None, f"cannot open plugin 'PATH': {NO_FILE}"),
        ("disk.so", b"\x7fELF", "cannot load 'PATH': file too short"),
        ("elf.py", b"\x7fELF", "cannot load 'PATH': file too short"),
        ("disk.img", b"\0" * 512, "cannot open plugin 'PATH': not a Python file"),
        ("run.sh", b"#!/bin/sh\n", "not a Python file"),
        ("empty.py", "", "PATH"),
        ("null.py", b"x = 1\0", "PATH"),
        ("latin.py", b"x = '\xff'\n", "PATH"),
        ("wrong.py", "def f(:\n", "PATH:1: SyntaxError"),
        ("raises.py", "x = 1\nx / 0\n", "PATH:2: ZeroDivisionError: division by zero"),
        ("exits.py", "import sys\nsys.exit('done')\n", "PATH"),
        ("imports.py", "import no_such_module\n", "No module named 'no_such_module'"),
        ("two.py", f"{PLUGIN}\nclass Other(Plugin): pass\n",
         r"PATH: more than one Plugin \(Disk, Other\); keep one, or begin"),
        ("init.py", f"{PLUGIN}\n    def __init__(self, size): pass\n", "PATH: Disk.*size"),
        ("broken.py", f"{PLUGIN}\n    def __init__(self): raise OSError(5, 'no')\n",
         "PATH: Disk: no"),
    ],
)  # fmt: skip
def test_files_that_are_no_plugin(
    tmp_path: Path, name: str, text: str | bytes | None, words: str
) -> None:
    """One line, with the file's name as it was given."""
    path = str(tmp_path / name) if text is None else file(tmp_path, name, text)
    with pytest.raises(LoadError, match=words.replace("PATH", re.escape(path))) as caught:
        loader.load_plugin(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing.py", None, f"cannot open.* 'PATH': {NO_FILE}"),
        ("plugin.py", PLUGIN, r"^PATH: defines no subclass of pynbdkit.Filter$"),
        ("script.py", SCRIPT, r"^PATH: defines no subclass of pynbdkit.Filter$"),
        ("two.py", f"{FILTER}\nclass Other(Filter): pass\n", r"PATH: more than one Filter"),
        ("raises.py", "1 / 0\n", "PATH:1: ZeroDivisionError"),
        ("init.py", f"{FILTER}\n    def __init__(self, size): pass\n", "PATH: Layer.*size"),
    ],
)
def test_files_that_are_no_filter(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    path = str(tmp_path / name) if text is None else file(tmp_path, name, text)
    with pytest.raises(LoadError, match=words.replace("PATH", re.escape(path))) as caught:
        loader.load_filter(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_plugin(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="Is a directory"):
        loader.load_plugin(f"{tmp_path}/")
