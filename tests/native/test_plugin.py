"""The life of a plugin in C beside the peer's: every callback, in order, whatever fails.

`life.c` writes each call that it gets to a file; both servers get the same arguments and the same
client, and the files are compared. Where ours is stricter, or says more, the test says so.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit.errors import ConfigError, LoadError, OpenError
from pynbdkit.session import Session

Built = Callable[..., Path]
OURS = [sys.executable, "-m", "pynbdkit"]
CLIENT = """\
import os, sys
sys.path.append("/usr/lib/python3/dist-packages")
import nbd
def connect(name="", **options):
    h = nbd.NBD()
    h.set_export_name(name)
    h.add_meta_context("base:allocation")
    h.connect_unix(os.environ["unixsocket"])
    return h
"""
QUESTIONS = frozenset(
    (
        *("get_size", "block_size", "can_write", "can_zero", "can_fast_zero", "can_trim"),
        *("can_fua", "can_flush", "is_rotational", "can_multi_conn", "can_cache", "can_extents"),
    )
)


class Lived:
    """What came of a server: the plugin's calls, its output, its exit status."""

    def __init__(self, calls: list[str], status: int, stdout: str, stderr: str) -> None:
        self.calls = calls
        self.status = status
        self.stdout = stdout
        self.stderr = stderr

    @property
    def steps(self) -> list[str]:
        """The calls, with the questions between two others sorted: their order is the server's.

        So are two that close one after the other: each has a thread of its own. The peer asks for
        the description only if the client does; that is left out.
        """
        found: list[str] = []
        asked: list[str] = []
        for call in [*self.calls, ""]:
            if call in QUESTIONS or call.startswith("close "):
                asked.append(call)
            elif call != "export_description":
                found += [*sorted(asked), call]
                asked = []
        return found[:-1]


@pytest.fixture
def lives(built: Built, tmp_path: Path) -> Callable[..., Lived]:
    """lives(server, "a=1", "--run", "…", LIFE_FAIL="open"): a server's whole life."""
    path = built("life")
    numbers = iter(range(1000))

    def run(
        server: list[str], *arguments: str, client: str = "", version: int = 2, **more: str
    ) -> Lived:
        log = tmp_path / f"calls-{next(numbers)}"
        log.touch()
        plugin = path if version == 2 else built("life", "-DNBDKIT_API_VERSION=1")
        words = [*server, str(plugin), *arguments]
        if client:
            script = tmp_path / "client.py"
            script.write_text(CLIENT + client)
            words += ["-U", "-", "--run", f"export uri unixsocket; {sys.executable} {script}"]
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, **more, "LIFE_LOG": str(log)},
        )
        return Lived(log.read_text().splitlines(), done.returncode, done.stdout, done.stderr)

    return run


Lives = Callable[..., Lived]

EVERYTHING = """
h = connect()
assert h.pread(512, 0) == bytes(512)
h.pwrite(b"x" * 512, 512)
h.pwrite(b"y" * 512, 512, nbd.CMD_FLAG_FUA)
assert h.pread(512, 512) == b"y" * 512
h.zero(512, 512)
h.zero(512, 512, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(512, 512, nbd.CMD_FLAG_FAST_ZERO)
h.trim(512, 0)
h.trim(512, 0, nbd.CMD_FLAG_FUA)
h.flush()
h.cache(512, 1024)
h.block_status(4096, 0, lambda *a: 0)
h.block_status(4096, 0, lambda *a: 0, nbd.CMD_FLAG_REQ_ONE)
second = connect("other")
assert second.pread(512, 512) == bytes(512)
second.shutdown()
h.shutdown()
"""


