"""--run: the command's variables, its exit status, its end and the server's."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command import COMMAND, can_bind, running, wait_for_end, wait_for_file
from pynbdkit.cli import captive
from support import lacking, need_root, program, pynbdkit

SHOW = 'printf "%s\\n" "$uri" "$nbd" "$port" "$unixsocket" "$exportname" "${tls-unset}" "$pid"'

READY = "sh -c 'echo ready >&2; exec sleep 1000'"
SCRIPT = """\
import nbdkit
def open(readonly): return 1
def get_size(h): return 1 << 20
def pread(h, count, offset): return bytes(count)
"""


# -- variables -------------------------------------------------------------------------------------


def test_variables_with_a_private_socket(sockdir: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(sockdir), "tls": "2", "port": "99"}
    with running("-U", "-", "memory", "1M", "--run", SHOW, env=environment, stdout=-1) as process:
        out = process.communicate(timeout=30)[0].decode()
    uri, nbd, port, path, export, tls, pid = out.splitlines()
    assert path.startswith(f"{sockdir}/pynbdkit-")
    assert uri == nbd == f"nbd+unix:///?socket={path}"
    assert (port, export, tls, pid) == ("", "", "unset", str(process.pid))
    assert list(sockdir.iterdir()) == []


def test_variables_with_a_port() -> None:
    done = pynbdkit("-p", "0", "-e", "a b", "memory", "1M", "--run", SHOW)
    uri, nbd, port, path, export, _tls, _pid = done.stdout.splitlines()
    assert int(port) > 0
    assert uri == nbd == f"nbd://localhost:{port}/a%20b"
    assert (path, export) == ("", "a b")


def test_variables_are_the_shells_own() -> None:
    """Other programs' environment is left alone, as by nbdkit."""
    done = pynbdkit("-U", "-", "memory", "1M", "--run", "env")
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert names.isdisjoint({"uri", "nbd", "unixsocket", "exportname", "pid"})


@pytest.mark.parametrize(
    "name", ["it's", 'a"b$c`d\\', "*", "-n", "\nx\n", "ü", "$(exit 1)", "\udcff"]
)
def test_every_export_name_reaches_the_command(name: str) -> None:
    """Also bytes that are no UTF-8; the URI is one that libnbd's own parser takes apart."""
    done = subprocess.run(
        [*COMMAND, "-U", "-", "-e", name, "memory", "1M", "--run", 'printf "%s" "$exportname"'],
        capture_output=True,
        timeout=30,
    )
    assert done.stdout == os.fsencode(name)
    assert (done.returncode, done.stderr) == (0, b"")


