"""`cc`: source code as the first parameter, compiled and served in one step."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import support
from command import COMMAND
from pynbdkit.plugin import Plugin
from pynbdkit.plugins._inner import InnerPlugin
from pynbdkit.plugins.cc import HEADERS, Cc

RAM = """\
#include <stdio.h>
#include <string.h>
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#define THREAD_MODEL NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS
#ifndef FILL
#define FILL 'f'
#endif
static unsigned char disk[1 << 16];
static int fill = FILL;
static int ram_config (const char *key, const char *value)
{
  if (strcmp (key, "fill") != 0) {
    nbdkit_error ("what is %s?", key);
    return -1;
  }
  return nbdkit_parse_int (key, value, &fill);
}
static int ram_complete (void)
{
  memset (disk, fill, sizeof disk);
  return 0;
}
static void ram_dump (void) { printf ("mine=yes\\n"); }
static int ram_model (void) { return NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS; }
static void *ram_open (int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t ram_size (void *handle) { return sizeof disk; }
static int ram_read (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  memcpy (buf, disk + offset, count);
  return 0;
}
static int ram_write (void *h, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  memcpy (disk + offset, buf, count);
  return 0;
}
static struct nbdkit_plugin plugin = {
  .name = "ram",
  .config = ram_config,
  .config_complete = ram_complete,
  .config_help = "fill=<N>  The byte that is everywhere.",
  .open = ram_open,
  .get_size = ram_size,
  .dump_plugin = ram_dump,
  .pread = ram_read,
  .pwrite = ram_write,
  .magic_config_key = "fill",
  .thread_model = ram_model,
};
NBDKIT_REGISTER_PLUGIN (plugin)
"""
OLD = RAM.replace("#define NBDKIT_API_VERSION 2\n", "").replace(", uint32_t flags)", ")")
SIZE = 1 << 16


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go: a folder that has to be empty again in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    support.program("cc")
    path = tmp_path / "ram.c"
    path.write_text(RAM)
    return path


def tool(path: Path, script: str) -> Path:
    """A program."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_serves_what_nbdkit_serves(
    ram: Path, serve: Callable[..., Any], connect: Callable[..., Any], sockdir: Path
) -> None:
    """The same source, the same parameters, the same requests."""
    support.program("nbdkit")
    (sockdir / "peer").mkdir()
    words: list[str | Path] = ["cc", ram, "fill=0x41"]
    ours = serve(*words)
    with support.ServerProcess(sockdir / "peer", words, [support.program("nbdkit")]) as theirs:
        found = []
        for server in (ours, theirs):
            handle = connect(server)
            handle.pwrite(b"written" * 100, 1234)
            flags = (handle.is_read_only(), handle.can_flush(), handle.can_trim(), handle.can_fua())
            found.append((bytes(handle.pread(SIZE, 0)), handle.get_size(), flags))
            handle.shutdown()  # nbdkit waits for its clients when it stops
    assert found[0] == found[1]
    data = found[0][0]
    assert data[:1234] == b"A" * 1234
    assert data[1234:1934] == b"written" * 100


def test_version_1_too(
    tmp_path: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    """Which nbdkit refuses."""
    support.program("cc")
    (tmp_path / "old.c").write_text(OLD)
    done = support.pynbdkit("cc", tmp_path / "old.c", "--dump-plugin")
    assert "\napi_version=1\n" in done.stdout, done.stderr
    assert bytes(connect(serve("cc", tmp_path / "old.c")).pread(9, 5)) == b"f" * 9


def test_from_stdin(temporary: Path) -> None:
    support.program("cc")
    then = f'nbdinfo --size "$uri"; ls {temporary} | grep -c cc-; true'
    done = subprocess.run(
        [*COMMAND, "-U", "-", "cc", "-", "fill=7", "--run", then],
        input=RAM,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, f"{SIZE}\n0\n"), done.stderr
    assert list(temporary.iterdir()) == []


def test_not_from_a_stdin_that_is_the_clients() -> None:
    words = [*COMMAND, "-s", "cc", "-"]
    done = subprocess.run(words, input=RAM, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "cannot be read from stdin" in done.stderr


def test_an_executable_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support.program("cc")
    script = tmp_path / "disk.c"
    script.write_text('#if 0\nexec pynbdkit cc "$0" "$@"\n#endif\n' + RAM)
    script.chmod(0o755)
    tool(tmp_path / "pynbdkit", f'exec {shlex.join(COMMAND)} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    line = f"""{script} -U - fill=66 --run 'nbdinfo --size "$uri"'"""
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{SIZE}\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "f"),
        (["fill=0x42"], "B"),
        (["0x43"], "C"),
        (["EXTRA_CFLAGS=-DFILL=\"'D'\" -g0"], "D"),
        (["fill=69", "EXTRA_CFLAGS=-DFILL=\"'D'\"", "CC=gcc"], "E"),
        (["EXTRA_CFLAGS=-DFILL=`echo 70`"], "F"),
        (["CFLAGS=-shared -fPIC -DFILL=71"], "G"),
        (["CC=gcc -DFILL=72"], "H"),
    ],
)
def test_parameters(
    words: list[str],
    expected: str,
    ram: Path,
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    temporary: Path,
) -> None:
    server = serve("cc", ram, *words)
    assert bytes(connect(server).pread(3, SIZE - 3)) == expected.encode() * 3
    assert list(temporary.iterdir()) == []


