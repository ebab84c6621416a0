"""serve() and load_plugin(): a server in somebody's own program."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
from pynbdkit import (
    ConfigError,
    Device,
    Filter,
    FilterDevice,
    LoadError,
    Plugin,
    Session,
    parameters,
)
from pynbdkit.complete import Layer
from raw import READ, Raw
from support import run

SIZE = 1 << 20


class Ram(Device):
    """A disk of its own for every object."""

    def __init__(self, size: int = SIZE) -> None:
        self.data = bytearray(size)
        self.closed = 0
        self.private = self  # neither a method nor a question

    def get_size(self) -> int:
        return len(self.data)

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return bytes(self.data[offset : offset + count])

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        self.data[offset : offset + len(buf)] = buf

    def flush(self, flags: int) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


class Life(Plugin):
    """Notes its life; `size` is declared, `bad` makes a step fail."""

    name = "life"
    size = parameters.size("Size", default=SIZE)
    bad = parameters.text("Step to fail in", default="")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.steps: list[str] = []

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if self.bad == name:
            raise ConfigError(f"life: no {name} today")

    def load(self) -> None:
        self._step("load")

    def config_complete(self) -> None:
        self._step("config_complete")

    def get_ready(self) -> None:
        self._step("get_ready")

    def after_fork(self) -> None:
        self._step("after_fork")

    def open(self, session: Session) -> Device:
        self._step("open")
        return Ram(self.size)

    def cleanup(self) -> None:
        self.steps.append("cleanup")

    def unload(self) -> None:
        self.steps.append("unload")


class Upper(Filter):
    """Turns what is read into capital letters; `also=` adds to it."""

    name = "upper"
    also = parameters.text("What is added to what is read", default="")

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        also = self.also.encode()

        class Device(FilterDevice):
            def pread(self, count: int, offset: int, flags: int) -> bytes:
                data = bytes(self.next.pread(count, offset, flags)).upper()
                return bytes(also + data)[:count]

        return Device(next(session))


# -- what may be served ----------------------------------------------------------------------------


def test_the_example_of_the_module() -> None:
    with pynbdkit.serve(pynbdkit.load_plugin("memory", size="1M")) as server:
        assert "1 MiB" in run("qemu-img", "info", server.uri).stdout


def test_a_plugin_lives_its_whole_life(connect: Callable[..., Any]) -> None:
    plugin = Life()
    with pynbdkit.serve(plugin) as server:
        assert plugin.steps == ["load", "config_complete", "get_ready", "after_fork"]
        client = connect(server)
        client.pwrite(b"hello", 3)
        assert client.pread(5, 3) == b"hello"
        client.shutdown()
    assert plugin.steps[4:] == ["open", "cleanup", "unload"]


def test_a_device_is_shared_by_all_and_closed_at_the_end(connect: Callable[..., Any]) -> None:
    device = Ram()
    with pynbdkit.serve(device) as server:
        one, other = connect(server), connect(server)
        one.pwrite(b"hello", 0)
        assert other.pread(5, 0) == b"hello"
        one.shutdown()
        other.flush()
        other.shutdown()
        assert bytes(device.data[:5]) == b"hello"
        assert device.closed == 0
    assert device.closed == 1


@pytest.mark.parametrize("make", [Ram, lambda: Ram(SIZE)], ids=["class", "function"])
def test_a_factory_makes_a_device_for_each_connection(
    make: Callable[[], Device], connect: Callable[..., Any]
) -> None:
    made = []

    def note() -> Device:
        made.append(make())
        return made[-1]

    with pynbdkit.serve(make if make is Ram else note) as server:
        one, other = connect(server), connect(server)
        one.pwrite(b"hello", 0)
        assert other.pread(5, 0) == bytes(5)
        one.shutdown()
        other.shutdown()
    assert [device.closed for device in made] == [1] * len(made)  # type: ignore[attr-defined]


def test_a_shared_device_is_what_the_device_is(connect: Callable[..., Any]) -> None:
    """No more and no less: the questions that it does not answer stay open."""

    class Plain(Device):
        def get_size(self) -> int:
            return 512

        def pread(self, count: int, offset: int, flags: int) -> bytes:
            return bytes(count)

    with pynbdkit.serve(Plain()) as server:
        client = connect(server)
        assert client.is_read_only()
        assert not client.can_flush()
    with pynbdkit.serve(Ram()) as server:
        client = connect(server)
        assert not client.is_read_only()
        assert client.can_flush()
        assert client.can_fua()
        assert not client.can_trim()
        assert not client.can_cache()


def test_a_shared_device_runs_in_threads_if_it_says_so() -> None:
    together = threading.Barrier(2)

    class Waiting(Ram):
        blocking = True

        def pread(self, count: int, offset: int, flags: int) -> bytes:
            together.wait(20)
            return bytes(count)

    with pynbdkit.serve(Waiting(), threads=2) as server:
        assert server.socket is not None
        with Raw(server.socket) as client:
            for cookie in range(4):
                client.ask(READ, cookie, 0, 8)
            assert {client.simple(8)[0] for _ in range(4)} == {0, 1, 2, 3}


# -- filters and parameters ------------------------------------------------------------------------


def test_filters_by_name_and_as_objects_the_first_outermost(connect: Callable[..., Any]) -> None:
    device = Ram()
    device.data[:11] = b"hello world"
    with pynbdkit.serve(
        device, filters=["offset", Upper(also="<")], parameters={"offset": "1"}
    ) as server:
        client = connect(server)
        assert client.get_size() == SIZE - 1
        assert client.pread(5, 0) == b"<ELLO"
    with pynbdkit.serve(
        device, filters=[Upper(), "offset"], parameters={"offset": "6", "also": ">"}
    ) as server:
        assert connect(server).pread(6, 0) == b">WORLD"


def test_parameters_reach_the_plugin(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(Life(), parameters={"size": "64k"}) as server:
        assert connect(server).get_size() == 65536


def test_load_plugin_makes_texts_of_values(tmp_path: Path, connect: Callable[..., Any]) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"hello" + bytes(507))
    with pynbdkit.serve(pynbdkit.load_plugin("file", file=disk)) as server:
        assert connect(server).pread(5, 0) == b"hello"
    with pynbdkit.serve(pynbdkit.load_plugin("memory", size=4096)) as server:
        assert connect(server).get_size() == 4096
    with pynbdkit.serve(
        pynbdkit.load_plugin("data", data="1 2 3", size=512), readonly=True
    ) as server:
        client = connect(server)
        assert client.pread(4, 0) == b"\1\2\3\0"
        assert client.is_read_only()


def test_load_plugin_takes_a_script(tmp_path: Path, connect: Callable[..., Any]) -> None:
    script = tmp_path / "disk.py"
    script.write_text(
        "def open(readonly): return 1\n"
        "def get_size(h): return 512\n"
        "def pread(h, count, offset): return b'x' * count\n"
    )
    with pynbdkit.serve(pynbdkit.load_plugin(str(script))) as server:
        assert connect(server).pread(3, 0) == b"xxx"


# -- where it listens ------------------------------------------------------------------------------


def test_the_default_socket_is_private_and_goes_away() -> None:
    with pynbdkit.serve(Ram) as server:
        assert server.socket is not None
        path = Path(server.socket)
        assert path.is_socket()
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert server.port is None
    assert not path.parent.exists()


def test_a_unix_socket_where_it_is_wanted(sockdir: Path, connect: Callable[..., Any]) -> None:
    path = sockdir / "a disk?&#%"
    with pynbdkit.serve(Ram, unix=path) as server:
        assert server.socket == str(path)
        assert connect(server).get_size() == SIZE
        assert connect(server.export_uri("an export/with &?# signs")).get_size() == SIZE
    assert not path.exists()
    with pynbdkit.serve(Ram, unix=str(path)):  # and again
        pass


@pytest.mark.parametrize(("address", "host"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_tcp(address: str, host: str, connect: Callable[..., Any]) -> None:
    if ":" in address:
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind((address, 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
    with pynbdkit.serve(Ram, tcp=(address, 0)) as server:
        assert server.socket is None
        assert server.port
        assert server.uri == f"nbd://{host}:{server.port}/"
        assert connect(server).get_size() == SIZE
        with pytest.raises(ConfigError, match=rf"{server.port}.*in use"):
            pynbdkit.serve(Ram, tcp=(address, server.port))


def test_the_names_of_exports_are_quoted() -> None:
    with pynbdkit.serve(Ram) as server:
        assert server.export_uri("a/b ?&#é").startswith(
            "nbd+unix:///a%2Fb%20%3F%26%23%C3%A9?socket="
        )
    with pynbdkit.serve(Ram, tcp=("127.0.0.1", 0)) as server:
        assert server.export_uri("a/b") == f"nbd://127.0.0.1:{server.port}/a%2Fb"


# -- options ---------------------------------------------------------------------------------------


def test_readonly(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(Ram, readonly=True) as server:
        assert connect(server).is_read_only()


def test_without_structured_replies(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(Ram, structured_replies=False) as server:
        assert not connect(server).get_structured_replies_negotiated()
    with pynbdkit.serve(Ram) as server:
        assert connect(server).get_structured_replies_negotiated()


def test_the_handshake_mask(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(Ram, handshake_mask=0) as server:
        assert connect(server, contexts=()).get_protocol() == "newstyle"
    with pynbdkit.serve(Ram) as server:
        assert connect(server).get_protocol() == "newstyle-fixed"


def test_connections_are_counted(nbd: ModuleType, connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(Ram) as server:
        assert server.connections == 0
        clients = [connect(server) for _ in range(3)]
        assert server.connections == 3
        for client in clients:
            client.shutdown()


def test_stop_in_the_middle_of_the_with_and_from_another_thread() -> None:
    plugin = Life()
    with pynbdkit.serve(plugin) as server:
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        stopper.join(20)
        assert plugin.steps[-1] == "unload"
    assert plugin.steps.count("unload") == 1


def test_the_server_is_stopped_when_the_body_raises() -> None:
    plugin = Life()
    with pytest.raises(KeyError), pynbdkit.serve(plugin):
        raise KeyError("body")
    assert plugin.steps[-2:] == ["cleanup", "unload"]


# -- mistakes --------------------------------------------------------------------------------------


def test_unix_and_tcp_exclude_each_other(sockdir: Path) -> None:
    with pytest.raises(ConfigError, match="unix and tcp"):
        pynbdkit.serve(Ram, unix=sockdir / "s", tcp=("127.0.0.1", 0))


def test_an_unknown_parameter() -> None:
    with pytest.raises(ConfigError, match="unknown parameter 'colour'"):
        pynbdkit.serve(Life(), parameters={"colour": "red"})
    with pytest.raises(ConfigError, match="unknown parameter 'colour'"):
        pynbdkit.load_plugin("memory", colour="red")


def test_a_missing_parameter() -> None:
    with pytest.raises(ConfigError, match="size"):
        pynbdkit.serve(pynbdkit.load_plugin("memory"))


def test_names_that_do_not_exist() -> None:
    with pytest.raises(LoadError, match="nosuch"):
        pynbdkit.load_plugin("nosuch")
    with pytest.raises(LoadError, match="nosuch"):
        pynbdkit.serve(Ram, filters=["nosuch"])


def test_a_path_that_is_taken_or_too_long(sockdir: Path) -> None:
    taken = sockdir / "taken"
    taken.write_text("mine")
    with pytest.raises(ConfigError, match=r"taken.*exists already"):
        pynbdkit.serve(Ram, unix=taken)
    assert taken.read_text() == "mine"
    with pytest.raises(ConfigError, match="107"):
        pynbdkit.serve(Ram, unix=sockdir / ("x" * 120))


def test_a_thread_model_that_does_not_exist() -> None:
    plugin = Life()
    plugin.thread_model = 7
    with pytest.raises(ConfigError, match="life: thread_model is 7"):
        pynbdkit.serve(plugin)


def test_importing_it_starts_no_server() -> None:
    assert (
        "pynbdkit.server.server"
        not in run(
            sys.executable, "-c", "import pynbdkit.embed, sys; print(*sys.modules)"
        ).stdout.split()
    )
