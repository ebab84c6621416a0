"""The command line: as nbdkit's users know it, one line for a mistake, quick to start."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from command import COMMAND
from raw import Raw
from support import ServerProcess, program, pynbdkit

Serve = Callable[..., ServerProcess]
Connect = Callable[..., Any]

SAME = r"""
no command line at all    | no plugin
--version
-V
--help
--dump-config
nosuch --version          | 'nosuch'
-V nosuch                 | 'nosuch'
nosuch --help             | 'nosuch'
nosuch --dump-plugin      | 'nosuch'
--filter=nosuch null --version | 'nosuch'
memory --help
memory --version
memory 1M --version
--help memory bad=param
--dump-config memory
--exit-with-parent --version
--dump-plugin             | --dump-config
memory --dump-plugin
memory 1M --dump-plugin
memory size=bad --dump-plugin  | 'bad'
memory foo=bar --dump-plugin   | 'foo'
''                        | plugin ''
memory ''                 | size
memory                    | size=
memory bad                | 'bad'
memory foo=bar            | 'foo'
memory SIZE=1M            | 'SIZE'
memory =1M                | '=1M'
memory size=              | size
-- memory                 | size=
--                        | plugin
-                         | plugin '-'
--run true                | plugin
-U - memory 1M --run true
-U - memory 1M 2M --run true
-U - --run true memory size=1M -r -n -f
-U - --run true null
-U - --run true -- memory 1M
-U - --run true memory -- 1M
-U - -- memory 1M --run true   | '--run'
-U - --run true memory -- -5   | negative
-Urnf memory 1M --run true -U -
-U - --fil=log memory 1M logfile=/dev/null --run true
-U - --re --ver 1M        | '--ver' is ambiguous
-U - --ip memory 1M --run true | '--ip' is ambiguous
-U - --verb memory 1M --run true
-U - --verbose=1 memory 1M --run true | '--verbose' takes no value
-U - -x memory 1M         | '-x'
-U - --nosuch memory 1M   | '--nosuch'
-U                        | '-U' needs a value
--filter                  | '--filter' needs a value
--nosuch --version        | '--nosuch'
--version --nosuch        | '--nosuch'
-U - -t 0 memory 1M --run true
-U - -t -1 memory 1M --run true          | --threads: '-1'
-U - -t abc memory 1M --run true         | --threads
-U - -t '' memory 1M --run true          | --threads
-U - -t 99999999999 memory 1M --run true | '99999999999'
-U - --mask-handshake=0x3 memory 1M --run true
-U - --mask-handshake=-1 memory 1M --run true  | --mask-handshake
-U - --mask-handshake=foo memory 1M --run true | --mask-handshake
-U - --log=foo memory 1M --run true      | --log=foo
-U - --log=null memory 1M --run true
-U - --tls=off memory 1M --run true
-U - --tls=foo memory 1M --run true      | --tls=foo
-U - --tls=require memory 1M --run true  | certificate
-U - --tls-psk=/nonexistent memory 1M --run true              | TLS:
-U - --tls=require --tls-certificates=/nonexistent memory 1M --run true | /nonexistent
-U - --tls-psk= memory 1M --run true     | '--tls-psk'
-U - -o memory 1M --run true
-U - -o -e name --no-sr memory 1M --run true
-U - --tls=off -o memory 1M --run true
-U - --tls=require -o memory 1M --run true  | -o and --tls=require
-U - --swap memory 1M --run true
-U - --selinux-label=nonsense memory 1M --run true            | --selinux-label=nonsense: Invalid
-U - --selinux-label= memory 1M --run true                    | --selinux-label=: Invalid
--vsock -U - memory 1M --run true        | -U and --vsock
-s --vsock memory 1M                     | -s and --vsock
--vsock -p abc memory 1M --run true      | 'abc'
--vsock -p -1 memory 1M --run true       | '-1'
--vsock -p 4294967296 memory 1M --run true | '4294967296'
-U - -D foo memory 1M --run true         | -D foo
-U - -D foo.bar memory 1M --run true     | -D foo.bar
-U - -D .a=1 memory 1M --run true        | -D .a=1
-U - -D a.=1 memory 1M --run true        | -D a.=1
-U - -D memory.x=y memory 1M --run true  | -D memory.x
-U - -D nbdkit.backend.datapath=0 memory 1M --run true
-U - -D foo.bar=1 memory 1M --run true   | foo
-U - -p 10899 memory 1M --run true       | -U and -p
-s -U - memory 1M                        | -s and -U
-s -p 0 memory 1M                        | -s and -p
-s --run true memory 1M                  | -s and --run
-s -f memory 1M
-U '' memory 1M --run true               | '-U'
-U /nonexistent/x memory 1M --run true   | /nonexistent/x
-f -U - -P '' memory 1M                  | '-P'
-f -U - -P /nonexistent/x memory 1M      | /nonexistent/x
-f -U - -u '' memory 1M                  | -u
-f -U - -u nosuch memory 1M              | -u nosuch: no such user
-f -U - -g nosuch memory 1M              | -g nosuch: no such group
-i 192.0.2.1 -p 0 memory 1M --run true   | 192.0.2.1
-4 -i ::1 -p 0 memory 1M --run true      | ::1
-p abc memory 1M --run true              | 'abc'
-p -1 memory 1M --run true               | -1
-U - ./nosuch --run true                 | './nosuch'
-U - nosuch.py --run true                | 'nosuch.py'
-U - nosuch.so --run true                | 'nosuch.so'
-U - /etc/passwd --run true              | '/etc/passwd'
-U - / --run true                        | '/'
-U - python /nonexistent.py --run true   | /nonexistent.py
-U - memory 1M --run 'exit 42'
-U - memory 1M --run false
-U - memory 1M --run ''
-U - memory 1M --run 'exit 255'
-U - memory 1M --run 'kill -9 $$'        | signal 9
-U - memory 1M --run 'kill $$'           | signal 15
"""
"""Command lines to which nbdkit has the same exit status; what our message names, where we fail."""

DIFFERENT = r"""
-p 65536 memory 1M --run true            | 0 | 1 | port 65536 is out of range
-p '' memory 1M --run true               | 0 | 1 | '-p'
-i '' -p 0 memory 1M --run true          | 1 | 0 |
-U - --print-uri memory 1M --run true    | 1 | 0 |
-s --dump-plugin memory                  | 1 | 0 |
-U - --tls=on memory 1M --run true       | 0 | 1 | certificate
-U - --tls-verify-peer memory 1M --run true | 0 | 1 | certificate
-U - --tls-certificates=/nonexistent memory 1M --run true | 0 | 1 | /nonexistent
-U - --tls-certificates= memory 1M --run true | 0 | 1 | '--tls-certificates'
-U - --tls=on -o memory 1M --run true    | 0 | 1 | -o and --tls=on
-U - --tls-verify-peer -o memory 1M --run true | 0 | 1 | -o and --tls-verify-peer
-U - --tls=off --tls-verify-peer memory 1M --run true | 0 | 0 | --tls=off: --tls-verify-peer will
-U - --no-mc --no-eh memory 1M --run true | 1 | 0 |
-U - --keepalive memory 1M --run true    | 1 | 0 |
-U - --timeout 1.5s memory 1M --run true | 1 | 0 |
-U - --timeout 1h memory 1M --run true   | 1 | 1 | --timeout: could not parse
-U - --timeout=-1 memory 1M --run true   | 1 | 1 | --timeout: delay out of range
-U - --timeout 1000001 memory 1M --run true | 1 | 1 | --timeout: 1000001 is more than
-U - --unix-mode 600 memory 1M --run true | 1 | 0 |
-U - --unix-mode 888 memory 1M --run true | 1 | 1 | --unix-mode 888
-p 0 --unix-mode 600 memory 1M --run true | 1 | 1 | --unix-mode is for a Unix socket
"""
"""Where we decided otherwise: nbdkit's exit status, ours, what our message names."""


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def nbdkit(words: list[str], folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [program("nbdkit"), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        cwd=folder,
    )


def check_message(words: list[str], stderr: str, says: str) -> None:
    """A failure is one line that names its reason."""
    assert "Traceback" not in stderr, stderr
    if says:
        assert len(stderr.splitlines()) == 1, stderr
        assert stderr.startswith("pynbdkit: ")
        assert says in stderr
    elif "--verb" not in words:
        assert not stderr


FORKS = """\
import json, os, sys
import pynbdkit.cli.serve, pynbdkit.loader, pynbdkit.chain, pynbdkit.plugins.memory
from pynbdkit.cli.main import main
for number, words in enumerate(json.load(sys.stdin)):
    if not os.fork():
        os.mkdir(str(number))
        os.chdir(str(number))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, name in ((1, "../out"), (2, "../err")):
            os.dup2(os.open(name + str(number), os.O_WRONLY | os.O_CREAT), fd)
        status = main([os.fsdecode(bytes.fromhex(word)) for word in words])
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
"""Runs command lines in forks of one Python: a tenth of the time."""


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str
    left: list[str]


def ours(lines: Sequence[Sequence[bytes]], folder: Path) -> list[Done]:
    """Run our command line with each line's words, each in an empty folder of its own."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps([[word.hex() for word in words] for words in lines]),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        cwd=folder,
        check=True,
    )

    def text(name: str) -> str:
        return (folder / name).read_text(errors="replace")

    return [
        Done(int(status), text(f"out{n}"), text(f"err{n}"), os.listdir(folder / str(n)))
        for n, status in enumerate(done.stdout.split())
    ]


