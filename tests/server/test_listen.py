"""Listening sockets: Unix, TCP, and those inherited from a service manager."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from command import COMMAND, can_bind, running
from pynbdkit.errors import ConfigError
from pynbdkit.server import listen
from pynbdkit.server.listen import listen_tcp, listen_unix, listen_vsock, tune
from support import need_root, pynbdkit

Connect = Callable[..., Any]


def close(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


# -- Unix ------------------------------------------------------------------------------------------


def test_unix(sockdir: Path) -> None:
    path = str(sockdir / "s")
    with listen_unix(path) as sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        sock.accept()[0].close()
    with pytest.raises(ConfigError, match="it exists already; remove it"):
        listen_unix(path)


def test_unix_paths_have_a_longest_length(sockdir: Path) -> None:
    room = 107 - len(str(sockdir)) - 1
    listen_unix(f"{sockdir}/{'x' * room}").close()
    listen_unix(f"{sockdir}/{'ü' * (room // 2)}").close()
    for name in ("x" * (room + 1), "ü" * (room // 2 + 1)):
        with pytest.raises(ConfigError, match="at most 107 bytes"):
            listen_unix(f"{sockdir}/{name}")


@pytest.mark.parametrize("path", ["/nonexistent/s", "/dev/null/s"])
def test_unix_mistakes_name_the_path(path: str) -> None:
    with pytest.raises(ConfigError, match=f"^cannot listen on {path}: "):
        listen_unix(path)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777, 0o755, 0o000])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_unix_sockets_mode_is_what_was_asked_for(mode: int, umask: int, sockdir: Path) -> None:
    before = os.umask(umask)
    try:
        with listen_unix(str(sockdir / "s"), mode):
            assert stat.S_IMODE((sockdir / "s").stat().st_mode) == mode
        assert os.umask(umask) == umask  # it is as it was
        with listen_unix(str(sockdir / "plain")):
            assert stat.S_IMODE((sockdir / "plain").stat().st_mode) == 0o777 & ~umask
        with pytest.raises(ConfigError):
            listen_unix(str(sockdir / "s"), mode)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_a_unix_sockets_mode_is_there_from_the_first_moment(
    sockdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no moment in which somebody else finds it more open."""
    seen: list[int] = []
    path = sockdir / "s"

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            seen.append(stat.S_IMODE(path.stat().st_mode))

    monkeypatch.setattr(socket, "socket", Watched)
    with listen_unix(str(path), 0o600):
        assert seen == [0o600]


def test_who_may_connect_is_who_may_write_to_the_socket(sockdir: Path) -> None:
    need_root("becoming another user")
    sockdir.chmod(0o755)
    for mode, group, welcome in ((0o600, 0, False), (0o660, 65534, True), (0o666, 0, True)):
        path = sockdir / f"{mode:o}"
        with listen_unix(str(path), mode):
            os.chown(path, 0, group)
            code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
            words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            # An isolated python3 of the system's: ours may lie where only root can read.
            done = subprocess.run(
                [*words, "/usr/bin/python3", "-I", "-c", code], capture_output=True, text=True
            )
            assert (done.returncode == 0) == welcome, done.stderr
            assert ("PermissionError" in done.stderr) != welcome


# -- TCP -------------------------------------------------------------------------------------------


