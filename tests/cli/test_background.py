"""Services: another user, the background, the pidfile, signals, the parent's end."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from command import COMMAND, SLOW, daemon, running, status_of, wait_for_end, wait_for_file
from pynbdkit.cli import background
from pynbdkit.errors import ConfigError
from support import ROOT, lacking, need_root, pynbdkit

Connect = Callable[..., Any]
NOBODY = "nobody"


def uri(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


def bad_client(path: Path) -> None:
    """A client whose handshake is nonsense, which is worth a message."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(b"\0\0\0\3" + b"this is no option")
        while client.recv(4096):
            pass


# -- the background --------------------------------------------------------------------------------


def test_a_daemon_is_ready_when_its_parent_has_ended(sockdir: Path, connect: Connect) -> None:
    """Relative paths are those of the caller; nothing of the caller's is kept open."""
    done = pynbdkit("-U", "s", "-P", "pid", "memory", "1M", cwd=sockdir, umask=0o077)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with daemon(sockdir / "pid") as pid:
        assert connect(uri(sockdir / "s")).get_size() == 1 << 20
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null"] * 3
        assert os.getsid(pid) == pid
        assert status_of(pid)["Umask"] == "0022"
    assert (sockdir / "s").exists()  # as nbdkit leaves it


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_daemon_of_a_caller_without_stdio(redirect: str, sockdir: Path, connect: Connect) -> None:
    """None of the server's own descriptors is taken for one of those."""
    command = f'"$@" -U s -P pid memory 1M {redirect}'
    subprocess.run(["sh", "-c", command, "sh", *COMMAND], cwd=sockdir, timeout=30, check=True)
    with daemon(sockdir / "pid"):
        assert connect(uri(sockdir / "s")).get_size() == 1 << 20


def test_pipes_of_the_caller_are_let_go(sockdir: Path) -> None:
    """$(pynbdkit …) returns: the server holds neither stdout nor stderr open."""
    command = [*COMMAND, "-U", "s", "-P", "pid", "--print-uri", "memory", "1M"]
    done = subprocess.run(
        command, cwd=sockdir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30
    )
    with daemon(sockdir / "pid"):
        assert done.stdout.decode() == f"nbd+unix:///?socket={sockdir}/s\n"


@pytest.mark.parametrize("options", [["-v"], ["--log=stderr"], []])
def test_where_a_daemons_messages_go(options: list[str], sockdir: Path) -> None:
    with open(sockdir / "log", "wb") as log:
        command = [*COMMAND, *options, "-U", "s", "-P", "pid", "memory", "1M"]
        subprocess.run(command, cwd=sockdir, stderr=log, check=True, timeout=30)
    with daemon(sockdir / "pid"):
        bad_client(sockdir / "s")
    text = (sockdir / "log").read_text()
    assert bool(text) == bool(options), text


PLAIN = """\
import os
from builtins import open as open_file
def open(ro): return 1
def get_size(h): return 1 << 20
def pread(h, c, o): return bytes(c)
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [("raise RuntimeError('no way')", 1), ("os._exit(3)", 3), ("os.kill(os.getpid(), 9)", 1)],
)
def test_a_daemon_that_fails_to_start_is_told_to_its_caller(
    how: str, status: int, sockdir: Path
) -> None:
    (sockdir / "p.py").write_text(f"{PLAIN}def after_fork():\n    {how}\n")
    done = pynbdkit("-U", "s", "-P", "pid", "./p.py", cwd=sockdir)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == (status == 1), done.stderr
    assert not (sockdir / "pid").exists()


def test_a_pidfile_that_cannot_be_written_ends_the_daemon(sockdir: Path) -> None:
    done = pynbdkit("-U", "s", "-P", "nowhere/pid", "memory", "1M", cwd=sockdir)
    assert done.returncode == 1
    assert done.stderr.startswith("pynbdkit: error: -P ")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        try:
            client.connect(str(sockdir / "s"))
            while client.recv(100):
                pass
        except ConnectionError:
            pass  # it has ended already


def test_an_impatient_caller_ends_the_daemon(sockdir: Path) -> None:
    """The parent is killed while the server starts: there is nobody to serve for."""
    os.mkfifo(sockdir / "gate")
    (sockdir / "p.py").write_text(
        f"""{PLAIN}
