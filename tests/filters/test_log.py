"""The log filter: its lines are nbdkit's lines; its script hears everything, in order."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pynbdkit
import support
from pynbdkit import ConfigError, Device, Flag, Fua, Session, ThreadModel
from pynbdkit.chain import Chain
from pynbdkit.filters.log import LogFilter, quote

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} ")


class Disk(Device):
    """Has everything; its second half fails, each way in its own place."""

    def get_size(self) -> int:
        return 1 << 20

    def block_size(self) -> tuple[int, int, int]:
        return (512, 4096, 1 << 20)

    def is_rotational(self) -> bool:
        return True

    def can_fua(self) -> int:
        return Fua.NATIVE

    def can_fast_zero(self) -> bool:
        return True

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        fail(offset)
        return bytes(count)

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        fail(offset)

    def flush(self, flags: int) -> None: ...

    def trim(self, count: int, offset: int, flags: int) -> None:
        fail(offset)

    def zero(self, count: int, offset: int, flags: int) -> None:
        if flags & 8:
            raise OSError(errno.EOPNOTSUPP, "slow")
        fail(offset)

    def cache(self, count: int, offset: int, flags: int) -> None:
        fail(offset)

    def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
        fail(offset)
        kinds = (0,) if flags & Flag.REQ_ONE else (0, 1, 2, 3)
        return [(offset + 4096 * kind, 4096, kind) for kind in kinds]


ERRORS = ("EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EROFS", "EFBIG", "EDQUOT")


def fail(offset: int) -> None:
    if offset >= 1 << 19:
        name = ERRORS[(offset >> 12) % len(ERRORS)]
        raise OSError(getattr(errno, name), "told to fail")


class DiskPlugin(pynbdkit.Plugin):
    name = "disk"

    def list_exports(self, readonly: bool, is_tls: bool) -> Iterable[str | tuple[str, str]]:
        return ["", ("a b", "described"), "it's $5", "plain"]

    def open(self, session: Session) -> Device:
        return Disk()


SCRIPT = """
import errno, nbdkit
API_VERSION = 2
ERRORS = ("EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EROFS", "EFBIG", "EDQUOT")
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def list_exports(readonly, tls):
    return [("", ""), ("a b", "described"), ("it's $5", ""), ("plain", "")]
def open(readonly): return 1
def get_size(h): return 1 << 20
def block_size(h): return (512, 4096, 1 << 20)
def is_rotational(h): return True
def can_fua(h): return nbdkit.FUA_NATIVE
def can_trim(h): return True
def can_zero(h): return True
def can_fast_zero(h): return True
def can_cache(h): return nbdkit.CACHE_NATIVE
def can_extents(h): return True
def raises(number):
    nbdkit.set_error(number)
    raise OSError(number, "told to fail")
def fail(offset):
    if offset >= 1 << 19:
        raises(getattr(errno, ERRORS[(offset >> 12) % len(ERRORS)]))
def pread(h, buf, offset, flags): fail(offset)
def pwrite(h, buf, offset, flags): fail(offset)
def flush(h, flags): pass
def trim(h, count, offset, flags): fail(offset)
def zero(h, count, offset, flags):
    if flags & 8: raises(errno.EOPNOTSUPP)
    fail(offset)
def cache(h, count, offset, flags): fail(offset)
def extents(h, count, offset, flags):
    fail(offset)
    kinds = (0,) if flags & 4 else (0, 1, 2, 3)
    return [(offset + 4096 * kind, 4096, kind) for kind in kinds]