def lines_of(rows: list[list[str]]) -> list[list[bytes]]:
    return [
        [] if row[0].startswith("no command") else [w.encode() for w in shlex.split(row[0])]
        for row in rows
    ]


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    rows = table(SAME)
    done = ours(lines_of(rows), tmp_path_factory.mktemp("same"))
    return {row[0]: each for row, each in zip(rows, done, strict=True)}


@pytest.mark.parametrize("row", table(SAME), ids=lambda row: row[0])
def test_same_as_nbdkit(row: list[str], same: dict[str, Done], sockdir: Path) -> None:
    words = [word.decode() for word in lines_of([row])[0]]
    theirs = nbdkit(words, sockdir)
    done = same[row[0]]
    assert done.status == theirs.returncode, (done.stderr, theirs.stderr)
    check_message(words, done.stderr, row[1] if len(row) > 1 else "")
    assert bool(done.stdout) == bool(theirs.stdout) or theirs.returncode
    assert done.left == []


@pytest.fixture(scope="module")
def different(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    rows = table(DIFFERENT)
    done = ours(lines_of(rows), tmp_path_factory.mktemp("different"))
    return {row[0]: each for row, each in zip(rows, done, strict=True)}


@pytest.mark.parametrize("row", table(DIFFERENT), ids=lambda row: row[0])
def test_different_on_purpose(row: list[str], different: dict[str, Done], sockdir: Path) -> None:
    words = shlex.split(row[0])
    assert nbdkit(words, sockdir).returncode == int(row[1]), "nbdkit has changed: so should we?"
    assert different[row[0]].status == int(row[2]), different[row[0]].stderr
    check_message(words, different[row[0]].stderr, row[3])


# -- what a command line may be made of ------------------------------------------------------------


NO_TEXT = [
    [b"\xff"],
    [b"memory", b"\xff"],
    [b"memory", b"\xff=1"],
    [b"--\xff"],
    [b"-\xff"],
    [b"-U", b"-", b"-u", b"\xff", b"memory", b"1M"],
    [b"-U", b"-", b"-g", b"\xff", b"memory", b"1M"],
    [b"-i", b"\xff", b"memory", b"1M"],
    [b"-i", b"a" * 300 + b".example", b"memory", b"1M"],
    [b"-p", b"\xff", b"memory", b"1M"],
    [b"-t", b"\xff", b"memory", b"1M"],
    [b"-D", b"\xff", b"memory", b"1M"],
    [b"--log=\xff", b"memory", b"1M"],
    [b"--filter=\xff", b"memory", b"1M"],
    [b"-U", b"/\xff/x", b"memory", b"1M"],
    [b"-U", b"-", b"-P", b"/\xff/x", b"memory", b"1M", b"--run", b"true"],
    [b"./\xff.py"],
]


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    for words, done in zip(NO_TEXT, ours(NO_TEXT, tmp_path), strict=True):
        assert done.status == 1, words
        check_message([], done.stderr, ": ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--version >/dev/full", "pynbdkit: error: stdout: No space left on device\n"),
        ("memory --help >/dev/full", "pynbdkit: error: stdout: No space left on device\n"),
        ("memory --dump-plugin >/dev/full", "pynbdkit: error: stdout: No space left on device\n"),
        ("--version >&-", "pynbdkit: error: stdout: it is closed\n"),
        ("--dump-config >&-", "pynbdkit: error: stdout: it is closed\n"),
        ("--version >/dev/full 2>&-", ""),
        ("--help >/dev/full 2>/dev/full", ""),
    ],
)
def test_output_that_cannot_be_written(words: str, says: str) -> None:
    command = f"unset PYTHONUNBUFFERED; {shlex.join(COMMAND)} {words}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, says)


