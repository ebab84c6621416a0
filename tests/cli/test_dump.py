"""--dump-config, --dump-plugin, PLUGIN --help and --version (nbdkit-probing(1))."""

from __future__ import annotations

import ctypes.util
import platform
import sys
from pathlib import Path

import pytest

from pynbdkit import __version__
from support import ROOT, pynbdkit, run

SOURCE = ROOT / "src" / "pynbdkit"


def pairs(text: str) -> dict[str, str]:
    lines = text.splitlines()
    result = dict(line.split("=", 1) for line in lines)
    assert len(result) == len(lines), "a key that comes twice"
    return result


def test_dump_config() -> None:
    ours = pairs(pynbdkit("--dump-config").stdout)
    theirs = pairs(run("nbdkit", "--dump-config").stdout)
    assert ours["name"] == "pynbdkit"
    assert ours["version"] == __version__
    assert [ours["version_major"], ours["version_minor"]] == __version__.split(".")[:2]
    assert ours["python_version"] == platform.python_version()
    assert Path(ours["plugindir"], "memory.py").exists()
    assert Path(ours["filterdir"], "log.py").exists()
    for key in ("exit_with_parent", "host_cpu", "root_tls_certificates_dir", "tls"):
        assert ours[key] == theirs[key]
    assert ours["tls_psk"] == ("yes" if sys.version_info >= (3, 13) else "no")
    assert ours["selinux"] == ("yes" if ctypes.util.find_library("selinux") else "no")
    assert set(theirs) - set(ours) <= {
        "libdir",
        "mandir",
        "sbindir",
        "sysconfdir",
    }


def test_dump_plugin_of_a_built_in_plugin() -> None:
    ours = pairs(pynbdkit("memory", "--dump-plugin").stdout)
    theirs = pairs(run("nbdkit", "memory", "--dump-plugin").stdout)
    for key in ("name", "api_version", "max_thread_model", "thread_model", "magic_config_key"):
        assert ours[key] == theirs[key]
    for name in ("open", "get_size", "pread", "pwrite", "flush", "trim", "zero", "extents"):
        assert ours[f"has_{name}"] == theirs[f"has_{name}"] == "1"
    assert ours["path"] == str(SOURCE / "plugins" / "memory.py")
    assert ours["version"] == __version__


SCRIPT = """\
import nbdkit
API_VERSION = 2
def open(readonly): return 1
def get_size(h): return 1
def pread(h, buf, offset, flags): pass
def pwrite(h, buf, offset, flags): pass
def thread_model(): return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS
def dump_plugin(): print("mine=yes")
"""


@pytest.mark.parametrize("words", [["./disk.py"], ["python", "disk.py"]])
def test_dump_plugin_of_a_script(words: list[str], sockdir: Path) -> None:
    (sockdir / "disk.py").write_text(SCRIPT)
    done = pynbdkit(*words, "--dump-plugin", cwd=sockdir)
    found = pairs(done.stdout)
    assert found["path"] == str(sockdir / "disk.py")
    assert found["name"] == ("python" if len(words) > 1 else "disk")
    assert found["api_version"] == "2"
    assert found["thread_model"] == "serialize_requests"
    assert found["max_thread_model"] == "parallel"
    assert found["mine"] == "yes"
    has = {key for key in found if key.startswith("has_")}
    assert has == {
        f"has_{n}" for n in ["open", "get_size", "pread", "pwrite", "thread_model", "dump_plugin"]
    }


NATIVE = """\
import pynbdkit
class Disk(pynbdkit.Plugin):
    "A disk of the author's."
    version = "7.5"
    longname = "the long name"
    thread_model = pynbdkit.ThreadModel.SERIALIZE_REQUESTS
    size = pynbdkit.parameters.size("How large it is", required=True, magic=True)
    def open(self, session): ...
    def dump_plugin(self): return [("mine", "indeed")]
"""


def test_dump_plugin_of_a_native_file(sockdir: Path) -> None:
    (sockdir / "disk.py").write_text(NATIVE)
    found = pairs(pynbdkit("./disk.py", "--dump-plugin", cwd=sockdir).stdout)
    assert found["path"] == str(sockdir / "disk.py")
    assert found["version"] == "7.5"
    assert found["magic_config_key"] == "size"
    assert found["thread_model"] == found["max_thread_model"] == "serialize_requests"
    assert found["mine"] == "indeed"
    assert found["has_open"] == "1"
    assert "has_unload" not in found


def test_help_of_a_plugin(sockdir: Path) -> None:
    (sockdir / "disk.py").write_text(NATIVE)
    text = pynbdkit("--filter=log", "./disk.py", "--help", cwd=sockdir).stdout
    assert "plugin: disk (the long name)\nA disk of the author's.\nsize=<SIZE>" in text
    assert "How large it is (required" in text
    assert "filter: log" in text
    assert "logfile=" in text
    assert "--pidfile" in text


def test_version_of_a_plugin(sockdir: Path) -> None:
    """The server's, the filters', the plugin's, as nbdkit has it."""
    (sockdir / "disk.py").write_text(NATIVE)
    done = pynbdkit("--filter=log", "--filter=delay", "./disk.py", "--version", cwd=sockdir)
    assert done.stdout.splitlines() == [
        f"pynbdkit {__version__}",
        f"log {__version__}",
        f"delay {__version__}",
        "disk 7.5",
    ]


def test_names_of_the_package_are_printable() -> None:
    """A path with bytes that are no UTF-8 is shown all the same."""
    code = "from pynbdkit.cli.main import show; show(['path=\\udcff'])"
    done = run(sys.executable, "-c", code)
    assert done.stdout == "path=\\udcff\n"