def test_a_client_that_has_gone_is_found_out_in_minutes() -> None:
    """Not after the system's two hours of silence, and a quarter of an hour of sending again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted = server.accept()[0]
        with client, accepted:
            tune(accepted)

            def option(name: int) -> int:
                return accepted.getsockopt(socket.IPPROTO_TCP, name)

            assert option(socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle, every = option(socket.TCP_KEEPIDLE), option(socket.TCP_KEEPINTVL)
            assert (idle, every, option(socket.TCP_KEEPCNT)) == (60, 15, 8)
            assert option(socket.TCP_USER_TIMEOUT) == 0  # it would end clients that only pause


def test_only_tcp_is_tuned() -> None:
    first, second = socket.socketpair()
    with first, second:
        tune(first)


def test_ipv6_is_listened_on_for_itself() -> None:
    """Not for IPv4 as well, whatever the system's setting: that has its own socket."""
    if not can_bind("::1"):
        with pytest.raises(ConfigError, match=r"cannot listen on \[::1\]"):
            listen_tcp(["::1"], 0)
        return
    sockets = listen_tcp(["::1", "127.0.0.1"], 0)
    assert [s.family for s in sockets] == [socket.AF_INET6, socket.AF_INET]
    assert sockets[0].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    for sock in sockets:
        with socket.create_connection(sock.getsockname()[:2], timeout=30):
            sock.accept()[0].close()
    close(sockets)


def test_a_free_port_is_the_same_for_all_addresses() -> None:
    sockets = listen_tcp(["127.0.0.1", "127.0.0.2", "127.0.0.3"], 0)
    assert [s.getsockname()[0] for s in sockets] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    assert len({s.getsockname()[1] for s in sockets}) == 1
    close(sockets)