"""
"""The same disk for nbdkit."""


def client_run(nbd: Any, socket: str, names: Iterable[str]) -> None:
    """A listing, then a connection per name."""
    lister = nbd.NBD()
    lister.set_opt_mode(True)
    lister.connect_unix(socket)
    lister.opt_list(lambda *_: 0)
    lister.opt_abort()
    for name in names:
        client_does_everything(nbd, socket, name)


def client_does_everything(nbd: Any, socket: str, name: str) -> None:
    """Each request, well and badly."""
    half = 1 << 19
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.add_meta_context("base:allocation")
    client.set_export_name(name)
    client.connect_unix(socket)
    fua, fast, no_hole = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_NO_HOLE
    calls: list[Callable[[], Any]] = [
        lambda: client.pread(512, 0),
        lambda: client.pwrite(b"x" * 1024, 512),
        lambda: client.pwrite(b"x" * 512, 4096, fua),
        lambda: client.trim(4096, 8192),
        lambda: client.trim(4096, 8192, fua),
        lambda: client.zero(65536, 0),
        lambda: client.zero(65536, 0, no_hole | fua),
        lambda: client.zero(65536, 0, fast),
        lambda: client.cache(512, 0),
        lambda: client.flush(),
        lambda: client.block_status(65536, 0, lambda *_: 0),
        lambda: client.block_status(65536, 4096, lambda *_: 0, nbd.CMD_FLAG_REQ_ONE),
        *(lambda n=n: client.pread(512, half + 4096 * n) for n in range(len(ERRORS))),
        lambda: client.pwrite(b"x" * 512, half),
        lambda: client.trim(512, half + 8192),
        lambda: client.zero(512, half + 4096 * 7),
        lambda: client.cache(512, half),
        lambda: client.block_status(512, half + 8192, lambda *_: 0),
        lambda: client.pread(512, 2 << 20),  # refused by the server: no filter sees it
    ]
    for call in calls:
        try:
            call()
        except nbd.Error:
            pass
    client.shutdown()


NAMES = ["plain", "with space", "it's", 'a"b', "a$b", "a`b", "a\\b", "é", "a!b", "a-b_c.d/e:f=g,h"]


def lines(path: Path) -> list[str]:
    """The log without its times, each of which is checked."""
    result = []
    for line in path.read_text().splitlines():
        assert TIMESTAMP.match(line), line
        result.append(TIMESTAMP.sub("", line))
    return result


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in path.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in {path.read_text()}"
        time.sleep(0.01)


def test_lines_are_nbdkits(nbd: Any, sockdir: Path) -> None:
    """The same disk, the same client: the same log, line by line."""
    script = sockdir / "disk.py"
    script.write_text(SCRIPT)
    theirs = sockdir / "theirs"
    with support.ServerProcess(
        sockdir,
        ["--filter=log", "python", script, f"logfile={theirs}"],
        [support.program("nbdkit")],
    ) as peer:
        # The harness's first look at nbdkit's socket is a connection too: one Preconnect more.
        wait_for(theirs, "...Preconnect id=1")
        client_run(nbd, str(peer.socket), NAMES)
        wait_for(theirs, f"connection={len(NAMES)} Disconnect")
    ours = sockdir / "ours"
    log = LogFilter(logfile=str(ours))
    with pynbdkit.serve(DiskPlugin(), filters=[log]) as server:
        assert server.socket is not None
        client_run(nbd, server.socket, NAMES)

    renumbered = [
        re.sub(r"(Preconnect id=)(\d+)", lambda m: f"{m[1]}{int(m[2]) - 1}", line)
        for line in lines(theirs)
        if "Preconnect id=1 " not in line
    ]
    assert in_order(lines(ours)) == in_order(renumbered)
    assert len(renumbered) > 50 * len(NAMES)


def in_order(log: list[str]) -> list[str]:
    """Each connection's lines by themselves: a new client may overtake a Disconnect."""

    def connection(line: str) -> int:
        match = re.match(r"connection=(\d+)", line)
        return int(match[1]) if match else 0

    return sorted(log, key=connection)


def test_a_whole_session(nbd: Any, sockdir: Path) -> None:
    """The log of a short session, as it is documented."""
    path = sockdir / "log"
    with pynbdkit.serve(DiskPlugin(), filters=[LogFilter(logfile=str(path))]) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        client.pwrite(b"x" * 512, 1024, nbd.CMD_FLAG_FUA)
        with pytest.raises(nbd.Error):
            client.pread(512, 1 << 19)
        client.shutdown()
    assert lines(path) == [
        "Ready thread_model=3",
        "Preconnect id=1 readonly=0 ...",
        "...Preconnect id=1 return=0",
        'connection=1 Connect export="" tls=0 size=0x100000 minsize=0x200 prefsize=0x1000'
        " maxsize=0x100000 write=1 flush=1 rotational=1 trim=1 zero=2 fua=2 extents=1 cache=2"
        " fast_zero=1",
        "connection=1 Write id=1 offset=0x400 count=0x200 fua=1 ...",
        "connection=1 ...Write id=1 return=0",
        "connection=1 Read id=2 offset=0x80000 count=0x200 ...",
        "connection=1 ...Read id=2 return=-1 error=EPERM",
        "connection=1 Disconnect transactions=2",
    ]