def after_fork():
    with open_file("{sockdir}/notes", "w") as stream:
        stream.write(str(os.getpid()) + "\\n")
    open_file("{sockdir}/gate").read()
"""
    )
    with running("-U", sockdir / "s", "-P", sockdir / "pid", sockdir / "p.py") as process:
        child = os.pidfd_open(int(wait_for_file(sockdir / "notes", "\n")))
        process.kill()
        process.wait()
        (sockdir / "gate").write_text("")
        assert wait_for_end(child)
        os.close(child)
    assert not (sockdir / "pid").exists()


# -- the pidfile -----------------------------------------------------------------------------------


def test_the_pidfile_comes_when_clients_can_connect(sockdir: Path, connect: Connect) -> None:
    (sockdir / "pid").write_text("something longer that was here before\n")
    with running("-f", "-U", "s", "-P", "pid", "memory", "1M", cwd=sockdir) as process:
        wait_for_file(sockdir / "pid", f"{process.pid}\n")
        assert (sockdir / "pid").read_text() == f"{process.pid}\n"
        assert (sockdir / "pid").stat().st_mode & 0o777 == 0o644
        connect(uri(sockdir / "s"))
        process.terminate()
        assert process.wait(30) == 0
    assert (sockdir / "pid").exists()


# -- users and groups ------------------------------------------------------------------------------


def ids(status: dict[str, str]) -> tuple[str, str, str]:
    return status["Uid"].split()[0], status["Gid"].split()[0], status["Groups"]


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (["-u", NOBODY], None),
        (["-u", "0xfffe", "-g", "1"], ["1"]),
        (["-u", NOBODY, "-g", "daemon"], ["1"]),
        (["-g", "daemon"], ["1"]),
        (["-u", "54321"], []),
    ],
)
def test_user_and_group(options: list[str], groups: list[str] | None, sockdir: Path) -> None:
    """Nothing of root's is left, also no group; -g names the only group."""
    need_root("becoming another user")
    sockdir.chmod(0o777)
    # The server has groups to lose.
    command = ["setpriv", "--groups", "4,24", *COMMAND, "-U", "s", "-P", "pid", *options]
    subprocess.run([*command, "memory", "1M"], cwd=sockdir, timeout=30, check=True)
    with daemon(sockdir / "pid") as pid:
        uid, gid, others = ids(status_of(pid))
        bad_client(sockdir / "s")
    assert uid == ("0" if "-u" not in options else "54321" if "54321" in options else "65534")
    if groups is None:
        entry = pwd.getpwnam(NOBODY)
        groups = [str(g) for g in os.getgrouplist(NOBODY, entry.pw_gid)]
        assert gid == str(entry.pw_gid)
    else:
        assert gid == (groups[0] if groups else "0")
    assert others.split() == groups


CLIMBER = """\
import ctypes, os
def open(readonly): return 1
def pread(h, count, offset): return bytes(count)
def get_size(h):
    "How many ways lead back to root."
    found = 0
    zero = ctypes.CDLL(None).setfsuid
    for call in (
        lambda: os.setuid(0), lambda: os.seteuid(0), lambda: os.setreuid(0, 0),
        lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0), lambda: os.setegid(0),
        lambda: os.setresgid(0, 0, 0), lambda: os.setgroups([0]), lambda: os.chroot("/"),
        lambda: os.chown(os.environ["ROOTS"], 0, 0), lambda: os.listdir(os.environ["ROOTS"]),
        lambda: zero(0) == zero(0) == 0 or 1 / 0,
    ):
        try:
            call()
            found += 1
        except (OSError, ZeroDivisionError):
            pass
    return found
"""


