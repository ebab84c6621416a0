"""What an installation has: the part in C and the headers, and what is left without a compiler.

All is built from a source distribution, in a folder of its own, without a network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import support

HEADERS = {"nbdkit-plugin.h", "nbdkit-common.h", "nbdkit-version.h", "nbdkit.pc", "pynbdkit.pc"}
PLUGIN = """\
#include <string.h>
#include <nbdkit-plugin.h>
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
static void *mine_open (int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t mine_size (void *handle) { return 12345; }
static int mine_read (void *handle, void *buf, uint32_t count, uint64_t offset)
{
  memset (buf, 0, count);
  return 0;
}
static struct nbdkit_plugin plugin = {
  .name = "mine", .open = mine_open, .get_size = mine_size, .pread = mine_read,
};
NBDKIT_REGISTER_PLUGIN (plugin)
"""


def run(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*map(str, words)],
        **{"capture_output": True, "text": True, "timeout": 100, **options},
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}: {done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*words: str | Path, **options: object) -> None:
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    succeeded(run(sys.executable, "-m", "pip", "-q", *words[:1], *offline, *words[1:], **options))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """source(): a new folder with what the source distribution has."""
    if run(sys.executable, "-c", "import setuptools.command.bdist_wheel").returncode:
        support.lacking("no setuptools 70.1 or newer here: pip install setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    nothing_made = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    shutil.copytree(support.ROOT / "src", tree / "src", ignore=nothing_made)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(support.ROOT / name, tree)
    script = "import sys, setuptools.build_meta as it; it.build_sdist(sys.argv[1])"
    succeeded(run(sys.executable, "-c", script, folder, cwd=tree))
    (archive,) = folder.glob("*.tar.gz")

    def unpacked() -> Path:
        place = tmp_path_factory.mktemp("source")
        shutil.unpack_archive(archive, place)
        (top,) = place.iterdir()
        return top

    return unpacked


def works(environment: dict[str, str], plugin: Path) -> None:
    """An installation loads a plugin in C."""
    words = (sys.executable, "-m", "pynbdkit", "-U", "-", plugin, "--run", 'nbdinfo --size "$uri"')
    assert succeeded(run(*words, env=environment, cwd="/")) == "12345\n"


@pytest.fixture
def built_plugin(tmp_path: Path) -> Path:
    """A plugin in C, compiled."""
    (tmp_path / "mine.c").write_text(PLUGIN)
    made = tmp_path / "mine.so"
    include = support.ROOT / "src" / "pynbdkit" / "include"
    support.run("cc", "-shared", "-fPIC", f"-I{include}", tmp_path / "mine.c", "-o", made)
    return made


def test_a_wheel(source: Callable[[], Path], tmp_path: Path, built_plugin: Path) -> None:
    """Good for any Python; with everything that its plugins and their authors need."""
    support.program("nbdinfo")
    pip("wheel", "-w", tmp_path / "wheels", source())
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {f"pynbdkit/include/{name}" for name in HEADERS} <= names
    assert "pynbdkit/py.typed" in names
    if hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled():
        return
    assert "-cp311-abi3-" in wheel.name
    assert "pynbdkit/native/_symbols.abi3.so" in names
    works({**os.environ, "PYTHONPATH": str(tmp_path / "installed")}, built_plugin)


def test_it_needs_nothing_of_python(tmp_path: Path) -> None:
    """Not its headers, and none of its functions: an interpreter without "-dev" builds it."""
    source = support.ROOT / "src" / "pynbdkit" / "native" / "symbols.c"
    made = tmp_path / "symbols.so"
    support.run("cc", "-shared", "-fPIC", "-Wl,-z,defs", source, "-o", made)
    assert "Python.h" not in support.run("cc", "-M", source).stdout


def test_without_a_compiler(source: Callable[[], Path], tmp_path: Path, built_plugin: Path) -> None:
    """It installs, serves, and says in one line what a plugin in C lacks."""
    target = tmp_path / "installed"
    pip("install", "--target", target, source(), env={**os.environ, "CC": "false"})
    assert not list(target.rglob("*.so"))
    environment = {**os.environ, "PYTHONPATH": str(target)}
    command = (sys.executable, "-m", "pynbdkit", "-U", "-")
    shown = succeeded(run(*command, "memory", "1M", "--run", "echo served", env=environment))
    assert shown == "served\n"
    for words in ([built_plugin], ["cc", tmp_path / "mine.c"]):
        done = run(*command, *words, "--run", "true", env=environment, cwd="/")
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr
        assert "a C compiler" in done.stderr
        assert str(words[-1]) in done.stderr


def test_editable(source: Callable[[], Path], tmp_path: Path, built_plugin: Path) -> None:
    """The part in C lies beside its source then."""
    top = source()
    pip("install", "--target", tmp_path / "installed", "-e", top)
    assert list((top / "src" / "pynbdkit" / "native").glob("_symbols*.so"))
    works({**os.environ, "PYTHONPATH": str(top / "src")}, built_plugin)


def test_pkg_config_finds_the_header(tmp_path: Path) -> None:
    """By our name, and by the one that build files for nbdkit ask for."""
    lines = support.pynbdkit("--dump-config").stdout.splitlines()
    config = dict(line.split("=", 1) for line in lines)
    assert config["max_api_version"] == "2"
    assert Path(config["includedir"], "nbdkit-plugin.h").exists()
    pkg_config = support.program("pkg-config")
    environment = {**os.environ, "PKG_CONFIG_PATH": config["pkgconfigdir"]}
    (tmp_path / "mine.c").write_text(PLUGIN + "int ours = nbdkit_api_version_at_include;\n")
    for name in ("pynbdkit", "nbdkit >= 1.30"):
        flags = succeeded(run(pkg_config, "--cflags", "--libs", name, env=environment)).split()
        assert flags == [f"-I{config['includedir']}"]
        support.run("cc", "-shared", "-fPIC", *flags, tmp_path / "mine.c", "-o", tmp_path / "x.so")
