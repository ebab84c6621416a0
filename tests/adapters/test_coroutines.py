"""Scripts whose functions are `async def`: served by the command line, called as the others are."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from command import COMMAND
from pynbdkit import Layer, LoadError
from pynbdkit.adapters.script import ScriptPlugin
from pynbdkit.asynchronous import AsyncLayer
from support import ServerProcess, pynbdkit

Load = Callable[..., ScriptPlugin]
Serve = Callable[..., ServerProcess]

HEAD = """
import asyncio, errno, nbdkit
API_VERSION = 2
disk = bytearray(1 << 20)
calls = []
def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL
def open(readonly):
    return 1
def get_size(h):
    return len(disk)
"""
READ = """
async def pread(h, buf, offset, flags):
    await asyncio.sleep(0)
    buf[:] = disk[offset : offset + len(buf)]
"""
WRITE = """
async def pwrite(h, buf, offset, flags):
    await asyncio.sleep(0)
    assert buf.readonly
    disk[offset : offset + len(buf)] = buf
"""


def test_reads_and_writes(layer: Callable[..., Layer]) -> None:
    opened = layer(HEAD, READ, WRITE, "def flush(h, flags): calls.append('flush')")
    assert isinstance(opened, AsyncLayer)
    opened.pwrite(b"hello", 5, 2)
    assert bytes(opened.pread(7, 4, 0)) == b"\0hello\0"
    assert vars(opened.device)["script"]["calls"] == ["flush"]


def test_a_value_of_another_size_is_refused(layer: Callable[..., Layer]) -> None:
    opened = layer(HEAD, "async def pread(h, buf, offset, flags): buf[:] = b'toolong'")
    with pytest.raises(ValueError, match="different structures"):
        opened.pread(3, 0, 0)


@pytest.mark.parametrize("kind", ["return [(0, 512, 0), (512, 1 << 20, 3)]", "yield 0, 1 << 20, 3"])
def test_extents(layer: Callable[..., Layer], kind: str) -> None:
    opened = layer(HEAD, READ, f"async def extents(h, count, offset, flags):\n    {kind}")
    expected = [(0, 512, 0), (512, 512, 3)] if "return" in kind else [(0, 1024, 3)]
    assert opened.extents(1024, 0, 0) == expected


def test_extents_that_are_none(layer: Callable[..., Layer]) -> None:
    opened = layer(HEAD, READ, "async def extents(h, count, offset, flags): return 7")
    with pytest.raises(OSError, match="extents returned 7") as caught:
        opened.extents(512, 0, 0)
    assert caught.value.errno == errno.EIO


def test_questions_life_and_close(load: Load) -> None:
    from pynbdkit.chain import Chain
    from pynbdkit.session import Session

    plugin = load(
        HEAD.replace("def open", "async def open").replace("def get_size", "async def get_size"),
        READ,
        WRITE,
        "async def get_ready(): calls.append('get_ready')",
        "async def after_fork(): calls.append('after_fork')",
        "async def preconnect(readonly): calls.append('preconnect')",
        "async def list_exports(readonly, is_tls): return ['a', ('b', 'text')]",
        "async def default_export(readonly, is_tls): return 'a'",
        "async def can_fua(h): return nbdkit.FUA_NATIVE",
        "async def can_multi_conn(h): return 1",
        "async def close(h): calls.append('close')",
        "async def cleanup(): calls.append('cleanup')",
    )
    chain = Chain(plugin)
    chain.load()
    chain.get_ready()
    chain.after_fork()
    chain.preconnect(False)
    assert chain.list_exports(False, False) == [("a", ""), ("b", "text")]
    assert chain.default_export(False, False) == "a"
    opened = chain.open(Session())
    assert (opened.get_size(), opened.can_fua(), opened.can_multi_conn()) == (1 << 20, 2, True)
    opened.close()
    assert chain.cleanup() == []
    assert chain.unload() == []
    calls = ["get_ready", "after_fork", "preconnect", "close", "cleanup"]
    assert plugin._names["calls"] == calls


FAILS = """
async def pread(h, buf, offset, flags):
    if offset == 512:
        nbdkit.set_error(errno.ENOSPC)
    gates.append(gate := asyncio.Event())
    if len(gates) == 2:
        for one in gates:
            one.set()
    await gate.wait()  # both have come to here before one of them fails
    raise ValueError(f"at {offset}")