@pytest.mark.parametrize("version", [1, 2])
def test_a_whole_life(lives: Lives, peer: str, version: int) -> None:
    """Two clients and every request: the same calls, flags and order."""
    client = EVERYTHING
    if version == 1:  # which cannot be told to be fast: both fail, and the client has to expect it
        client = client.replace("h.zero(512, 512, nbd.CMD_FLAG_FAST_ZERO)\n", "")
    arguments = ("a=1", "bare", "b=x y=z", "c=")
    ours, theirs = (
        lives(server, *arguments, client=client, version=version) for server in (OURS, [peer])
    )
    assert (ours.status, theirs.status) == (0, 0), ours.stderr + theirs.stderr
    if version == 1:
        assert "zero 512 512 1" in ours.calls
        assert "zero 512 512 0" in ours.calls
    assert ours.steps == theirs.steps
    assert ours.calls[:7] == [
        "load", "config a=1", "config magic=bare", "config b=x y=z", "config c=",
        "config_complete", "thread_model",
    ]  # fmt: skip
    assert ours.steps[-4:] == ["close 1", "close 2", "cleanup", "unload"]
    assert "Traceback" not in ours.stderr


def test_readonly(lives: Lives, peer: str) -> None:
    """-r: the plugin is told; nothing that writes is asked or called."""
    client = """
h = connect()
assert h.is_read_only() and not h.can_trim() and not h.can_fua()
h.set_strict_mode(0)
for refused in (lambda: h.pwrite(b"x" * 512, 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)):
    try:
        refused()
    except nbd.Error as error:
        assert error.errno in ("EPERM", "EINVAL"), error
    else:
        sys.exit("not refused")
h.shutdown()
"""
    ours, theirs = (lives(server, "-r", client=client) for server in (OURS, [peer]))
    assert (ours.status, theirs.status) == (0, 0), ours.stderr + theirs.stderr
    assert ours.steps == theirs.steps
    assert "preconnect readonly=1" in ours.calls
    assert "open readonly=1 export=main" in ours.calls
    assert "can_trim" not in ours.calls


def test_exports(lives: Lives, peer: str) -> None:
    """The list: names, descriptions, the default's name in its place."""
    listing = """
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(os.environ["uri"])
found = []
h.opt_list(lambda name, description: found.append((name, description)) and 0)
h.opt_abort()
print(found)
"""
    for variables, wanted in (
        ({}, [("one", "the first"), ("two", ""), ("main", "")]),
        ({"LIFE_FAIL": "default_export"}, [("one", "the first"), ("two", "")]),
        ({"LIFE_WITHOUT": "default_export"}, [("one", "the first"), ("two", ""), ("", "")]),
        ({"LIFE_WITHOUT": "list_exports"}, [("main", "")]),
        ({"LIFE_WITHOUT": "list_exports", "LIFE_FAIL": "default_export"}, []),
    ):
        ours, theirs = (lives(server, client=listing, **variables) for server in (OURS, [peer]))
        assert eval(ours.stdout) == wanted, variables
        assert ours.stdout == theirs.stdout


def test_no_default_export(lives: Lives, peer: str) -> None:
    """default_export is NULL: "" opens nothing, a name does."""
    client = """
try:
    connect()
    print("opened")
except nbd.Error as error:
    print("refused")
print(connect("one").get_size())
"""
    for server in (OURS, [peer]):
        lived = lives(server, client=client, LIFE_FAIL="default_export")
        assert lived.stdout.split() == ["refused", "65536"]
        assert "open readonly=0 export=one" in lived.calls


def test_no_description(lives: Lives) -> None:
    """export_description is NULL: no error, no text."""
    client = """
h = nbd.NBD()
h.set_full_info(True)
h.connect_uri(os.environ["uri"])
try:
    print(h.get_export_description())
except nbd.Error:
    print("none")
"""
    assert lives(OURS, client=client).stdout == "about it\n"
    for variables in ({"LIFE_FAIL": "export_description-silently"},
                      {"LIFE_WITHOUT": "export_description"}):  # fmt: skip
        assert lives(OURS, client=client, **variables).stdout == "none\n"


@pytest.mark.parametrize(
    "step", ["config", "config_complete", "thread_model", "get_ready", "after_fork"]
)
@pytest.mark.parametrize("silently", ["", "-silently"])
def test_a_step_that_fails(lives: Lives, peer: str, step: str, silently: str) -> None:
    """The server ends with 1; the log has the plugin's message, and which step it was."""
    ours = lives(OURS, "a=1", client="sys.exit('served')", LIFE_FAIL=step + silently)
    assert ours.status == 1
    lines = ours.stderr.splitlines()
    if not silently:
        assert lines.pop(0) == f"pynbdkit: error: {step} was told to fail, 100%"
    [line] = lines
    assert line == {
        "config": "pynbdkit: error: life does not take a=1",
    }.get(step, f"pynbdkit: error: life: {step} failed")
    if step == "after_fork":
        return  # the peer waits for the command there
    theirs = lives([peer], "a=1", client="sys.exit('served')", LIFE_FAIL=step + silently)
    assert theirs.status == 1
    ends = [call for call in ours.calls if call not in theirs.calls]
    assert [call for call in ours.calls if call in theirs.calls] == theirs.calls
    assert ends in ([], ["unload"])  # the peer leaves it out; what was loaded is unloaded here