def test_a_reader_that_has_gone_is_no_news() -> None:
    read, write = os.pipe()
    os.close(read)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*COMMAND, "--help"], stdout=write, stderr=subprocess.PIPE, timeout=30, env=environment
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_stdio_is_not_taken_for_a_socket(redirect: str) -> None:
    run = 'test "$(nbdinfo --size "$uri")" = 1048576 && exit 7'
    command = f"{shlex.join(COMMAND)} -U - memory 1M --run '{run}' {redirect}"
    assert subprocess.run(["sh", "-c", command], timeout=30).returncode == 7


# -- plugins by name, path and entry point ---------------------------------------------------------

NATIVE = """\
import pynbdkit
class Tiny(pynbdkit.Plugin):
    "A tiny disk."
    size = pynbdkit.parameters.size("The size", default=512, magic=True)
    def open(self, session):
        device = pynbdkit.Device()
        device.get_size = lambda: self.size
        device.pread = lambda count, offset, flags: bytes(count)
        return device
"""
SIZE = ["-U", "-", "--run", 'nbdinfo --size "$uri"']


@pytest.mark.parametrize("name", ["./tiny.py", "tiny.py", "sub/../tiny.py"])
def test_a_file_by_its_path(name: str, sockdir: Path) -> None:
    (sockdir / "tiny.py").write_text(NATIVE)
    (sockdir / "sub").mkdir()
    assert pynbdkit(*SIZE, name, "2K", cwd=sockdir).stdout == "2048\n"


