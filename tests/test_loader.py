"""Names and paths to plugins and filters, and one clear line where there is none."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import support
from pynbdkit import Filter, LoadError, Plugin, loader, places

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


# -- nbdkit's --------------------------------------------------------------------------------------

PLUGIN_IN_PERL = """#!/usr/bin/env -S pynbdkit perl
my $size = 0;
sub config { my ($key, $value) = @_; die "unknown: $key" if $key ne "size"; $size = int ($value) }
sub open { return {} }
sub get_size { return $size }
sub pread { my ($h, $count, $offset) = @_; return "\\0" x $count }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for nbdkit's: the only one, wherever the tests run."""
    monkeypatch.setattr(places, "folders", lambda: [str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(places.VARIABLE, raising=False)
    return tmp_path


def test_a_name_of_nbdkits(folder: Path) -> None:
    """What is neither ours nor a distribution's is looked for there."""
    file(folder, "nbdkit-older-plugin", f"#!/usr/sbin/nbdkit python\n{SCRIPT}")
    path = file(folder, "nbdkit-broken-plugin.so", b"\x7fELF")
    assert loader.load_plugin("older").name == "older"
    with pytest.raises(LoadError, match=f"cannot load '{re.escape(path)}'"):
        loader.load_plugin("broken")
    with pytest.raises(LoadError, match=r"'nosuch': no such plugin \(there are: "):
        loader.load_plugin("nosuch")


def test_folders_of_the_command_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    file(folder, "nbdkit-older-plugin", f"#!/usr/sbin/nbdkit python\n{SCRIPT}")
    file(folder, "nbdkit-own-plugin", f"#!/usr/sbin/nbdkit python\n{SCRIPT}")
    own = file(tmp_path / "own", "nbdkit-older-plugin.so", b"\x7fELF")
    with pytest.raises(LoadError, match=re.escape(own)):
        loader.load_plugin("older", [str(tmp_path / "own")])
    assert loader.load_plugin("own", [str(tmp_path / "own")]).name == "own"


def test_ours_and_distributions_come_before_nbdkits(
    folder: Path, installed: dict[tuple[str, str], Any]
) -> None:
    class Theirs(Plugin):
        pass

    installed["pynbdkit.plugins", "theirs"] = Theirs
    for name in ("memory", "theirs"):
        file(folder, f"nbdkit-{name}-plugin.so", b"\x7fELF")
    assert type(loader.load_plugin("memory")).__module__ == "pynbdkit.plugins.memory"
    assert isinstance(loader.load_plugin("theirs"), Theirs)
    with pytest.raises(LoadError, match="file too short"):
        loader.load_plugin(str(folder / "nbdkit-memory-plugin.so"))


def test_the_option_and_the_variable(tmp_path: Path) -> None:
    """On a real command line: the option's folders come first, and may be several."""
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / name).mkdir()
        text = f"#!/usr/sbin/nbdkit python\n{SCRIPT}def dump_plugin(): print('from={name}')\n"
        file(tmp_path / name, "nbdkit-mine-plugin", text)
        file(tmp_path / name, f"nbdkit-mine{number}-plugin", text)
    env = {**os.environ, places.VARIABLE: f"{tmp_path}/none:{tmp_path}/c"}
    words = ("--plugin-path", f"{tmp_path}/none:{tmp_path}/a", f"--plugin-path={tmp_path}/b")
    for name, expected in (("mine", "a"), ("mine0", "a"), ("mine1", "b"), ("mine2", "c")):
        done = support.pynbdkit(*words, name, "--dump-plugin", env=env)
        assert f"from={expected}\n" in done.stdout, done.stderr


def test_starting_up_looks_for_no_nbdkit(tmp_path: Path) -> None:
    """A plugin of ours, --help and --dump-config run no process and import nothing for it."""
    program = tmp_path / "nbdkit"
    program.write_text(f"#!/bin/sh\n: >{tmp_path}/ran\n")
    program.chmod(0o755)
    env = {**os.environ, "PATH": str(tmp_path), "PYTHONPROFILEIMPORTTIME": "1"}
    for words in (["memory", "1M", "--dump-plugin"], ["--dump-config"], ["--help"]):
        done = support.pynbdkit(*words, env=env)
        assert done.returncode == 0
        assert "pynbdkit._version" in done.stderr
        for module in ("pynbdkit.places", "pynbdkit.native", "subprocess", "shutil", "ctypes"):
            if module != "ctypes" or words != ["--dump-config"]:  # it asks for SELinux
                assert not re.search(rf"\| +{module}$", done.stderr, re.MULTILINE), (words, module)
    assert support.pynbdkit("no-such", env=env).returncode == 1
    assert (tmp_path / "ran").exists()


class Recorder(Plugin):
    """What a script is handed to."""

    api_version = 1

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, ...]] = []

    def load(self) -> None:
        self.calls.append(("load",))

    def config(self, key: str, value: str) -> None:
        self.calls.append((key, value))