@pytest.mark.parametrize(
    "step", ["preconnect", "open", "get_size", "can_write", "can_fua", "can_cache", "block_size"]
)
@pytest.mark.parametrize("silently", ["", "-silently"])
def test_a_client_that_fails(lives: Lives, step: str, silently: str) -> None:
    """From preconnect on a failure ends this client's connection, and the server goes on."""
    client = """
for _ in range(2):
    try:
        connect()
        sys.exit("opened")
    except nbd.Error:
        pass
"""
    lived = lives(OURS, client=client, LIFE_FAIL=step + silently)
    assert lived.status == 0, lived.stderr
    assert "Traceback" not in lived.stderr
    lines = lived.stderr.splitlines()
    assert len(lines) == (2 if silently else 4)
    for line in lines[not silently :: 1 if silently else 2]:
        assert step in line or "life refuses this client" in line, line
        assert line.startswith("pynbdkit: life["), line
    opened = sum(call.startswith("open ") for call in lived.calls)
    failed_open = step in ("open", "preconnect")
    assert sum(call.startswith("close ") for call in lived.calls) == (0 if failed_open else opened)
    assert lived.calls[-2:] == ["cleanup", "unload"]


@pytest.mark.parametrize("size", ["-1", "-5", "9223372036854775807", "0"])
def test_sizes(lives: Lives, size: str) -> None:
    """A negative size is refused with a line; the largest and the smallest one are served."""
    client = """
try:
    print(connect().get_size())
except nbd.Error:
    print("refused")
"""
    lived = lives(OURS, client=client, LIFE_SIZE=size)
    if int(size) < 0:
        assert lived.stdout == "refused\n"
        [line] = lived.stderr.splitlines()
        assert "life: get_size" in line
    else:
        assert lived.stdout == f"{size}\n"
    assert lived.status == 0


def test_a_failing_request(lives: Lives) -> None:
    """The client gets an errno; the log has the message and the place; the connection goes on."""
    client = """
h = connect()
for call in (lambda: h.pread(512, 512), lambda: h.pwrite(b"x" * 512, 512), h.flush,
             lambda: h.pread(512, 512)):
    try:
        call()
        print("good")
    except nbd.Error as error:
        print(error.errno)
h.shutdown()
"""
    lived = lives(OURS, client=client, LIFE_FAIL="pread")
    assert lived.stdout.split() == ["EIO", "good", "good", "EIO"]
    assert lived.stderr.count("pread was told to fail, 100%") == 2
    assert re.search(r"life\[1\]: error: life: pread: offset 512, count 512: ", lived.stderr)
    assert "Traceback" not in lived.stderr


def test_dump_plugin(lives: Lives, peer: str) -> None:
    """What is printed by the plugin itself comes along; so do its facts; nothing is opened."""
    for arguments in ((), ("a=1",)):
        ours, theirs = (lives(server, "--dump-plugin", *arguments) for server in (OURS, [peer]))
        assert (ours.status, theirs.status) == (0, 0)
        printed, expected = (set(it.stdout.splitlines()) for it in (ours, theirs))
        assert "life_of=42" in printed
        assert ours.calls == theirs.calls
        for line in (
            "name=life", "version=1.2.3", "api_version=2", "errno_is_preserved=1",
            "magic_config_key=magic", "has_pread=1", "has_thread_model=1", "has_can_fua=1",
            "thread_model=serialize_all_requests", "has_after_fork=1",
        ):  # fmt: skip
            assert line in printed
            assert line in expected
        assert "open" not in " ".join(ours.calls)
        assert ours.calls[0] == "load"
        assert ours.calls[-2:] == ["dump_plugin", "unload"]
    assert "api_version=1" in lives(OURS, "--dump-plugin", version=1).stdout