def test_a_name_is_not_a_file_of_that_name(sockdir: Path) -> None:
    (sockdir / "tiny").write_text(NATIVE)
    done = pynbdkit(*SIZE, "tiny", cwd=sockdir)
    assert done.returncode == 1
    assert "./tiny" in done.stderr


@pytest.fixture
def installed(sockdir: Path) -> dict[str, str]:
    """The environment of a distribution with plugins and filters of its own."""
    info = sockdir / "extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pynbdkit.plugins]\ntiny = extra:Tiny\nlost = extra:Lost\nodd = extra:ODD\n"
        "[pynbdkit.filters]\nhalf = extra:Half\n"
    )
    (sockdir / "extra.py").write_text(
        NATIVE
        + """
class Half(pynbdkit.Filter):
    def open(self, next, session):
        device = pynbdkit.FilterDevice(next(session))
        device.get_size = lambda: device.next.get_size() // 2
        return device
ODD = 3
"""
    )
    return {**os.environ, "PYTHONPATH": str(sockdir)}


def test_entry_points(installed: dict[str, str]) -> None:
    assert pynbdkit(*SIZE, "tiny", "1M", env=installed).stdout == "1048576\n"
    assert pynbdkit(*SIZE, "--filter=half", "tiny", "1M", env=installed).stdout == "524288\n"


@pytest.mark.parametrize("name", ["lost", "odd", "none"])
def test_entry_points_that_are_wrong(name: str, installed: dict[str, str]) -> None:
    done = pynbdkit(*SIZE, name, env=installed)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"'{name}'" in done.stderr


# -- steps that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["load", "config", "config_complete", "get_ready", "after_fork"])
@pytest.mark.parametrize("error", ["OSError(28, 'all is full')", "ZeroDivisionError('so bad')"])
def test_a_step_that_fails_is_one_line(name: str, error: str, sockdir: Path) -> None:
    (sockdir / "p.py").write_text(
        NATIVE + f"    def {name}(self, *arguments):\n        raise {error}\n"
        '    def unload(self):\n        print("unloaded")\n'
        '    def cleanup(self):\n        print("cleaned")\n'
    )
    done = pynbdkit("-U", "-", "./p.py", "1K", "--run", "echo ran", cwd=sockdir)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"p: {name}: " in done.stderr
    assert ("all is full" in done.stderr) != (
        "p.py:11: " in done.stderr and "so bad" in done.stderr
    )
    assert ("unloaded" in done.stdout) == (name != "load")
    assert ("cleaned" in done.stdout) == (name == "after_fork")
    assert "ran" not in done.stdout


def test_verbose_shows_where_a_step_failed(sockdir: Path) -> None:
    text = NATIVE + "    def get_ready(self):\n        self.no_such_thing()\n"
    (sockdir / "p.py").write_text(text)
    done = pynbdkit("-v", *SIZE, "./p.py", "1K", cwd=sockdir)
    assert "debug: Traceback" in done.stderr
    assert "self.no_such_thing()" in done.stderr