def test_a_free_port_of_one_address_may_be_taken_on_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then another is looked for, and nothing is left of the first attempt."""
    attempts: list[tuple[str, int]] = []
    real = listen._listen

    def unlucky(kind: int, where: Any) -> socket.socket:
        attempts.append(where[:2])
        if len(attempts) in (2, 4):
            raise OSError(errno.EADDRINUSE, "taken")
        return real(kind, where)

    monkeypatch.setattr(listen, "_listen", unlucky)
    before = os.listdir("/proc/self/fd")
    sockets = listen_tcp(["127.0.0.1", "127.0.0.2"], 0)
    assert [host for host, _ in attempts] == ["127.0.0.1", "127.0.0.2"] * 3
    assert len({s.getsockname()[1] for s in sockets}) == 1
    close(sockets)
    assert os.listdir("/proc/self/fd") == before


def test_a_port_in_use_is_said_and_all_is_closed() -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ConfigError, match=rf"on 127\.0\.0\.2:{port}: Address already in use"):
            listen_tcp(["127.0.0.1", "127.0.0.2"], port)
        assert os.listdir("/proc/self/fd") == before


def test_each_address_that_was_asked_for_is_needed() -> None:
    """Half of what -i asks for would leave somebody outside."""
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        listen_tcp(["127.0.0.1", "192.0.2.1"], 0)


def test_of_a_names_addresses_one_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may stand for addresses that this machine does not have (any more)."""

    def resolve(name: str, port: int, *_: object, **__: object) -> list[Any]:
        stream = (socket.SOCK_STREAM, 6, "")
        return [
            (socket.AF_INET, *stream, ("192.0.2.1", port)),
            (socket.AF_INET, *stream, ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    sockets = listen_tcp(["some.name"], 0)
    assert [s.getsockname()[0] for s in sockets] == ["127.0.0.1"]
    close(sockets)


def test_without_addresses_this_machine_alone() -> None:
    sockets = listen_tcp((), 0)
    found = {s.getsockname()[0] for s in sockets}
    assert found == {host for host in ("127.0.0.1", "::1") if can_bind(host)}
    close(sockets)


def test_a_machine_with_half_a_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    real = listen._listen

    def no_ipv6(kind: int, where: Any) -> socket.socket:
        if kind == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return real(kind, where)

    monkeypatch.setattr(listen, "_listen", no_ipv6)
    sockets = listen_tcp((), 0)
    assert [s.getsockname()[0] for s in sockets] == ["127.0.0.1"]
    close(sockets)
    with pytest.raises(ConfigError, match=r"cannot listen on \[::1\]"):
        listen_tcp((), 0, socket.AF_INET6)


@pytest.mark.parametrize(
    ("port", "says"),
    [
        ("65536", "port 65536 is out of range"),
        ("-1", "port -1 is out of range"),
        (70000, "port 70000 is out of range"),
        ("0x10", "'0x10'"),
        ("no-such-service", "'no-such-service'"),
        ("", "''"),
        ("٣", "'٣'"),
        ("\udcff", "neither a number nor the name of a service"),
    ],
)
def test_ports_that_are_none(port: str | int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        listen_tcp(["127.0.0.1"], port)
    assert says in str(caught.value)


@pytest.mark.parametrize("port", [" 0 ", 0, "00"])
def test_ports_that_are_one(port: str | int) -> None:
    close(listen_tcp(["127.0.0.1"], port))


def test_a_service_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getservbyname", lambda name, kind: {"nbd": 0}[name])
    close(listen_tcp(["127.0.0.1"], "nbd"))


@pytest.mark.parametrize("name", ["nosuch.invalid", "256.0.0.1", "\udcff", "a" * 70 + ".b", "a..b"])
def test_names_of_nobody(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        listen_tcp([name], 0)
    assert str(caught.value).startswith(f"cannot listen on {name}: ")


def test_another_server_can_follow_at_once() -> None:
    """Connections of the one before, in TIME_WAIT, do not keep the port."""
    (first,) = listen_tcp(["127.0.0.1"], 0)
    port = first.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        accepted = first.accept()[0]
        first.close()
        accepted.close()  # the server closes first: TIME_WAIT is its own
        assert client.recv(1) == b""
    close(listen_tcp(["127.0.0.1"], port))


# -- vsock -----------------------------------------------------------------------------------------


def has_vsock() -> bool:
    """Whether this kernel has the sockets; not whether anybody can be reached by them."""
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def test_vsock() -> None:
    if not has_vsock():
        with pytest.raises(ConfigError, match=r"^--vsock: this kernel has no vsock sockets: "):
            listen_vsock(0)
        return
    with listen_vsock(0) as sock:
        cid, port = sock.getsockname()
        assert cid == socket.VMADDR_CID_ANY
        assert port not in (0, socket.VMADDR_PORT_ANY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        with pytest.raises(ConfigError, match=f"^cannot listen on vsock port {port}: Address alr"):
            listen_vsock(port)
    with listen_vsock(str(port)) as sock:
        assert sock.getsockname() == (socket.VMADDR_CID_ANY, port)


@pytest.mark.parametrize("port", ["", "x", "-1", str(2**32 - 1), "nbd", "1.5"])
def test_vsock_ports_that_are_none(port: str) -> None:
    with pytest.raises(ConfigError) as caught:
        listen_vsock(port)
    assert repr(port) in str(caught.value)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EACCES])
def test_a_kernel_without_vsock(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(ConfigError, match=f"no vsock sockets: {os.strerror(number)} "):
        listen_vsock()
    monkeypatch.delattr(socket, "AF_VSOCK")
    with pytest.raises(ConfigError, match="this system has no vsock sockets"):
        listen_vsock()


def test_a_client_over_vsock(connect: Connect) -> None:
    """All the way where the machine can reach itself (the kernel's vsock_loopback)."""
    if not has_vsock():
        done = pynbdkit("--vsock", "-p", "0", "memory", "1M", "--run", "true")
        assert done.returncode == 1
        assert "no vsock sockets" in done.stderr
        return
    words = ["-f", "--vsock", "-p", "0", "--print-uri", "memory", "1M"]
    with running(*words, stdout=-1) as process:
        assert process.stdout is not None
        uri = process.stdout.readline().decode().strip()
        assert uri.startswith("nbd+vsock://1:")
        port = int(uri.rpartition(":")[2])
        with pytest.raises(ConfigError, match="Address already in use"):
            listen_vsock(port)  # it is there, whoever can reach it
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect((1, port))
                reached = True
            except OSError:
                reached = False  # there is no loopback in this kernel
        if reached:
            handle = connect(uri)
            handle.pwrite(b"v" * 512, 0)
            assert handle.pread(512, 0) == b"v" * 512
            handle.shutdown()
        process.terminate()
        assert process.wait(30) == 0


# -- socket activation -----------------------------------------------------------------------------


def activated(
    *arguments: str, fds: str, setup: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Our command line, told of inherited descriptors; `setup` is shell code before it."""
    code = f'{setup}\nLISTEN_PID=$$ LISTEN_FDS="{fds}" exec "$@"'
    return subprocess.run(
        ["bash", "-c", code, "bash", *COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
        **options,
    )


@pytest.mark.parametrize(
    ("fds", "setup", "says"),
    [
        ("0", "", "LISTEN_FDS=0 is not"),
        ("-1", "", "LISTEN_FDS=-1 is not"),
        ("x", "", "LISTEN_FDS=x is not"),
        ("99999999999", "", "LISTEN_FDS=99999999999 is not"),
        ("1", "exec 3<&-", "descriptor 3: Bad file descriptor"),
        ("1", "exec 3</dev/null", "descriptor 3: Socket operation on non-socket"),
    ],
)
def test_activation_that_cannot_be(fds: str, setup: str, says: str) -> None:
    done = activated("memory", "1M", fds=fds, setup=setup)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


@pytest.mark.parametrize("words", ["-i 127.0.0.1", "-p 0", "--run true", "-s", "-U -"])
def test_activation_excludes_other_places(words: str) -> None:
    """As nbdkit-service(1) says."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        done = activated(
            *words.split(),
            "memory",
            "1M",
            fds="1",
            setup=f"exec 3<&{sock.fileno()}",
            pass_fds=[sock.fileno()],
        )
    assert done.returncode == 1
    assert f"excludes {words.split()[0]} " in done.stderr


def test_a_connected_socket_is_none_to_listen_on() -> None:
    first, second = socket.socketpair()
    with first, second:
        done = activated(
            "memory", "1M", fds="1", setup=f"exec 3<&{first.fileno()}", pass_fds=[first.fileno()]
        )
    assert done.returncode == 1
    assert "descriptor 3 is not a listening socket" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": ""},
        {"LISTEN_PID": "1"},
    ],
)
def test_activation_of_another_process_is_not_ours(environment: dict[str, str]) -> None:
    """And our children are not told of it."""
    words = ["-U", "-", "memory", "1M", "--run", "env | grep -c LISTEN_"]
    done = pynbdkit(*words, env={**os.environ, **environment})
    assert (done.returncode, done.stdout) == (1, "0\n"), done.stderr


def test_several_inherited_sockets_are_served(sockdir: Path, connect: Connect) -> None:
    """In the foreground; the sockets stay the service manager's."""
    path = str(sockdir / "s")
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(path)
        unix.listen()
        port = tcp.getsockname()[1]
        code = 'LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=a:b exec "$@"'
        setup = f"exec 3<&{unix.fileno()} 4<&{tcp.fileno()}"
        words = [*COMMAND, "-P", str(sockdir / "pid"), "--print-uri", "memory", "1M"]
        process = subprocess.Popen(
            ["bash", "-c", f"{setup}; {code}", "bash", *words],
            pass_fds=[unix.fileno(), tcp.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"nbd+unix:///?socket={path}\n"
            assert int((sockdir / "pid").read_text()) == process.pid
            first = connect(f"nbd+unix:///?socket={path}")
            second = connect(f"nbd://127.0.0.1:{port}")
            first.pwrite(b"x" * 512, 0)
            assert second.pread(512, 0) == b"x" * 512
        finally:
            process.terminate()
            assert process.wait(30) == 0
            assert process.stdout is not None
            process.stdout.close()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)  # the listening socket lives on with its owner


def test_libnbd_activates_us(nbd: ModuleType) -> None:
    """A client that we did not write plays the service manager."""
    handle = nbd.NBD()
    handle.connect_systemd_socket_activation([*COMMAND, "memory", "1M"])
    assert handle.get_size() == 1 << 20
    handle.shutdown()