@pytest.mark.parametrize(
    "options", [["-u", NOBODY], ["-u", NOBODY, "-g", "daemon"], ["-u", "12345", "-g", "12345"]]
)
@pytest.mark.parametrize("mode", ["666", "600"])
def test_nothing_leads_back_to_root(
    options: list[str], mode: str, sockdir: Path, connect: Connect
) -> None:
    """No id, group or capability is left by which root's rights could be had again."""
    need_root("becoming another user")
    sockdir.chmod(0o755)
    (sockdir / "roots").mkdir(0o700)
    (sockdir / "climb.py").write_text(CLIMBER)
    words = ["-f", "-U", f"{sockdir}/s", "--unix-mode", mode, *options]
    environment = {**os.environ, "ROOTS": str(sockdir / "roots")}
    with running(*words, "--print-uri", sockdir / "climb.py", stdout=-1, env=environment) as it:
        assert it.stdout is not None
        assert it.stdout.readline()
        status = status_of(it.pid)
        handle = connect(f"nbd+unix:///?socket={sockdir}/s")
        assert handle.get_size() == 0
        handle.shutdown()
        socket_now = (sockdir / "s").stat()
    user = 65534 if NOBODY in options else 12345
    group = {"daemon": 1, "12345": 12345}.get(options[-1], 65534)
    assert status["Uid"].split() == [str(user)] * 4
    assert status["Gid"].split() == [str(group)] * 4
    assert set(status["Groups"].split()) == {str(group)}
    for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert socket_now.st_mode & 0o777 == int(mode, 8)
    assert (socket_now.st_uid, socket_now.st_gid) == (0, 0)  # as nbdkit leaves it


def test_the_pidfile_of_a_daemon_is_its_callers(sockdir: Path) -> None:
    """A folder such as /run is writable for root alone: the caller writes there."""
    need_root("becoming another user")
    done = pynbdkit("-U", "s", "-P", "pid", "-u", NOBODY, "memory", "1M", cwd=sockdir)
    assert done.returncode == 0, done.stderr
    with daemon(sockdir / "pid"):
        assert (sockdir / "pid").stat().st_uid == 0