def test_cplusplus(tmp_path: Path, serve: Callable[..., Any], connect: Callable[..., Any]) -> None:
    support.program("g++")
    source = tmp_path / "ram.cpp"
    source.write_text("#include <array>\nstatic std::array<int, 3> three;\n" + RAM)
    server = serve("cc", "CC=g++", source, "fill=88")
    assert bytes(connect(server).pread(4, 0)) == b"XXXX"


def test_any_compiler_that_knows_o(ram: Path, tmp_path: Path) -> None:
    """Flags, source, -o, what to make: nothing else is asked of it; stdin and stdout are ours."""
    other = tool(
        tmp_path / "other",
        'echo "compiling $2$(cat)"\n[ "$# $1 $3" = "4 -magic -o" ] || exit 9\n'
        'exec gcc -shared -fPIC "-I$HERE" "$2" -o "$4"',
    )
    done = subprocess.run(
        [*COMMAND, "cc", ram, f"CC={other}", "CFLAGS=-magic", "--dump-plugin"],
        env={**os.environ, "HERE": HEADERS},
        input="for a client",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "mine=yes" in done.stdout
    assert all("=" in line for line in done.stdout.splitlines())
    assert f"compiling {ram}\n" in done.stderr


def test_the_header_is_ours_unless_the_user_says_so(ram: Path, tmp_path: Path) -> None:
    """Folders that the user names come first, whether by flag or by variable."""
    ram.write_text(RAM + "#ifndef NBDKIT_CALLBACKS_HAVE_FLAGS\n#error not ours\n#endif\n")
    assert support.pynbdkit("cc", ram, "--dump-plugin").returncode == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "nbdkit-plugin.h").write_text("#error theirs\n")
    by_flag = support.pynbdkit("cc", ram, f"EXTRA_CFLAGS=-I{tmp_path}/theirs", "--dump-plugin")
    by_variable = support.pynbdkit(
        "cc", ram, "--dump-plugin", env={**os.environ, "CPATH": f"{tmp_path}/theirs"}
    )
    for done in (by_flag, by_variable):
        assert done.returncode == 1
        assert "#error theirs" in done.stderr


def test_what_the_compiler_says_is_shown(tmp_path: Path, temporary: Path) -> None:
    support.program("cc")
    (tmp_path / "bad.c").write_text("int x = ;\n")
    done = support.pynbdkit("cc", tmp_path / "bad.c")
    *said, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert said[0].startswith(f"{tmp_path}/bad.c:1:9: error:")
    assert last == (
        f"pynbdkit: error: {tmp_path}/bad.c: not compiled: cc failed with exit status 1"
    )
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "the first parameter must be the source"),
        (["fill=1"], "the first parameter must be the source"),
        (["fill=1", "ram.c"], "the first parameter must be the source"),
        (["no.c"], "no.c: No such file"),
        (["."], "Is a directory"),
        (["ram.c", "CC=nosuch-compiler"], "nosuch-compiler failed with exit status 127"),
        (["ram.c", "CC=true"], "true has made no file"),
        (["ram.c", "colour=blue"], "colour=blue"),
        (["ram.c", "3", "CFLAGS=-O3"], "CFLAGS= must come before"),
        (["empty.c"], "empty.c: not a plugin: it has no function plugin_init"),
    ],
)
def test_mistakes(words: list[str], expected: str, ram: Path, temporary: Path) -> None:
    (ram.parent / "empty.c").touch()
    done = support.pynbdkit("cc", *words, cwd=ram.parent)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pynbdkit: error: ")
    assert expected in last
    assert str(temporary) not in last
    assert list(temporary.iterdir()) == []


def test_dump_plugin_and_help(ram: Path) -> None:
    done = support.pynbdkit("cc", ram, "--dump-plugin")
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert found["path"] == str(ram)
    assert found["name"] == "cc"
    assert found["api_version"] == "2"
    assert found["struct_size"] == "384"
    assert found["max_thread_model"] == "serialize_requests"
    assert found["thread_model"] == "serialize_all_requests"
    assert found["CC"] == "cc"
    assert "-shared" in found["CFLAGS"]
    assert found["mine"] == "yes"
    assert "has_pwrite" in found
    assert "has_flush" not in found
    without = support.pynbdkit("cc", "--dump-plugin").stdout
    assert "\nCC=cc\n" in without
    assert "EXTRA_CFLAGS=" in support.pynbdkit("cc", "--help").stdout


def test_every_step_reaches_the_plugin() -> None:
    steps = {name for name, step in vars(Plugin).items() if callable(step) and name[0] != "_"}
    assert steps - set(vars(Cc)) - set(vars(InnerPlugin)) == {"load"}