def test_help_and_version(lives: Lives) -> None:
    """The plugin's texts; nothing of it is called."""
    shown = lives(OURS, "--help")
    assert shown.status == 0
    assert "plugin: life (a life)\n" in shown.stdout
    assert "writes down its life\nKEY=VALUE    whatever you like\n" in shown.stdout
    assert shown.calls == []
    assert "life 1.2.3\n" in lives(OURS, "--version").stdout


def test_the_background(built: Built, sockdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """after_fork runs in the process that serves, all before it in the one that was started."""
    log, pidfile, socket = (sockdir / name for name in ("log", "pid", "socket"))
    monkeypatch.setenv("LIFE_LOG", str(log))
    support.run(*OURS, built("life"), "-U", socket, "-P", pidfile)
    pid = int(pidfile.read_text())
    try:
        assert support.run("nbdinfo", "--size", f"nbd+unix:///?socket={socket}").stdout == "65536\n"
    finally:
        ended = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        import select

        select.select([ended], [], [], 30)
        os.close(ended)
    calls = log.read_text().splitlines()
    assert [call.split()[0] for call in calls[:5]] == [
        "load", "config_complete", "thread_model", "get_ready", "after_fork",
    ]  # fmt: skip
    assert "open readonly=0 export=main" in calls  # the plugin may ask the server in the child, too
    assert calls[-2:] == ["cleanup", "unload"]
    assert calls.count("load") == calls.count("unload") == calls.count("cleanup") == 1


# -- nonsense --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"LIFE_NULL": "1"}, "plugin_init returned NULL"),
        ({"LIFE_STRUCT_SIZE": "16"}, "its structure says that it has 16 bytes"),
        ({"LIFE_STRUCT_SIZE": "300"}, "its structure says that it has 300 bytes"),
        ({"LIFE_API_VERSION": "0"}, "the plugin wants API version 0; supported are 1 and 2"),
        ({"LIFE_API_VERSION": "3"}, "the plugin wants API version 3; supported are 1 and 2"),
        ({"LIFE_API_VERSION": "-7"}, "the plugin wants API version -7; supported are 1 and 2"),
        ({"LIFE_THREAD_MODEL": "7"}, "thread model 7 is unknown (0 to 3)"),
        ({"LIFE_THREAD_MODEL": "-1"}, "thread model -1 is unknown (0 to 3)"),
        ({"LIFE_NAME": ""}, "the plugin has no name"),
        ({"LIFE_NAME": "two words"}, "the plugin's name is 'two words'"),
        ({"LIFE_NAME": "sl/ash"}, "the plugin's name is 'sl/ash'"),
        ({"LIFE_WITHOUT": "open"}, "the plugin has no .open callback"),
        ({"LIFE_WITHOUT": "get_size"}, "the plugin has no .get_size callback"),
        ({"LIFE_WITHOUT": "pread"}, "the plugin has no .pread callback"),
    ],
)
def test_nonsense(lives: Lives, variables: dict[str, str], words: str) -> None:
    """One line that names the file and what is wrong with it; exit status 1."""
    lived = lives(OURS, client="pass", **variables)
    assert lived.status == 1
    [line] = lived.stderr.splitlines()
    assert words in line
    assert "life-" in line  # the file's name
    assert lived.calls == []


def test_a_thread_model_that_there_is_not(lives: Lives) -> None:
    """What thread_model answers is checked, too."""
    lived = lives(OURS, client="pass", LIFE_MODEL="9")
    assert lived.status == 1
    [line] = lived.stderr.splitlines()
    assert line == "pynbdkit: error: life: thread_model is 9, not 0 to 3"


