"""`python`: a file as the first parameter, on the command line and in a program."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit.errors import ConfigError, LoadError
from pynbdkit.flags import ThreadModel
from pynbdkit.loader import load_plugin
from pynbdkit.plugin import Plugin
from pynbdkit.plugins._inner import InnerPlugin
from pynbdkit.plugins.python import Python
from pynbdkit.session import Session

EXAMPLES = support.ROOT / "examples"
NATIVE = """
import pynbdkit

class Disk(pynbdkit.Plugin):
    "A disk of one byte, over and over."
    blocking = False
    thread_model = pynbdkit.ThreadModel.SERIALIZE_REQUESTS
    size = pynbdkit.parameters.size("Size of the disk", required=True, magic=True)

    def open(self, session):
        return OneByte(self.size)

class OneByte(pynbdkit.Device):
    def __init__(self, size):
        self.size = size
    def get_size(self):
        return self.size
    def pread(self, count, offset, flags):
        return b"n" * count

if __name__ == "__main__":
    raise SystemExit("run as a program")
"""
EVERYTHING = """
import nbdkit
API_VERSION = 2
def dump_plugin(): print("colour=blue")
def open(readonly): return 1
def get_size(h): return 512
def pread(h, buf, offset, flags): pass
def pwrite(h, buf, offset, flags): pass
def pwrite_fua(h, buf, offset, fua): pass
def extents(h, count, offset, flags): pass
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
"""


def lines(*arguments: str | Path) -> dict[str, str]:
    """What --dump-plugin prints."""
    done = support.pynbdkit(*arguments, "--dump-plugin")
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def failure(*arguments: str | Path) -> str:
    """The one line that says what is wrong."""
    done = support.pynbdkit("-f", "-U", "-", *arguments, "--run", "true")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


# -- the three ways to name a script -------------------------------------------------------------

WAYS = [
    lambda file: ("python", file),
    lambda file: ("python", f"script={file}"),
    lambda file: (file,),
]


@pytest.mark.parametrize("way", WAYS)
def test_serving_a_script(serve: Any, connect: Any, way: Callable[..., Any]) -> None:
    server = serve(*way(EXAMPLES / "ramdisk_v2.py"), "size=1M", "disk=data")
    h = connect(server)
    h.pwrite(b"written", 10)
    assert h.pread(7, 10) == b"written"
    h.shutdown()


def test_options_and_parameters_in_any_order(serve: Any, connect: Any) -> None:
    server = serve("-t", "4", "python", "-r", EXAMPLES / "ramdisk_v1.py", "--no-sr", "size=1M")
    h = connect(server)
    assert h.is_read_only()
    assert h.get_size() == 1 << 20
    h.shutdown()


@pytest.mark.parametrize("first", ["#!/usr/bin/env -S {python} -m pynbdkit python", None])
def test_a_script_with_a_shebang(tmp_path: Path, first: str | None) -> None:
    """An executable script is a server; its name need not end in .py."""
    text = (EXAMPLES / "ramdisk_v1.py").read_text()
    if first is not None:
        text = first.format(python=sys.executable) + "\n" + text.split("\n", 1)[1]
    script = tmp_path / "ramdisk"
    script.write_text(text)
    script.chmod(0o755)
    environment = dict(os.environ)
    scripts = Path(sys.executable).parent
    if first is None and not shutil.which("pynbdkit", path=scripts):
        pytest.skip("the command pynbdkit is not installed beside python: pip install -e .")
    environment["PATH"] = f"{scripts}:{environment['PATH']}"
    done = support.run(
        "env",
        f"PATH={environment['PATH']}",
        script,
        "-U",
        "-",
        "size=64k",
        "--run",
        'nbdinfo --size "$uri"',
    )
    assert done.stdout.strip() == "65536"


def test_a_native_plugin_in_a_file(serve: Any, connect: Any, tmp_path: Path) -> None:
    (tmp_path / "native").write_text(NATIVE)
    server = serve("python", tmp_path / "native", "2M")
    h = connect(server)
    assert h.get_size() == 2 << 20
    assert h.pread(3, 5) == b"nnn"
    h.shutdown()


def test_in_a_program(connect: Any) -> None:
    plugin = Python(script=str(EXAMPLES / "ramdisk_v2.py"), size="1M", disk="only")
    with pynbdkit.serve(plugin) as server:
        h = connect(server.export_uri("only"))
        assert h.get_size() == 1 << 20
        h.shutdown()
    loaded = pynbdkit.load_plugin("python", script=EXAMPLES / "ramdisk_v1.py", size=65536)
    with pynbdkit.serve(loaded) as server:
        h = connect(server)
        assert h.get_size() == 65536
        h.shutdown()


def test_the_same_script_twice_in_a_program(connect: Any) -> None:
    plugins = [Python(script=str(EXAMPLES / "ramdisk_v1.py"), size=s) for s in ("64k", "128k")]
    with pynbdkit.serve(plugins[0]) as first, pynbdkit.serve(plugins[1]) as second:
        one, two = connect(first), connect(second)
        assert (one.get_size(), two.get_size()) == (65536, 131072)
        one.shutdown()
        two.shutdown()


# -- mistakes ------------------------------------------------------------------------------------


def test_no_script() -> None:
    assert "the first parameter must be the script" in failure("python")
    assert "the first parameter must be the script" in failure("python", "size=1M")
    with pytest.raises(ConfigError, match="the first parameter must be the script"):
        Python(size="1M")


def test_no_such_script() -> None:
    assert failure("python", "no/such/file") == (
        "pynbdkit: error: cannot open 'no/such/file': No such file or directory"
    )
    with pytest.raises(LoadError, match="no/such"):
        load_plugin("python").config("script", "no/such/file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("API_VERSION = 3\n", "API_VERSION is 3, but the versions supported are 1 and 2"),
        ("def f(:\n", "SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("del pread\n", "no function pread"),
        ("def config(k, v): raise RuntimeError(f'{k} is unknown')\n", "size is unknown"),
        ("", "parameter 'size': this script takes none"),
        ("def config(k, v): pass\ndef config_complete(): 1 / 0\n", "ZeroDivisionError"),
        ("def config(k, v): pass\ndef get_ready(): 1 / 0\n", "get_ready: ZeroDivisionError"),
        ("def config(k, v): pass\ndef after_fork(): 1 / 0\n", "after_fork: ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]])
def test_a_bad_script_is_one_line(
    tmp_path: Path, text: str, message: str, way: Callable[..., Any]
) -> None:
    script = tmp_path / "bad.py"
    script.write_text(EVERYTHING + text)
    line = failure(*way(script), "size=1M")
    assert line.startswith(f"pynbdkit: error: {script}:")
    assert message in line


def test_a_value_without_a_key_is_nobodys(tmp_path: Path) -> None:
    line = failure("python", EXAMPLES / "ramdisk_v1.py", "another.py")
    assert "expecting key=value on the command line but got: another.py" in line


# -- --dump-plugin and --help --------------------------------------------------------------------


def test_dump_plugin_without_a_script() -> None:
    ours = lines("python")
    theirs = dict(
        line.split("=", 1)
        for line in support.run("nbdkit", "python", "--dump-plugin").stdout.splitlines()
    )
    own = {"path", "version", "python_version", "struct_size", "errno_is_preserved"}
    for key, value in theirs.items():
        if not key.startswith("has_") and key not in own:
            assert ours[key] == value, key
    assert ours["magic_config_key"] == "script"
    assert ours["python_version"] == ".".join(map(str, sys.version_info[:3]))


def test_dump_plugin_with_a_script(tmp_path: Path) -> None:
    script = tmp_path / "all.py"
    script.write_text(EVERYTHING)
    found = lines("python", script)
    assert found["name"] == "python"
    assert found["api_version"] == "2"
    assert found["thread_model"] == "parallel"
    assert found["path"] == str(script)
    assert found["colour"] == "blue"
    has = {key for key in found if key.startswith("has_")}
    names = ("dump_plugin", "open", "get_size", "pread", "pwrite", "extents", "thread_model")
    assert has == {f"has_{name}" for name in names}
    assert {key for key in lines(script) if key.startswith("has_")} == has
    assert "magic_config_key" not in found

    script.write_text(
        EVERYTHING.replace("API_VERSION = 2", "").replace("buf, offset, flags", "a, b")
    )
    found = lines("python", script)
    assert found["api_version"] == "1"
    assert found["has_pwrite_fua"] == "1"
    assert "has_extents" not in found


def test_a_native_plugins_declarations_count(tmp_path: Path) -> None:
    (tmp_path / "native").write_text(NATIVE)
    plugin = Python(script=str(tmp_path / "native"), size="1M")
    assert plugin.blocking is False
    assert plugin.thread_model == ThreadModel.SERIALIZE_REQUESTS
    assert plugin.magic_config_key() == "size"
    with pytest.raises(ConfigError, match="size"):
        Python(script=str(tmp_path / "native")).check_parameters()
    assert lines("python", tmp_path / "native")["thread_model"] == "serialize_requests"


def test_help() -> None:
    done = support.pynbdkit("python", "--help")
    assert done.returncode == 0
    assert "script=<FILE>" in done.stdout


def test_every_step_reaches_the_plugin_in_the_file() -> None:
    """A question that this plugin answered by itself, may_open above all, would be answered wrong.

    `load` is called when the file is known.
    """
    steps = {name for name, step in vars(Plugin).items() if callable(step) and name[0] != "_"}
    assert steps - set(vars(Python)) - set(vars(InnerPlugin)) == {"load"}


def test_the_plugin_in_the_file_says_who_may_open_what(tmp_path: Path) -> None:
    said = "    def may_open(self, session):\n        return session.export_name == 'public'\n"
    (tmp_path / "native").write_text(NATIVE.replace("    def open(", f"{said}\n    def open("))
    plugin = Python(script=str(tmp_path / "native"), size="1M")
    assert plugin.may_open(Session(export_name="public"))
    assert not plugin.may_open(Session(export_name="other"))