# -- parameters ------------------------------------------------------------------------------------

ECHO = """\
import pynbdkit
class Echo(pynbdkit.Plugin):
    def config(self, key, value):
        print(f"{key}={value}")
    def open(self, session): ...
"""


@pytest.mark.parametrize(
    ("words", "out", "says"),
    [
        (["a=b", "c-d.e_9=", "F=a=b"], "a=b\nc-d.e_9=\nF=a=b\n", ""),
        (["file", "a=b"], "script=file\na=b\n", ""),  # nbdkit(1), "Magic parameters"
        (["./a=b"], "script=./a=b\n", ""),
        (["9a=b"], "script=9a=b\n", ""),
        (["=b"], "script==b\n", ""),
        (["ü=b"], "script=ü=b\n", ""),
        (["a=b", "file"], "a=b\n", "expecting key=value on the command line but got: file"),
        (["file", "9=b"], "script=file\n", "expecting key=value on the command line but got: 9=b"),
    ],
)
def test_parameters(words: list[str], out: str, says: str, sockdir: Path) -> None:
    (sockdir / "echo.py").write_text(ECHO)
    done = pynbdkit("-U", "-", "./echo.py", *words, "--run", "true", cwd=sockdir)
    assert (done.returncode, done.stdout) == (bool(says), out)
    check_message([], done.stderr, says)


# -- options that reach the server -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "question", "answer"),
    [
        ([], "is_read_only", False),
        (["-r"], "is_read_only", True),
        ([], "get_structured_replies_negotiated", True),
        (["--no-sr"], "get_structured_replies_negotiated", False),
        ([], "get_protocol", "newstyle-fixed"),
        (["--mask-handshake=0"], "get_protocol", "newstyle"),
        (["--mask-handshake=2"], "get_protocol", "newstyle"),
        (["--mask-handshake=1"], "get_protocol", "newstyle-fixed"),
        (["-o"], "get_protocol", "oldstyle"),
        (["-o", "-r"], "is_read_only", True),
        (["-o", "-n"], "get_protocol", "newstyle-fixed"),
        (["--no-mc"], "get_structured_replies_negotiated", True),
    ],
)
def test_options_of_the_protocol(
    options: list[str], question: str, answer: object, serve: Serve, connect: Connect
) -> None:
    contexts = () if "--mask" in str(options) or "-o" in options else ("base:allocation",)
    handle = connect(serve(*options, "memory", "1M"), contexts=contexts)
    assert getattr(handle, question)() == answer


@pytest.mark.parametrize(("options", "there"), [([], True), (["--no-mc"], False)])
def test_meta_contexts(options: list[str], there: bool, serve: Serve, connect: Connect) -> None:
    handle = connect(serve(*options, "memory", "1M"))
    assert handle.can_meta_context("base:allocation") == there


@pytest.mark.parametrize(("options", "granted"), [([], True), (["--no-eh"], False)])
def test_extended_headers(options: list[str], granted: bool, serve: Serve) -> None:
    with Raw(str(serve(*options, "memory", "1M").socket), go=False) as client:
        client.receive(18)
        client.send(bytes([0, 0, 0, 3]))
        client.option(11)
        assert client.reply()[1] == (1 if granted else 0x80000001)


def test_a_handshake_has_its_time(serve: Serve, connect: Connect) -> None:
    """Not a connection after it; and 0 is for ever."""
    server = serve("--timeout=200ms", "memory", "1M")
    patient = serve("--timeout=0", "memory", "1M")
    handle = connect(server)
    with Raw(str(server.socket), go=False) as client, Raw(str(patient.socket), go=False) as other:
        client.receive(18)
        assert client.at_end()
        assert handle.pread(512, 0) == bytes(512)
        other.receive(18)
        other.send(bytes([0, 0, 0, 3]))
        other.option(2)
        assert other.reply()[1] == 1


PARALLEL = """\
import nbdkit, threading
API_VERSION = 2
most = now = 0
lock = threading.Lock()
both = threading.Barrier(2)
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def open(readonly): return 1
def get_size(h): return 1 << 20
def pread(h, buf, offset, flags):
    global most, now
    if offset == 0:
        buf[:] = bytes([most]) * len(buf)
        return
    with lock:
        now += 1
        most = max(most, now)
    try:
        both.wait(0.3)
    except threading.BrokenBarrierError:
        pass
    with lock:
        now -= 1
"""