@given(st.text(st.characters(codec=None, exclude_characters="\0"), max_size=20))
@settings(max_examples=30, deadline=None)
def test_quoting(text: str) -> None:
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        return  # half a surrogate is no text of a command line
    command = f'a={captive.quote(text)}; printf "%s" "$a"'
    assert subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE).stdout == raw


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("exit 0", 0),
        ("exit 42", 42),
        ("false; true", 0),
        ("no_such_command_at_all 2>/dev/null", 127),
        ("kill -KILL $$", 137),
        ("kill -PIPE $$", 141),  # Python's own choice, to ignore it, is not for the command
        ("( exit 3 ) <<X\nhello\nX\n", 3),
        ('read -r line; test "$line" = hello', 0),
        ("test $(id -u) = $(stat -c %u /proc/$pid)", 0),
    ],
)
def test_exit_status(command: str, status: int) -> None:
    done = subprocess.run(
        [*COMMAND, "-U", "-", "memory", "1M", "--run", command],
        input=b"hello\nworld\n",
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == status
    assert done.stderr.decode() == (
        f"pynbdkit: error: --run: the command was killed by signal {status - 128}\n"
        if status > 128
        else ""
    )


def test_exit_status_where_children_are_ignored() -> None:
    """A caller may have SIGCHLD ignored, which is inherited."""
    ignore = "trap '' CHLD; exec \"$@\""
    words = [*COMMAND, "-U", "-", "memory", "1M", "--run", "exit 9"]
    done = subprocess.run(["bash", "-c", ignore, "bash", *words], timeout=30, capture_output=True)
    assert (done.returncode, done.stderr) == (9, b"")


def test_the_commands_descriptors_are_the_callers(sockdir: Path) -> None:
    """Those of the caller are inherited, the server's own are not."""
    words = [*COMMAND, "-U", "-", "memory", "1M", "--run", "cat <&9; cat <&8; ls /proc/self/fd"]
    (sockdir / "9").write_text("nine\n")
    (sockdir / "8").write_text("eight\n")
    command = f"exec 9<{sockdir}/9 8<{sockdir}/8; exec {shlex.join(words)}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["nine", "eight", "0", "1", "2", "3", "8", "9"]  # 3: ls's own


@pytest.mark.parametrize("where", ["-U -", "-p 0", "-4 -p 0", "-6 -p 0", "-p 0 -i ''"])
def test_the_command_runs_when_clients_can_connect(where: str) -> None:
    if where.startswith("-6") and not can_bind("::1"):
        lacking("this machine has no IPv6")
    info = f'{program("nbdinfo")} --size "$uri"'
    done = pynbdkit(*shlex.split(where), "memory", "1M", "--run", info)
    assert done.stdout == "1048576\n", done.stderr


def test_the_command_keeps_the_callers_rights(sockdir: Path) -> None:
    """As with nbdkit: -u is for the server."""
    need_root("becoming another user")
    command = 'id -u; grep ^Uid /proc/$pid/status; nbdinfo --size "$uri"'
    environment = {**os.environ, "TMPDIR": str(sockdir)}
    sockdir.chmod(0o1777)
    done = pynbdkit("-U", "-", "-u", "nobody", "memory", "1M", "--run", command, env=environment)
    assert done.stdout.split() == ["0", "Uid:", *["65534"] * 4, "1048576"], done.stderr
    assert list(sockdir.iterdir()) == []  # the private folder is the new user's to remove


@pytest.mark.parametrize(
    "step", ["def get_ready(): 1 / 0", "def after_fork(): 1 / 0", "def config(k, v): 1 / 0"]
)
def test_the_command_does_not_run_when_the_start_fails(step: str, sockdir: Path) -> None:
    (sockdir / "p.py").write_text(f"{SCRIPT}{step}\n")
    environment = {**os.environ, "TMPDIR": str(sockdir)}
    words = ["-U", "-", f"{sockdir}/p.py", *(["a=b"] if "config" in step else [])]
    done = pynbdkit(*words, "--run", "echo ran; exit 5", env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "ZeroDivisionError" in done.stderr
    assert os.listdir(sockdir) == ["p.py"]


# -- ends ------------------------------------------------------------------------------------------


def test_a_server_that_ends_first_waits_for_the_command(sockdir: Path) -> None:
    """What is left to do without the disk is done, as with nbdkit."""
    (sockdir / "p.py").write_text(f"{SCRIPT}def close(h): nbdkit.shutdown()\n")
    command = (
        'nbdinfo --size "$uri"; while test -e "$unixsocket"; do'
        ' nbdinfo "$uri" >/dev/null 2>&1 || break; done; echo after; exit 6'
    )
    done = pynbdkit("-U", "-", sockdir / "p.py", "--run", command)
    assert (done.returncode, done.stdout) == (6, "1048576\nafter\n"), done.stderr


CLIENT = """\
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect(sys.argv[1])
    client.recv(18)
    print("connected", flush=True)
    while client.recv(100):
        pass
    print("let go", flush=True)
"""


def test_clients_that_outlive_the_command_are_let_go(sockdir: Path) -> None:
    """The server ends with the command, also where something that it started is connected."""
    os.mkfifo(sockdir / "out")
    client = f'{sys.executable} -c {shlex.quote(CLIENT)} "$unixsocket"'
    command = f"{{ {client} >out; }} & exec 3<out; read -r line <&3; cat <&3 & exit 4"
    done = pynbdkit("-U", "-", "memory", "1M", "--run", command, cwd=sockdir)
    assert (done.returncode, done.stdout, done.stderr) == (4, "let go\n", "")


@pytest.mark.parametrize(
    ("command", "number", "status"),
    [
        (f"exec {READY}", signal.SIGTERM, 143),
        (f"{READY}; exit 3", signal.SIGTERM, 143),
        (f"{READY}; exit 3", signal.SIGINT, 143),
        (f"{READY} | cat; exit 3", signal.SIGQUIT, 143),
        (f"trap 'exit 7' TERM; {READY}; exit 3", signal.SIGTERM, 7),
        ("trap '' TERM; echo ready >&2; cat; exit 3", signal.SIGTERM, 3),
    ],
)
def test_a_signal_is_for_the_command(command: str, number: int, status: int, sockdir: Path) -> None:
    """It ends, with all that it has started, and then the server, with its exit status."""
    words = ["-U", "-", "-P", "pid", "memory", "1M", "--run", command]
    with running(*words, cwd=sockdir, stdin=-1, stderr=-1, start_new_session=True) as process:
        assert process.stderr is not None
        assert process.stdin is not None
        assert process.stderr.readline() == b"ready\n"
        process.send_signal(number)
        if "cat;" in command and number == signal.SIGTERM:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
            process.stdin.close()  # and without a signal: it goes on until the command ends
        assert process.wait(30) == status
        process.stderr.read()  # ends when nobody has it any more: no process is left


def test_a_second_signal_ends_the_server(sockdir: Path) -> None:
    words = ["-U", "-", "memory", "1M", "--run", "trap '' TERM; echo ready >&2; cat"]
    environment = {**os.environ, "TMPDIR": str(sockdir)}
    with running(*words, env=environment, stdin=-1, stderr=-1) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"ready\n"
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    assert list(sockdir.iterdir()) == []


def test_a_typed_interrupt_is_the_commands_business(sockdir: Path) -> None:
    """Ctrl-C reaches the whole group; a command that goes on (a prompt, say) keeps its disk."""
    command = (
        "n=0; trap 'n=$((n + 1)); echo interrupted' INT; echo ready;"
        ' while test $n -lt 2; do read -r line; done; nbdinfo --size "$uri"; exit 8'
    )
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        os.execv(COMMAND[0], [*COMMAND, "-U", "-", "memory", "1M", "--run", command])
    try:
        text = b""
        for seen, typed in (
            (b"ready", b"\x03"),
            (b"interrupted", b"\x03"),
            (b"interrupted\r\n1048576", b""),
        ):
            while seen not in text:
                text += os.read(terminal, 1000)
            text = text.split(seen, 1)[1]
            os.write(terminal, typed)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 8
    finally:
        os.close(terminal)


def test_the_shell_does_not_outlive_a_server_that_is_killed_while_it_starts(sockdir: Path) -> None:
    os.mkfifo(sockdir / "gate")
    (sockdir / "p.py").write_text(
        f"""{SCRIPT}
from builtins import open as open_file
import os
def after_fork():
    with open(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children") as stream:
        child = stream.read()
    with open_file("{sockdir}/notes", "w") as stream:
        stream.write(child + "\\n")
    open_file("{sockdir}/gate").read()
""".replace("    with open(f", "    with open_file(f")
    )
    with running("-U", "-", sockdir / "p.py", "--run", f"echo ran >{sockdir}/ran") as process:
        shell = os.pidfd_open(int(wait_for_file(sockdir / "notes", "\n")))
        process.kill()
        assert wait_for_end(shell)
        os.close(shell)
    assert not (sockdir / "ran").exists()