gates = []
"""


def test_set_error_is_for_one_call(
    nbd: ModuleType, serve: Serve, tmp_path: Path, connect: Callable[..., Any]
) -> None:
    """Of two that are in flight on one thread, each has its own; also across a thread."""
    (tmp_path / "p.py").write_text(HEAD + FAILS)
    server = serve(tmp_path / "p.py")
    client = connect(server)
    cookies = {offset: client.aio_pread(nbd.Buffer(8), offset) for offset in (512, 1024)}
    errors = {}
    for offset, cookie in cookies.items():
        with pytest.raises(nbd.Error) as caught:
            while not client.aio_command_completed(cookie):
                client.poll(-1)
        errors[offset] = caught.value.errnum
    assert errors == {512: errno.ENOSPC, 1024: errno.EIO}
    assert "ValueError: at 512 (set_error: ENOSPC)" in server.log()
    assert server.log().count("Traceback") >= 1
    assert 'File "' + str(tmp_path / "p.py") in server.log()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(20)


def test_set_error_of_a_plain_function_among_coroutines(layer: Callable[..., Layer]) -> None:
    opened = layer(
        HEAD,
        READ,
        WRITE.replace("await", "nbdkit.set_error(errno.ENOMEM); await"),
        "def flush(h, flags):\n    nbdkit.set_error(errno.ENOSPC)\n    raise ValueError('no')",
    )
    with pytest.raises(OSError, match="no") as caught:
        opened.pwrite(b"x", 0, 2)  # what pwrite said before it succeeded counts for nothing
    assert caught.value.errno == errno.ENOSPC


def test_a_step_that_fails_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(
        HEAD
        + READ
        + "async def get_ready():\n    await asyncio.sleep(0)\n    raise OSError('no')\n"
    )
    done = pynbdkit("-U", "-", tmp_path / "p.py", "--run", "true")
    line = (HEAD + READ).count("\n") + 3
    assert done.returncode == 1
    assert done.stderr == f"pynbdkit: error: {tmp_path}/p.py:{line}: get_ready: OSError: no\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (READ.replace("h, buf, offset, flags", "h, count, offset"), "'async def pread' needs API_"),
        ("def pread(h, count, offset): pass\nasync def close(h): pass", "'async def close' needs"),
    ],
)
def test_version_1_has_none(load: Load, text: str, message: str) -> None:
    """It would take a coroutine that nobody awaits for a write that was done."""
    with pytest.raises(LoadError, match=f"disk.py: {message}"):
        load(HEAD.replace("API_VERSION = 2", ""), text)


@pytest.mark.parametrize(
    "name", ["config(key, value)", "config_complete()", "thread_model()", "dump_plugin()"]
)
def test_what_comes_before_the_server(load: Load, name: str) -> None:
    function = name.partition("(")[0]
    with pytest.raises(LoadError, match=f"disk.py: {function} cannot be 'async def'"):
        load(HEAD, READ, f"async def {name}: pass")


SHARED = """
lock = None
async def get_ready():
    global lock, loop, ticks
    lock = asyncio.Lock()
    loop = asyncio.get_running_loop()
    ticks = asyncio.create_task(tick())
    await lock.acquire()
async def tick():
    lock.release()
async def after_fork():
    async with lock:
        assert asyncio.get_running_loop() is loop
"""


def test_in_the_background(sockdir: Path, connect: Callable[..., Any]) -> None:
    """What was made before the fork is there after it, in the same loop."""
    (sockdir / "p.py").write_text(HEAD + READ + WRITE + SHARED)
    done = pynbdkit("-U", "s", "-P", "pid", "./p.py", cwd=sockdir)
    assert done.returncode == 0, done.stderr
    pid = int((sockdir / "pid").read_text())
    try:
        client = connect(f"nbd+unix:///?socket={sockdir / 's'}")
        client.pwrite(b"x" * 512, 512)
        assert client.pread(512, 512) == b"x" * 512
    finally:
        os.kill(pid, signal.SIGTERM)


def test_over_two_pipes(nbd: ModuleType, sockdir: Path) -> None:
    (sockdir / "p.py").write_text(HEAD + READ + WRITE)
    client = nbd.NBD()
    client.connect_command(
        ["sh", "-c", 'cat | "$@" | cat', "sh", *COMMAND, "-s", str(sockdir / "p.py")]
    )
    client.pwrite(b"y" * 300_000, 512)
    assert client.pread(300_000, 512) == b"y" * 300_000
    client.shutdown()