def test_from_the_command_line(
    serve: Callable[..., support.ServerProcess], connect: Callable[..., Any], tmp_path: Path
) -> None:
    """Between two other filters: what the first made of a request, not yet the second."""
    log = tmp_path / "log"
    layers = ("--filter=fua", "--filter=log", "--filter=delay")
    server = serve(*layers, "memory", "1M", "fuamode=force", f"logfile={log}", "wdelay=1ms")
    connect(server).pwrite(b"x" * 512, 0)
    server.stop()
    assert [line for line in lines(log) if "Write" in line] == [
        "connection=1 Write id=1 offset=0x0 count=0x200 fua=1 ...",
        "connection=1 ...Write id=1 return=0",
    ]


def test_read_only_session(nbd: Any, sockdir: Path) -> None:
    path = sockdir / "log"
    log = LogFilter(logfile=str(path))
    with pynbdkit.serve(DiskPlugin(), filters=[log], readonly=True) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        client.shutdown()
    assert "Preconnect id=1 readonly=1 ..." in lines(path)
    connect = next(line for line in lines(path) if "Connect" in line)
    assert (
        " write=0 flush=1 rotational=1 trim=0 zero=0 fua=0 extents=1 cache=2 fast_zero=0" in connect
    )


def test_times_are_true(sockdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local time, to the microsecond, never backwards."""
    monkeypatch.setenv("TZ", "XXX-03:00")
    time.tzset()
    try:
        path = sockdir / "log"
        before = time.time()
        layer, chain = opened(LogFilter(logfile=str(path)))
        for _ in range(100):
            layer.pread(512, 0, 0)
        close(layer, chain)
        after = time.time()
        stamps = [line[:26] for line in path.read_text().splitlines()]
        assert stamps == sorted(stamps)
        for stamp, moment in ((stamps[0], before), (stamps[-1], after)):
            seconds = time.mktime(time.strptime(stamp[:19], "%Y-%m-%d %H:%M:%S"))
            assert before - 0.001 <= seconds + float(stamp[19:]) <= after
            assert stamp[:13] == time.strftime("%Y-%m-%d %H", time.localtime(moment))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_seconds_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    log = LogFilter(logfile=str(path))
    log.get_ready()
    moments = (1_000_000_000_999_999_999, 1_000_000_001_000_000_000, 1_000_000_061_000_001_000)
    for moment in moments:
        monkeypatch.setattr(time, "time_ns", lambda moment=moment: moment)
        log.entry("Tick", "PRINT", "")
    log.unload()
    stamps = [line.split()[1] for line in path.read_text().splitlines()[1:]]
    assert [stamp[6:] for stamp in stamps] == ["40.999999", "41.000000", "41.000001"]
    assert stamps[2] > stamps[1]


def opened(
    log: LogFilter, plugin: pynbdkit.Plugin | None = None, **session: Any
) -> tuple[pynbdkit.Layer, Chain]:
    chain = Chain(plugin or DiskPlugin(), [log])
    chain.load()
    chain.complete()
    chain.get_ready()
    chain.after_fork()
    return chain.open(Session(**session)), chain


def close(layer: pynbdkit.Layer, chain: Chain) -> None:
    layer.close()
    assert not [*chain.cleanup(), *chain.unload()]


def test_fork_is_logged_by_the_child(tmp_path: Path) -> None:
    """A server that goes to the background says so; the file and the lines are the same."""
    path = tmp_path / "log"
    chain = Chain(DiskPlugin(), [LogFilter(logfile=str(path))])
    chain.load()
    chain.complete()
    chain.get_ready()
    child = os.fork()
    if child == 0:
        try:
            chain.after_fork()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    chain.unload()
    assert lines(path) == ["Ready thread_model=3", "Fork"]


@pytest.mark.parametrize("append", [False, True])
def test_append(tmp_path: Path, append: bool) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    close(*opened(LogFilter(logfile=str(path), logappend=append)))
    assert path.read_text().startswith("before\n") == append
    assert path.read_text().count("Ready") == 1


def test_timings(tmp_path: Path) -> None:
    """What a call took stands at the end of its last line, failed or not."""

    class Slow(pynbdkit.Plugin):
        def open(self, session: Session) -> Device:
            class Sleeper(Disk):
                def pread(self, count: int, offset: int, flags: int) -> bytes:
                    time.sleep(0.02)
                    return super().pread(count, offset, flags)

            return Sleeper()

    path = tmp_path / "log"
    layer, chain = opened(LogFilter(logfile=str(path), logtimings="true"), Slow())
    layer.pread(512, 0, 0)
    with pytest.raises(OSError, match="told to fail"):
        layer.pread(512, 1 << 19, 0)
    close(layer, chain)
    text = path.read_text()
    took = re.findall(r"\.\.\.Read id=\d return=(\S+(?: error=\w+)?) seconds=(\d+\.\d{6})\n", text)
    assert [word for word, _ in took] == ["0", "-1 error=EPERM"]
    assert all(0.02 <= float(seconds) < 30 for _, seconds in took)
    assert "transactions=2\n" in text


def test_threads_do_not_mix_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads, one file: whole lines, every id once, each ENTER with its LEAVE.

    A line may take several writes; here it always does.
    """
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:30]))
    path = tmp_path / "log"
    layer, chain = opened(LogFilter(logfile=str(path)))
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(100):
            layer.pread(512, 0, 0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(layer, chain)
    stamps = [line[:26] for line in path.read_text().splitlines()]
    assert stamps == sorted(stamps)
    log = [line for line in lines(path) if "Read " in line]
    assert len(log) == 1600
    begun = {
        int(m[1]): n for n, line in enumerate(log) if (m := re.search(r" Read id=(\d+) ", line))
    }
    ended = {
        int(m[1]): n
        for n, line in enumerate(log)
        if (m := re.search(r"\.\.\.Read id=(\d+) ", line))
    }
    assert set(begun) == set(ended) == set(range(1, 801))
    assert all(begun[number] < ended[number] for number in begun)
    assert lines(path)[-1] == "connection=1 Disconnect transactions=800"


@pytest.mark.parametrize("model", range(4))
def test_ready_tells_the_thread_model_of_all(tmp_path: Path, model: int) -> None:
    path = tmp_path / "log"
    plugin = DiskPlugin()
    plugin.thread_model = model
    close(*opened(LogFilter(logfile=str(path)), plugin))
    assert lines(path)[0] == f"Ready thread_model={model}"
    assert ThreadModel.PARALLEL == 3


class Refusing(DiskPlugin):
    def preconnect(self, readonly: bool) -> None:
        raise OSError(errno.ENOSPC, "no room")

    def list_exports(self, readonly: bool, is_tls: bool) -> Iterable[str | tuple[str, str]]:
        raise ValueError("no idea")

    def open(self, session: Session) -> Device:
        if session.export_name == "bad":
            raise OSError(errno.EACCES, "not you")
        return Disk()


def test_refusals(tmp_path: Path) -> None:
    """What the layers below refuse is logged; a refused open has no Connect, but its number."""
    path = tmp_path / "log"
    layer, chain = opened(LogFilter(logfile=str(path)), Refusing())
    with pytest.raises(OSError, match="no room"):
        chain.preconnect(True)
    with pytest.raises(ValueError, match="no idea"):
        chain.list_exports(True, True)
    with pytest.raises(OSError, match="not you"):
        chain.open(Session(export_name="bad"))
    chain.open(Session(export_name="good")).close()
    close(layer, chain)
    log = lines(path)
    assert log[2:6] == [
        "Preconnect id=1 readonly=1 ...",
        "...Preconnect id=1 return=-1 error=ENOSPC",
        "ListExports id=1 readonly=1 tls=1 ...",
        "...ListExports id=1 return=-1 error=EIO",
    ]
    assert [line.split(" tls")[0] for line in log[6:]] == [
        "connection=3 Connect export=good",
        "connection=3 Disconnect transactions=0",
        "connection=1 Disconnect transactions=0",
    ]


def test_other_exceptions_are_eio(tmp_path: Path) -> None:
    class Broken(pynbdkit.Plugin):
        def open(self, session: Session) -> Device:
            class Typo(Disk):
                def pread(self, count: int, offset: int, flags: int) -> bytes:
                    raise ZeroDivisionError

            return Typo()

    path = tmp_path / "log"
    layer, chain = opened(LogFilter(logfile=str(path)), Broken())
    with pytest.raises(ZeroDivisionError):
        layer.pread(512, 0, 0)
    close(layer, chain)
    assert "connection=1 ...Read id=1 return=-1 error=EIO" in lines(path)


def test_inactive_without_file_and_script() -> None:
    """It adds nothing at all."""
    layer, chain = opened(LogFilter())
    assert layer.next is not None
    assert layer.pwrite == layer.next.pwrite
    assert layer.unchecked_pread == layer.next.unchecked_pread
    chain.preconnect(False)
    assert chain.list_exports(False, False)[1] == ("a b", "described")
    close(layer, chain)


def test_exports_are_handed_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    layer, chain = opened(LogFilter(logfile=str(path)))
    assert chain.list_exports(False, False)[1] == ("a b", "described")
    close(layer, chain)
    assert r'...ListExports id=1 exports=("" "a b" "it' + r"'s \$5" + '" plain) return=0' in lines(
        path
    )


@pytest.mark.parametrize("word", ["/dev/stderr", "/dev/fd/2"])
def test_stderr_is_not_truncated(tmp_path: Path, word: str) -> None:
    """stderr may be a file with something in it, which stays."""
    path = tmp_path / "stderr"
    code = (
        "import sys; from pynbdkit.filters.log import LogFilter; sys.stderr.write('before\\n');"
        f"sys.stderr.flush(); log = LogFilter(logfile={word!r}); log.get_ready(); log.unload();"
        "sys.stderr.write('after\\n')"
    )
    with path.open("wb") as stderr:
        subprocess.run([sys.executable, "-c", code], stderr=stderr, check=True)
    text = TIMESTAMP.sub("", path.read_text())
    assert text == "before\nReady thread_model=3\nafter\n"


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    log = LogFilter(logfile=str(tmp_path / "missing" / "log"))
    with pytest.raises(ConfigError, match=r"cannot open logfile .*/missing/log: No such file"):
        log.get_ready()


def test_full_disk_is_reported_once(capfd: pytest.CaptureFixture[str]) -> None:
    """The log cannot be written: one line to the operator, and the service goes on."""
    if not os.path.exists("/dev/full"):
        support.missing("/dev/full")
    layer, chain = opened(LogFilter(logfile="/dev/full"))
    assert layer.pread(512, 0, 0) == bytes(512)
    close(layer, chain)
    assert capfd.readouterr().err.count("entries are lost") == 1


def test_who_may_wait() -> None:
    """A file is not waited for; a script may be, and the server finds out."""
    for log, blocking in (
        (LogFilter(logfile="/dev/null"), False),
        (LogFilter(logscript=":"), None),
    ):
        plugin = DiskPlugin()
        plugin.blocking = False
        layer, chain = opened(log, plugin)
        assert layer.may_block() is blocking
        close(layer, chain)


# -- the script ------------------------------------------------------------------------------------


def test_script_hears_everything_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        'echo "$type|$act|$connection|$id|$offset|$count|$fua|$return|$error'
        f'|${{exports[1]}}|${{extents[5]}}|$export" >>{out}'
    )
    layer, chain = opened(LogFilter(logscript=script), export_name="x\"$(touch y)`touch y`\n'")
    chain.preconnect(False)
    chain.list_exports(False, False)
    layer.pwrite(bytes(512), 1024, 2)
    with pytest.raises(OSError, match="told to fail"):
        layer.pread(512, 1 << 19, 0)
    layer.extents(65536, 0, 0)
    close(layer, chain)  # waits for the script
    assert out.read_text() == (
        "PRINT|Ready||||||||||\n"
        "PRINT|Connect|1||||2|||||x\"$(touch y)`touch y`\n'\n"
        "ENTER|Preconnect||1||||||||\n"
        "LEAVE|Preconnect||1||||0||||\n"
        "ENTER|ListExports||1||||||||\n"
        "LEAVE|ListExports||1||||0||a b||\n"
        "ENTER|Write|1|1|0x400|0x200|1|||||\n"
        "LEAVE|Write|1|1||||0||||\n"
        "ENTER|Read|1|2|0x80000|0x200||||||\n"
        "LEAVE|Read|1|2||||-1|EPERM|||\n"
        "ENTER|Extents|1|3|0x0|0x10000||||||\n"
        "LEAVE|Extents|1|3||||0|||hole|\n"
        "PRINT|Disconnect|1|||||||||\n"
    )