@pytest.mark.parametrize(("options", "most"), [([], 2), (["-t", "2"], 2), (["-t", "1"], 1)])
def test_threads(
    options: list[str], most: int, serve: Serve, connect: Connect, nbd: ModuleType, sockdir: Path
) -> None:
    (sockdir / "p.py").write_text(PARALLEL)
    handle = connect(serve(*options, sockdir / "p.py"))
    for _ in range(2):
        handle.aio_pread(nbd.Buffer(512), 512)
    while handle.aio_in_flight() > 0:
        handle.poll(-1)
    assert handle.pread(1, 0)[0] == most


# -- starting quickly ------------------------------------------------------------------------------

HEAVY = """
argparse ast asyncio base64 concurrent contextlib ctypes dataclasses datetime decimal dis email
fractions getopt getpass hashlib http importlib.metadata importlib.util inspect ipaddress json
locale logging multiprocessing optparse pathlib pickle pkgutil platform queue random re shlex shutil
ssl statistics string subprocess tempfile textwrap tokenize traceback typing unittest urllib uuid
weakref zipfile
"""


def modules_of(*words: str, first: str = "pass") -> set[str]:
    """The modules that a run of our command line imports, beyond those of Python itself.

    `first`: a statement to begin with.
    """
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; before = set(sys.modules);"
        f" {first};"
        " from pynbdkit.cli.main import main;"
        " status = main(sys.argv[1:]); after = set(sys.modules);"
        " print(*sorted(after - before), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path[:0] = {sys.path!r}; {code}",
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return set(done.stderr.split())


def test_version_imports_next_to_nothing() -> None:
    assert modules_of("--version") <= {
        "__future__",
        "gc",
        "pynbdkit",
        "pynbdkit._version",
        "pynbdkit.cli",
        "pynbdkit.cli.main",
    }


def test_help_imports_only_the_options() -> None:
    ours = {name for name in modules_of("--help") if name.startswith("pynbdkit")}
    assert ours <= {
        "pynbdkit",
        "pynbdkit._version",
        "pynbdkit.cli",
        "pynbdkit.cli.main",
        "pynbdkit.cli.options",
        "pynbdkit.errors",
        "pynbdkit.log",
    }


def test_serving_imports_nothing_heavy() -> None:
    found = modules_of("-U", "-", "memory", "1M", "--run", 'nbdinfo --size "$uri" >/dev/null')
    assert "pynbdkit.server.transmission" in found
    assert found & set(HEAVY.split()) == set()
    assert not [name for name in found if name.startswith("pynbdkit.client")]


STANDARD = "errno gc mmap os select signal socket struct threading time"
"""What a server cannot do without; each brings others, which differ from Python to Python."""


def test_a_server_without_clients_imports_the_least() -> None:
    """As for `--run true`: what serves a client is not loaded before there is one, or leisure."""
    code = f"import sys, {STANDARD.replace(' ', ', ')}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    never = "import pynbdkit.server.server as server; server.LEISURE = 60_000"
    found = modules_of("-U", "-", "memory", "1M", "--run", "true", first=never)
    others = {name for name in found if not name.startswith("pynbdkit")} - {"__future__"}
    assert others <= set(done.stdout.split())
    assert "pynbdkit.plugins.memory" in found
    assert not found & {"pynbdkit.server.connection", "pynbdkit.cli.system"}


def test_what_serves_a_client_is_loaded_before_one_comes() -> None:
    """So an upgrade of the package does not hit a server that has waited long for its first."""
    assert "pynbdkit.server.connection" in modules_of("-U", "-", "null", "--run", "sleep 0.3")


def test_the_collector_is_back_when_plugins_are_loaded(tmp_path: Path) -> None:
    """The start does without it; and the end leaves nobody's exit handlers out."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, gc, sys\n"
        "def open(readonly): return 1\n"
        "def get_size(h): return 512\n"
        "def pread(h, count, offset): return bytes(count)\n"
        "def get_ready(): print(gc.isenabled(), flush=True)\n"
        "atexit.register(print, 'at exit')\n"
    )
    done = pynbdkit("-U", "-", script, "--run", "exit 3")
    assert (done.stdout.split("\n"), done.returncode) == (["True", "at exit", ""], 3), done.stderr


def test_the_package_imports_nothing_of_its_own() -> None:
    code = "import sys, pynbdkit; print(*[m for m in sys.modules if m.startswith('pynbdkit')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pynbdkit._version", "pynbdkit"]