def test_files_that_cannot_be_loaded(built: Built, tmp_path: Path) -> None:
    """Text, nothing, an undefined symbol, no plugin_init: one line with the file's name."""
    text, empty, undefined, other = (
        tmp_path / name for name in ("text.so", "empty.so", "undefined.so", "other.so")
    )
    text.write_text("int main;\n" * 100)
    empty.touch()
    built("life")
    for path, code in (
        (undefined, "int nbdkit_no_such_thing (void); int plugin_init (void)"
                    " { return nbdkit_no_such_thing (); }"),
        (other, "int filter_init (void) { return 1; }"),
    ):  # fmt: skip
        source = path.with_suffix(".c")
        source.write_text(code)
        support.run("cc", "-shared", "-fPIC", "-o", path, source)
    for path, words in (
        (text, "invalid ELF header"),
        (empty, "file too short"),
        (undefined, "undefined symbol: nbdkit_no_such_thing"),
        (other, "it has no function plugin_init"),
        (tmp_path / "missing.so", "No such file"),
    ):
        done = support.pynbdkit(path, "--run", "true")
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert path.name in line
        assert words in line
        assert line.count(str(path)) == 1, line


def test_nothing_is_taken(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin without config takes no parameter, and says so."""
    monkeypatch.setenv("LIFE_WITHOUT", "config")
    plugin = pynbdkit.load_plugin(str(built("life")))
    with pytest.raises(ConfigError, match="life takes no parameters: a=1"):
        plugin.config("a", "1")


def test_without_a_magic_key(lives: Lives, peer: str) -> None:
    """The first bare word is the script, a second one a mistake."""
    for server in (OURS, [peer]):
        lived = lives(server, "bare", client="pass", LIFE_WITHOUT="magic_config_key")
        assert "config script=bare" in lived.calls
        assert lives(server, "a=1", "bare", LIFE_WITHOUT="magic_config_key").status == 1


# -- in this process -------------------------------------------------------------------------------


def test_one_file_twice(built: Built, nbd: Any) -> None:
    """Two plugins of one file in one process: neither knows of the other's disk."""
    path = str(built("life", "-DTHREAD_MODEL=3"))
    first, second = pynbdkit.load_plugin(path), pynbdkit.load_plugin(path)
    with pynbdkit.serve(first) as one, pynbdkit.serve(second) as two:
        clients = []
        for server in (one, two):
            client = nbd.NBD()
            client.connect_uri(server.uri)
            clients.append(client)
        clients[0].pwrite(b"1" * 512, 0)
        clients[1].pwrite(b"2" * 512, 0)
        assert [bytes(client.pread(2, 0)) for client in clients] == [b"11", b"22"]
        for client in clients:
            client.shutdown()


def test_parameters_in_python(nbd: Any, peer: str) -> None:
    """load_plugin takes parameters for the peer's own plugins as for ours."""
    folder = support.run(peer, "--dump-config").stdout.split("plugindir=")[1].split("\n")[0]
    path = f"{folder}/nbdkit-memory-plugin.so"
    if not Path(path).exists():
        support.missing(path)
    plugins = [pynbdkit.load_plugin(path, size=f"{number}M") for number in (1, 2)]
    with pynbdkit.serve(plugins[0]) as one, pynbdkit.serve(plugins[1]) as two:
        for number, server in ((1, one), (2, two)):
            client = nbd.NBD()
            client.connect_uri(server.uri)
            assert client.get_size() == number << 20
            client.pwrite(bytes([number]) * 65536, 4096)
            assert client.pread(65536, 4096) == bytes([number]) * 65536
            client.shutdown()


def test_the_file_is_replaced(built: Built, tmp_path: Path) -> None:
    """A file that was compiled anew under its old name is loaded as it is now."""
    built("life")
    names = []
    for name in ("before", "after"):
        source, path = tmp_path / "source.c", tmp_path / "plugin.so"
        source.write_text(
            "#define NBDKIT_API_VERSION 2\n#include <nbdkit-plugin.h>\n#define THREAD_MODEL 3\n"
            "static void *o (int r) { return NBDKIT_HANDLE_NOT_NEEDED; }\n"
            "static int64_t s (void *h) { return 0; }\n"
            "static int p (void *h, void *b, uint32_t c, uint64_t o, uint32_t f) { return 0; }\n"
            f'static struct nbdkit_plugin plugin = {{ .name = "{name}", .open = o, .get_size = s,'
            " .pread = p };\nNBDKIT_REGISTER_PLUGIN (plugin)\n"
        )
        path.unlink(missing_ok=True)
        support.run("cc", "-shared", "-fPIC", "-o", path, source)
        names.append(pynbdkit.load_plugin(str(path)).name)
    assert names == ["before", "after"]


def test_the_part_in_c_is_missing(tmp_path: Path) -> None:
    """Without the compiled library: one line for plugins in C, and all else works."""
    import shutil

    home = Path(pynbdkit.__file__).parent
    shutil.copytree(
        home, tmp_path / "pynbdkit", ignore=shutil.ignore_patterns("_symbols*", "__pycache__")
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    plugin = tmp_path / "some.so"
    plugin.write_bytes(b"\x7fELF")
    done = support.pynbdkit(plugin, "--run", "true", env=environment, cwd=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"pynbdkit: error: {plugin}: a plugin in C needs the part of pynbdkit")
    assert "install a C compiler" in line
    done = support.pynbdkit(
        "-U", "-", "memory", "1M", "--run", "nbdinfo --size $nbd", env=environment, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "1048576\n"), done.stderr


def test_a_filter_changes_the_export(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """open sees the name that the layer above asks for, not the client's."""
    monkeypatch.delenv("LIFE_LOG", raising=False)
    monkeypatch.setenv("LIFE_FAIL", "")
    plugin = pynbdkit.load_plugin(str(built("life")))
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"life-{os.getpid()}"
    monkeypatch.setenv("LIFE_LOG", str(log))
    try:
        plugin.open(Session(export_name="below"))
        assert "open readonly=0 export=below" in log.read_text()
    finally:
        log.unlink(missing_ok=True)


def test_open_errors_are_for_the_client(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open that fails is an OpenError with the plugin's name."""
    monkeypatch.setenv("LIFE_FAIL", "open-silently")
    plugin = pynbdkit.load_plugin(str(built("life")))
    with pytest.raises(OpenError, match=r"^life: open failed"):
        plugin.open(Session())
    with pytest.raises(LoadError):
        pynbdkit.load_plugin("/nonexistent/plugin.so")


def test_debug_flags(built: Built, peer: str, tmp_path: Path) -> None:
    """-D flags.flag=N sets the plugin's variable before it is loaded; unknown ones are told."""
    source, path = tmp_path / "flags.c", tmp_path / "flags.so"
    source.write_text(
        "#define NBDKIT_API_VERSION 2\n#include <stdio.h>\n#include <nbdkit-plugin.h>\n"
        "#define THREAD_MODEL 3\nint flags_debug_a_b = 1;\n"
        'static void l (void) { fprintf (stderr, "flag %d\\n", flags_debug_a_b); }\n'
        "static void *o (int r) { return NBDKIT_HANDLE_NOT_NEEDED; }\n"
        "static int64_t s (void *h) { return 0; }\n"
        "static int p (void *h, void *b, uint32_t c, uint64_t o, uint32_t f) { return 0; }\n"
        'static struct nbdkit_plugin plugin = { .name = "flags", .open = o, .get_size = s,'
        " .pread = p, .load = l };\nNBDKIT_REGISTER_PLUGIN (plugin)\n"
    )
    built("life")
    support.run("cc", "-shared", "-fPIC", "-o", path, source)
    for server in (OURS, [peer]):
        done = support.run(*server, path, "-U", "-", "-D", "flags.a.b=42", "--run", "true")
        assert "flag 42\n" in done.stderr
    done = support.run(*OURS, path, "-U", "-", "-D", "flags.none=1", "--run", "true")
    assert "-D flags.none is not used" in done.stderr


def test_lists_leave_nothing(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list that a plugin fills is freed."""
    monkeypatch.delenv("LIFE_LOG", raising=False)
    plugin: Any = pynbdkit.load_plugin(str(built("life")))

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    for _ in range(1000):
        assert len(list(plugin.list_exports(False, False))) == 3
    before = resident()
    for _ in range(20000):
        plugin.list_exports(False, False)
    assert resident() - before < 1 << 20  # 350 bytes each would be 7 MiB


def test_threads_are_not_left(built: Built, nbd: Any) -> None:
    """A server in this process that ends leaves no thread behind."""
    before = set(threading.enumerate())
    with pynbdkit.serve(pynbdkit.load_plugin(str(built("life")))) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        client.pread(512, 0)
        client.shutdown()
    assert set(threading.enumerate()) <= before