def test_what_is_imported_late_needs_no_rights_of_root(sockdir: Path, connect: Connect) -> None:
    """The package lies where only root can read; requests, errors and the end still work."""
    need_root("becoming another user")
    sockdir.chmod(0o755)
    private = sockdir / "private"
    private.mkdir(mode=0o700)
    shutil.copytree(
        ROOT / "src" / "pynbdkit",
        private / "pynbdkit",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (sockdir / "p.py").write_text(
        PLAIN + "def thread_model(): return 3\n"
        "def pread(h, c, o):\n    if o: raise KeyError('\\u0001 odd')\n    return bytes(c)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(private)}
    words = ["-f", "-U", "s", "-P", "pid", "-u", NOBODY, "./p.py"]
    sockdir.chmod(0o777)
    with (
        open(sockdir / "log", "wb") as log,
        running(*words, cwd=sockdir, env=environment, stderr=log) as process,
    ):
        wait_for_file(sockdir / "pid", "\n")
        handle = connect(uri(sockdir / "s"))
        assert len(handle.pread(512, 0)) == 512
        with pytest.raises(Exception, match="Input/output error"):
            handle.pread(512, 512)
        handle.shutdown()
        process.terminate()
        assert process.wait(30) == 0
    text = (sockdir / "log").read_text()
    assert "pread" in text
    assert "KeyError" in text
    assert "ImportError" not in text
    assert "ModuleNotFound" not in text


def test_what_functions_import_is_imported_before_root_is_left() -> None:
    """The source of our modules says what that is, read with another tool than `preload`'s."""
    code = """
import ast, sys
import pynbdkit.cli.serve, pynbdkit.plugins.memory, pynbdkit.filters.log
from pynbdkit.cli.preload import DONE, preload
preload()
for name in [n for n in sys.modules if n.startswith("pynbdkit.") and n.split(".")[1] not in DONE]:
    tree = ast.parse(open(sys.modules[name].__file__).read())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                wanted = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    wanted.append(node.module)
                print(*[f"{name}:{w}" for w in wanted if w not in sys.modules], end="")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("kind", "text", "number"),
    [("user", "root", 0), ("group", "root", 0), ("user", "12345", 12345), ("group", "0x10", 16)],
)
def test_names_and_numbers(kind: str, text: str, number: int) -> None:
    assert (background.user_id if kind == "user" else background.group_id)(text) == number


@pytest.mark.parametrize(
    "text", ["", "-1", "no one", "4294967295", "99999999999999", "1.5", "\udcff"]
)
def test_names_and_numbers_of_nobody(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^-u .*: no such user$"):
        background.user_id(text)
    with pytest.raises(ConfigError, match=r"^-g .*: no such group$"):
        background.group_id(text)


def test_becoming_oneself_needs_no_rights(sockdir: Path) -> None:
    me = pwd.getpwuid(os.getuid()).pw_name
    mine = grp.getgrgid(os.getgid()).gr_name
    done = pynbdkit("-U", "-", "-u", me, "-g", mine, "memory", "1M", "--run", "exit 3")
    assert (done.returncode, done.stderr) == (3, "")


def test_another_user_needs_rights(sockdir: Path) -> None:
    """Who is not root is told so, in one line; nothing runs."""
    need_root("leaving root behind")
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or "python3"
    command = ["setpriv", "--reuid=1", "--regid=1", "--clear-groups", python, "-I", "-c"]
    if subprocess.run([*command, "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        lacking("there is no Python 3.11 that every user may run: apt-get install python3")
    code = (
        f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(sockdir)!r});"
        " from pynbdkit.cli.main import run; run()"
    )
    sockdir.chmod(0o755)
    shutil.copytree(ROOT / "src" / "pynbdkit", sockdir / "pynbdkit")
    for option in (["-u", "2"], ["-g", "2"]):
        words = ["-U", "-", *option, "memory", "1M", "--run", "echo ran"]
        done = subprocess.run([*command, code, *words], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert "Operation not permitted" in done.stderr


# -- signals ---------------------------------------------------------------------------------------


class Slow:
    """A server with a read under way that ends when we say so."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], handle: Any) -> None:
        self.notes = folder / "notes"
        self.gate = folder / "gate"
        self.process = process
        self.handle = handle


@pytest.fixture
def slow(sockdir: Path, connect: Connect, nbd: ModuleType) -> Any:
    os.mkfifo(sockdir / "gate")
    (sockdir / "p.py").write_text(SLOW)
    words = [
        "-f",
        "-U",
        "s",
        "-P",
        "pid",
        "./p.py",
        f"notes={sockdir}/notes",
        f"gate={sockdir}/gate",
    ]
    with running(*words, cwd=sockdir) as process:
        wait_for_file(sockdir / "pid", "\n")
        handle = connect(uri(sockdir / "s"))
        yield Slow(sockdir, process, handle)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_a_signal_lets_running_requests_finish(slow: Slow, nbd: ModuleType, number: int) -> None:
    buffer = nbd.Buffer(512)
    cookie = slow.handle.aio_pread(buffer, 512)
    wait_for_file(slow.notes, "pread")
    slow.process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        slow.process.wait(0.2)  # it waits for the read
    slow.gate.write_text("")
    while not slow.handle.aio_command_completed(cookie):
        slow.handle.poll(-1)
    assert bytes(buffer.to_bytearray()) == b"x" * 512
    assert slow.process.wait(30) == 0
    assert slow.notes.read_text().split() == ["pread", "close", "cleanup"]


EARLY = """
import os, signal, sys
from pynbdkit.cli.main import run
from pynbdkit.cli.where import Where

listen = Where.listen

def listen_and_stop(self, identity):
    sockets = listen(self, identity)
    os.kill(os.getpid(), signal.{number})
    return sockets

Where.listen = listen_and_stop
sys.argv[1:] = {words!r}
run()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGQUIT"])
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["-f", "-U", "-", "memory", "1M"], 0),
        (["-f", "-U", "-", "memory", "1M", "--workers=2"], 0),
        (["-U", "-", "memory", "1M", "--run", "sleep 100"], 143),
    ],
    ids=["one", "workers", "run"],
)
def test_a_signal_as_soon_as_there_is_a_socket(
    sockdir: Path, number: str, words: list[str], status: int
) -> None:
    """It is an orderly end, as later."""
    done = subprocess.run(
        [sys.executable, "-c", EARLY.format(number=number, words=words)],
        env={**os.environ, "TMPDIR": str(sockdir)},
        stdin=subprocess.DEVNULL,
        timeout=30,
        check=False,
    )
    assert done.returncode == status
    assert not list(sockdir.glob("pynbdkit-*"))


def test_a_second_signal_ends_at_once(slow: Slow, nbd: ModuleType) -> None:
    slow.handle.aio_pread(nbd.Buffer(512), 512)
    wait_for_file(slow.notes, "pread")
    slow.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        slow.process.wait(0.2)
    slow.process.send_signal(signal.SIGINT)
    assert slow.process.wait(30) == -signal.SIGINT
    assert slow.notes.read_text().split() == ["pread"]


def test_a_sudden_end_leaves_no_private_socket(sockdir: Path, nbd: ModuleType) -> None:
    os.mkfifo(sockdir / "gate")
    (sockdir / "p.py").write_text(SLOW)
    words = ["-f", "-U", "-", "--print-uri", f"{sockdir}/p.py"]
    words += [f"notes={sockdir}/notes", f"gate={sockdir}/gate"]
    environment = {**os.environ, "TMPDIR": str(sockdir)}
    with running(*words, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        handle = nbd.NBD()
        handle.connect_uri(process.stdout.readline().decode().strip())
        assert list(sockdir.glob("pynbdkit-*/socket"))
        handle.aio_pread(nbd.Buffer(512), 512)
        wait_for_file(sockdir / "notes", "pread")
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    assert not list(sockdir.glob("pynbdkit-*"))


def test_a_client_that_never_reads_does_not_hold_the_server(sockdir: Path, nbd: ModuleType) -> None:
    code = (
        "import pynbdkit.server.server as server; server.STOP_PATIENCE = 0.3;"
        " from pynbdkit.cli.main import run; run()"
    )
    words = ["-f", "-U", f"{sockdir}/s", "-P", f"{sockdir}/pid", "--log=stderr", "memory", "1G"]
    with (
        open(sockdir / "log", "wb") as log,
        subprocess.Popen([sys.executable, "-c", code, *words], stderr=log) as process,
    ):
        try:
            wait_for_file(sockdir / "pid", "\n")
            handle = nbd.NBD()
            handle.connect_uri(uri(sockdir / "s"))
            for _ in range(64):
                handle.aio_pread(nbd.Buffer(1 << 20), 0)
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert "cut off" in (sockdir / "log").read_text()


# -- the parent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["pidfd", "old"])
def test_exit_with_parent(kernel: str, sockdir: Path) -> None:
    """The server ends in order when the process that has started it is killed."""
    (sockdir / "p.py").write_text(SLOW)
    code = "from pynbdkit.cli.main import run; run()"
    if kernel == "old":
        code = f"import os; del os.pidfd_open; {code}"
    words = ["--exit-with-parent", "-U", "s", "-P", "pid", "./p.py", f"notes={sockdir}/notes"]
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, *{words!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], cwd=sockdir) as process:
        server = os.pidfd_open(int(wait_for_file(sockdir / "pid", "\n")))
        try:
            process.kill()
            assert wait_for_end(server)
        finally:
            os.close(server)
    assert (sockdir / "notes").read_text().split() == ["cleanup"]


def test_exit_with_parent_is_in_the_foreground(sockdir: Path) -> None:
    words = ["--exit-with-parent", "-U", "s", "-P", "pid", "memory", "1M"]
    with running(*words, cwd=sockdir) as process:
        assert int(wait_for_file(sockdir / "pid", "\n")) == process.pid
        process.terminate()
        assert process.wait(30) == 0


def test_exit_with_parent_also_as_another_user(sockdir: Path) -> None:
    """The kernel's own way (PR_SET_PDEATHSIG) is forgotten when the user changes."""
    need_root("becoming another user")
    sockdir.chmod(0o777)
    words = ["--exit-with-parent", "-u", NOBODY, "-U", "s", "-P", "pid", "memory", "1M"]
    parent = f"import subprocess; subprocess.run({[*COMMAND, *words]!r})"
    with subprocess.Popen([sys.executable, "-c", parent], cwd=sockdir) as process:
        server = os.pidfd_open(int(wait_for_file(sockdir / "pid", "\n")))
        process.kill()
        assert wait_for_end(server)
        os.close(server)