def test_script_and_file_together(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "log"
    log = LogFilter(logscript=f"echo $act >>{out}", logfile=str(path))
    close(*opened(log))
    assert out.read_text().split() == ["Ready", "Connect", "Disconnect"]
    assert len(lines(path)) == 3


def test_script_cannot_disturb(tmp_path: Path) -> None:
    """A script that fails, or is nonsense, changes nothing for the client."""
    for script in ("exit 3", "if", "kill $$"):
        layer, chain = opened(LogFilter(logscript=script))
        assert layer.pread(512, 0, 0) == bytes(512)
        close(layer, chain)


def test_script_has_no_stdin(tmp_path: Path) -> None:
    """What is on the server's stdin is not for it."""
    out = tmp_path / "out"
    code = (
        f"from pynbdkit.filters.log import LogFilter; LogFilter(logscript='cat >{out}').get_ready()"
    )
    subprocess.run([sys.executable, "-c", code], input=b"a client's bytes", check=True)
    assert out.read_bytes() == b""


def test_requests_do_not_wait_for_the_script(tmp_path: Path) -> None:
    """The script hangs until the test lets it go; meanwhile requests are answered."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    out = tmp_path / "out"
    log = LogFilter(logscript=f"if [ $act = Connect ]; then read <{gate}; fi; echo $act >>{out}")
    layer, chain = opened(log)
    for _ in range(3):
        layer.pread(512, 0, 0)
    layer.close()
    opener = threading.Thread(target=gate.write_text, args=("go\n",))
    opener.start()
    assert not [*chain.cleanup(), *chain.unload()]
    opener.join()
    assert out.read_text().split() == ["Ready", "Connect", *["Read"] * 6, "Disconnect"]


STRAY = "".join(map(chr, range(0xDC80, 0xDD00)))
ANYTHING = st.characters(exclude_characters="\0" + STRAY) | st.sampled_from("\\'\"$`!\n\x1b\ud800 ")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(ANYTHING), min_size=1, max_size=50))
def test_quotes_are_bashs(texts: list[str]) -> None:
    """bash reads each quoted text as the text; nothing ends the line."""
    words = [quote(text) for text in texts]
    assert all(word.isprintable() for word in words)
    done = subprocess.run(
        [support.program("bash"), "-c", "printf '%s\\0' " + " ".join(words)],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C.UTF-8"},
    )
    heard = done.stdout.split(b"\0")[:-1]
    assert [word.decode("utf-8", "surrogatepass") for word in heard] == texts


def test_stray_bytes_are_quoted_as_they_are() -> None:
    """A name that is not UTF-8 (a file's, say) is told byte by byte."""
    assert quote(os.fsdecode(b"a\xff'b")) == r"$'a\377\'b'"


def test_a_client_cannot_write_lines(tmp_path: Path) -> None:
    """An export's name with a line feed stays in its line."""
    path = tmp_path / "log"
    name = "x\n2020-01-01 00:00:00.000000 Ready thread_model=0\x1b[2J"
    close(*opened(LogFilter(logfile=str(path)), export_name=name))
    assert len(lines(path)) == 3
    assert (
        r"export=$'x\0122020-01-01 00:00:00.000000 Ready thread_model=0\033[2J'" in path.read_text()
    )