@pytest.mark.parametrize(
    ("line", "before"),
    [
        ("#!/usr/sbin/nbdkit recorder", []),
        ("#!/usr/bin/env -S pynbdkit recorder level=5", [("level", "5")]),
    ],
)
def test_a_script_is_its_plugins_first_parameter(
    tmp_path: Path, installed: dict[tuple[str, str], Any], line: str, before: list[tuple[str, str]]
) -> None:
    """Once the plugin is loaded: languages begin there."""
    installed["pynbdkit.plugins", "recorder"] = Recorder
    script = file(tmp_path, "disk", f"{line}\n")
    plugin = loader.load_plugin(script)
    assert isinstance(plugin, Recorder)
    assert plugin.calls == []
    plugin.load()
    plugin.config("size", "1M")
    plugin.load()
    calls = [("load",), *before, ("script", script), ("size", "1M"), ("load",)]
    assert plugin.calls == calls


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("#!/usr/sbin/nbdkit nosuch", r"^PATH: cannot open plugin 'nosuch': no such plugin"),
        ("#!/usr/bin/env -S nbdkit -f sh", r"'PATH': its first line has an option \(-f\)"),
        ("#!/usr/sbin/nbdkit loop", "more than 4 scripts call each other"),
        ("#!/usr/sbin/nbdkit sh", "'PATH': its first line has to name a shell"),
        ("#!/usr/sbin/nbdkit", "'PATH': not a Python file"),
    ],
)
def test_scripts_that_nothing_runs(folder: Path, line: str, words: str) -> None:
    path = file(folder, "disk", f"{line}\n")
    file(folder, "nbdkit-loop-plugin", "#!/usr/sbin/nbdkit loop\n")
    with pytest.raises(LoadError, match=words.replace("PATH", re.escape(path))) as caught:
        loader.load_plugin(path)
    assert "\n" not in str(caught.value)


def test_a_script_for_a_plugin_in_c(tmp_path: Path) -> None:
    """The file need not be given to the plugin by hand."""
    if places.find("perl") is None:
        support.missing("nbdkit's Perl plugin")
    script = file(tmp_path, "disk", PLUGIN_IN_PERL)
    command = 'nbdinfo --size "$uri"'
    for words in ([script], ["perl", script], ["perl", f"script={script}"]):
        done = support.pynbdkit("-U", "-", *words, "size=1536", "--run", command)
        assert (done.returncode, done.stdout) == (0, "1536\n"), done.stderr


def test_a_script_in_a_program(tmp_path: Path) -> None:
    """Parameters come before the server loads it: the interpreter is there by then."""
    if places.find("perl") is None:
        support.missing("nbdkit's Perl plugin")
    script = file(tmp_path, "disk", PLUGIN_IN_PERL)
    for name, config in ((script, {}), ("perl", {"script": script})):
        text = f"""
import pynbdkit
with pynbdkit.serve(pynbdkit.load_plugin({name!r}, **{config!r}, size=1536)) as server:
    with pynbdkit.client.connect(server.uri) as client:
        print(client.size)
"""
        done = support.run(sys.executable, "-c", "import pynbdkit.client" + text)
        assert done.stdout == "1536\n"


def test_nbdkits_python_plugin(tmp_path: Path) -> None:
    """It would bring another Python into this one: its file says what to do instead."""
    path = places.find("python")
    if path is None:
        support.missing("nbdkit's python plugin")
    done = support.pynbdkit(path, file(tmp_path, "disk.py", SCRIPT), "--dump-plugin")
    line = f"pynbdkit: error: {path}: the python plugin is built in: pynbdkit python FILE\n"
    assert (done.returncode, done.stderr) == (1, line)
