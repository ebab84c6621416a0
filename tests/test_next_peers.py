"""The newest clients that there are, libnbd 1.22 and qemu 10, with extended headers and without.

They ask for extended headers by themselves, so each test of everyday work runs twice: as the
server is, and with --no-eh. And what older clients see is the same in both cases.
"""

from __future__ import annotations

import errno
import filecmp
import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
import support
from command import wait_until
from pynbdkit import Device, Fua, RunningServer, Session
from pynbdkit.client import connect as own_connect
from support import next_peer, run

Serve = Callable[..., support.ServerProcess]

GIB, TIB, EIB = 1 << 30, 1 << 40, 1 << 60
HOLE, ZERO = 1, 2
WAYS = pytest.mark.parametrize("words", [(), ("--no-eh",)], ids=["extended", "no-eh"])

CLIENT = """
import json, sys
import nbd

h = nbd.NBD()
for name in sys.argv[2:]:
    h.add_meta_context(name)
h.connect_uri(sys.argv[1])

def status(count, offset, flags=0, only=None):
    found = []
    def extent(context, at, entries, error):
        found.append([context, at, entries])
    if only is None:
        h.block_status_64(count, offset, extent, flags)
    else:
        h.block_status_filter(count, offset, only, extent, flags)
    return found

def error_of(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        return error.errnum
    return 0

def say(value):
    print(json.dumps(value))
"""


def ask(uri: str, script: str, *contexts: str) -> Any:
    """What a script for libnbd 1.22 has to `say`; `h` is its connected handle."""
    done = run(next_peer("python3"), "-c", CLIENT + script, uri, *contexts)
    return json.loads(done.stdout)


# -- a disk that nothing but 64-bit lengths can walk through ---------------------------------------

SIZE = 8 * EIB - 1
ALLOCATION = [(6 * GIB, 0), (TIB, HOLE), (SIZE - 6 * GIB - TIB, HOLE | ZERO)]
AGE = [(5 * GIB, 7), (SIZE - 5 * GIB, 1)]
GENERATION = [(3 * EIB, 1 << 40), (SIZE - 3 * EIB, 5)]


class Huge(Device):
    """8 EiB less one byte, with two contexts of its own; `calls` has every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def get_size(self) -> int:
        return SIZE

    def can_fua(self) -> int:
        return Fua.NATIVE

    def can_fast_zero(self) -> bool:
        return True

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return b"x" * count

    def pwrite(self, buf: memoryview, offset: int, flags: int) -> None:
        self.calls.append(("pwrite", len(buf), offset, flags))

    def flush(self, flags: int) -> None:
        self.calls.append(("flush",))

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("trim", count, offset, flags))

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("zero", count, offset, flags))

    def cache(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("cache", count, offset, flags))

    def extents(self, count: int, offset: int, flags: int) -> Iterator[tuple[int, int, int]]:
        self.calls.append(("extents", count, offset, flags))
        return _placed(ALLOCATION)

    def contexts(self) -> tuple[str, ...]:
        return ("test:age", "test:generation")

    def block_status(
        self, context: str, count: int, offset: int, flags: int
    ) -> Iterator[tuple[int, int, int]]:
        self.calls.append((context, count, offset, flags))
        return _placed(AGE if context == "test:age" else GENERATION)


def _placed(pieces: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for length, status in pieces:
        yield start, length, status
        start += length


class Disks(pynbdkit.Plugin):
    name = "huge"

    def __init__(self, disk: Device) -> None:
        super().__init__()
        self._disk = disk

    def open(self, session: Session) -> Device:
        return self._disk


@pytest.fixture
def huge() -> Huge:
    return Huge()


@pytest.fixture
def server(huge: Huge) -> Iterator[RunningServer]:
    with pynbdkit.serve(Disks(huge)) as running:
        yield running


def listed(*answers: tuple[str, int, list[tuple[int, int]]]) -> list[list[Any]]:
    """As JSON has them."""
    return [[name, at, [list(pair) for pair in pairs]] for name, at, pairs in answers]


def test_extended_headers_are_agreed_on(server: RunningServer) -> None:
    asked = "say([h.get_extended_headers_negotiated(), h.can_block_status_payload(), h.get_size()])"
    assert ask(server.uri, asked, "base:allocation") == [True, True, SIZE]
    assert ask(server.uri, asked) == [True, False, SIZE]  # no context, so nothing to filter


def test_block_status_of_8_eib_in_one_request(server: RunningServer, huge: Huge) -> None:
    said = ask(server.uri, "say(status(h.get_size(), 0))", "base:allocation")
    assert said == listed(("base:allocation", 0, ALLOCATION))
    assert huge.calls == [("extents", SIZE, 0, 0)]


def test_one_extent_of_more_than_4_gib(server: RunningServer) -> None:
    script = "say(status(2 << 40, 4096, nbd.CMD_FLAG_REQ_ONE))"
    said = ask(server.uri, script, "base:allocation")
    assert said == listed(("base:allocation", 4096, [(6 * GIB - 4096, 0)]))


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        ("h.zero(6 << 30, 8192)", ("zero", 6 * GIB, 8192, 1)),
        ("h.zero(6 << 30, 1, nbd.CMD_FLAG_NO_HOLE)", ("zero", 6 * GIB, 1, 0)),
        ("h.zero(7 << 60, 0, nbd.CMD_FLAG_FUA)", ("zero", 7 * EIB, 0, 1 | 2)),
        ("h.zero(h.get_size(), 0, nbd.CMD_FLAG_FAST_ZERO)", ("zero", SIZE, 0, 1 | 8)),
        ("h.trim(5 << 30, 4096)", ("trim", 5 * GIB, 4096, 0)),
        ("h.trim(h.get_size() - 1, 1, nbd.CMD_FLAG_FUA)", ("trim", SIZE - 1, 1, 2)),
        ("h.cache(4 << 60, 3 << 60)", ("cache", 4 * EIB, 3 * EIB, 0)),
    ],
)
def test_more_than_4_gib_in_one_request(
    call: str, seen: tuple[Any, ...], server: RunningServer, huge: Huge
) -> None:
    ask(server.uri, call + "; say(0)")
    assert huge.calls == [seen]


def test_beyond_the_end_is_refused_and_the_connection_goes_on(
    server: RunningServer, huge: Huge
) -> None:
    """The sum of offset and length does not fit into 63 bits, or into 64."""
    script = """
h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_BOUNDS)
say([
    error_of(h.zero, h.get_size(), 1),
    error_of(h.zero, 2**64 - 1, 2**64 - 1),
    error_of(h.trim, 2**63, 0),
    error_of(h.cache, 2**64 - 1, 1),
    error_of(status, 2**63, 2**63),
    len(status(h.get_size(), 0)),
])
"""
    said = ask(server.uri, script, "base:allocation")
    assert said == [errno.ENOSPC, errno.ENOSPC, errno.EINVAL, errno.EINVAL, errno.EINVAL, 1]
    assert huge.calls == [("extents", SIZE, 0, 0)]


NAMES = ("base:allocation", "test:age", "test:generation")
WHOLE = {"base:allocation": ALLOCATION, "test:age": AGE, "test:generation": GENERATION}
"""The last one has more than 32 bits in its status."""


def test_several_contexts_at_once(server: RunningServer) -> None:
    said = ask(server.uri, "say(status(h.get_size(), 0))", *NAMES)
    assert sorted(said) == sorted(listed(*((name, 0, WHOLE[name]) for name in NAMES)))


@pytest.mark.parametrize(
    "only",
    [
        ("base:allocation",),
        ("test:generation",),
        ("test:generation", "base:allocation"),
        ("test:age", "test:generation"),
        NAMES,
    ],
    ids=", ".join,
)
def test_only_the_contexts_that_the_payload_names(
    only: tuple[str, ...], server: RunningServer, huge: Huge
) -> None:
    """And only those are looked up."""
    said = ask(server.uri, f"say(status(4 << 60, 0, 0, {list(only)}))", *NAMES)
    assert {name: pairs for name, _, pairs in said} == {
        name: [list(pair) for pair in _first(WHOLE[name], 4 * EIB)] for name in only
    }
    assert len(said) == len(only)
    looked_up = {"extents" if name == "base:allocation" else name for name in only}
    assert {call[0] for call in huge.calls} == looked_up
    assert len(huge.calls) == len(only)


def _first(pieces: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    result = []
    for length, status in pieces:
        if count > 0:
            result.append((min(length, count), status))
            count -= length
    return result


def test_a_filtered_request_leaves_the_next_one_alone(server: RunningServer) -> None:
    script = """
say([
    [name for name, _, _ in status(4096, 0, 0, ["test:age"])],
    sorted(name for name, _, _ in status(4096, 0)),
    len(h.pread(4096, 0)),
])
"""
    assert ask(server.uri, script, *NAMES) == [["test:age"], sorted(NAMES), 4096]


def test_old_clients_walk_through_it_in_steps_of_32_bits(
    server: RunningServer, huge: Huge, nbd: ModuleType, connect: Callable[..., Any]
) -> None:
    """libnbd from before extended headers: the lengths it gets are those that it can have."""
    handle = connect(server, contexts=("base:allocation", "test:age"))
    found: list[tuple[str, list[int]]] = []

    def extent(context: str, at: int, entries: list[int], error: Any) -> None:
        found.append((context, entries))

    handle.block_status(2**32 - 512, 5 * GIB, extent)
    assert dict(found) == {
        "base:allocation": [GIB, 0, 3 * GIB - 512, HOLE],
        "test:age": [4 * GIB - 512, 1],
    }
    handle.trim(2**32 - 512, 512)
    with pytest.raises(nbd.Error):
        handle.trim(2**32, 0)  # it knows that 32 bits cannot say it
    assert [call for call in huge.calls if call[0] == "trim"] == [("trim", 2**32 - 512, 512, 0)]


def test_qemu_img_map_asks_once(serve: Serve, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = serve("--filter=log", "memory", "4E", f"logfile={log}")
    done = run(next_peer("qemu-img"), "map", "--output=json", "-f", "raw", server.uri)
    entries = json.loads(done.stdout)
    assert [(e["start"], e["length"], e["zero"]) for e in entries] == [(0, 4 * EIB, True)]
    assert re.findall(r" Extents id=\d+ offset=\w+ count=(\w+)", log.read_text()) == [hex(4 * EIB)]


# -- everyday work, with extended headers and without ----------------------------------------------

PROTOCOLS = [
    ((), "extended", [True, True]),
    (("--no-eh",), "structured", [True, False]),
    (("--no-sr",), "simple", [False, False]),
    (("--no-sr", "--no-eh"), "simple", [False, False]),
]


@pytest.mark.parametrize(("words", "protocol", "agreed"), PROTOCOLS)
def test_nbdinfo_says_what_was_agreed_on(
    words: tuple[str, ...], protocol: str, agreed: list[bool], serve: Serve
) -> None:
    server = serve(*words, "memory", "1M")
    text = run(next_peer("nbdinfo"), server.uri).stdout
    assert f"using {protocol} packets" in text
    shown = json.loads(run(next_peer("nbdinfo"), "--json", server.uri).stdout)
    assert [shown["structured"], shown["extended"]] == agreed
    assert shown["exports"][0]["export-size"] == 1 << 20


@WAYS
def test_nbdsh(words: tuple[str, ...], serve: Serve) -> None:
    server = serve(*words, "memory", "1M")
    script = "h.pwrite(b'hello', 5); print(h.pread(6, 5), h.get_extended_headers_negotiated())"
    said = run(next_peer("nbdsh"), "-u", server.uri, "-c", script).stdout
    assert said == f"{bytearray(b'hello') + bytes(1)} {not words}\n"


IMAGE_SIZE = (24 << 20) + 4096


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse image: some 2 MiB of data in 24 MiB."""
    path = tmp_path_factory.mktemp("image") / "image"
    rng = random.Random(10)
    with path.open("wb") as stream:
        for _ in range(16):
            stream.seek(rng.randrange(IMAGE_SIZE >> 16) << 16)
            stream.write(rng.randbytes(rng.choice((4096, 65536, 200_000))))
        stream.truncate(IMAGE_SIZE)
    return path


@WAYS
@pytest.mark.parametrize("disk", ["memory", "file"])
def test_nbdcopy_there_and_back(
    words: tuple[str, ...], disk: str, image: Path, tmp_path: Path, serve: Serve
) -> None:
    back, full = tmp_path / "back", tmp_path / "full"
    full.write_bytes(b"\xee" * IMAGE_SIZE)
    server = serve(*words, disk, str(IMAGE_SIZE) if disk == "memory" else full)
    run(next_peer("nbdcopy"), "--flush", image, server.uri)
    run(next_peer("nbdcopy"), server.uri, back)
    assert filecmp.cmp(image, back, shallow=False)
    assert back.stat().st_blocks < IMAGE_SIZE // 512 // 2


@WAYS
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_qemu_img_there_and_back(
    words: tuple[str, ...], kind: str, image: Path, tmp_path: Path, serve: Serve
) -> None:
    qemu_img, back = next_peer("qemu-img"), tmp_path / "back"
    uri = serve(*words, "memory", str(IMAGE_SIZE)).uri
    run(qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
    run(qemu_img, "compare", "-f", "raw", "-F", "raw", image, uri)
    run(qemu_img, "convert", "-f", "raw", "-O", kind, uri, back)
    run(qemu_img, "compare", "-f", "raw", "-F", kind, image, back)


@WAYS
def test_the_same_map_by_old_and_new_clients(
    words: tuple[str, ...], image: Path, serve: Serve
) -> None:
    """With an extent of more than 4 GiB behind the image's own."""
    disk = serve(*words, "memory", "20G")
    run("nbdcopy", image, disk.uri)
    maps = [
        json.loads(run(program, "--map", "--json", disk.uri).stdout)
        for program in ("nbdinfo", next_peer("nbdinfo"))
    ]
    assert _merged(maps[0]) == _merged(maps[1])
    assert max(entry["length"] for entry in maps[1]) > 1 << 32
    shown = [
        json.loads(run(program, "map", "--output=json", "-f", "raw", disk.uri).stdout)
        for program in ("qemu-img", next_peer("qemu-img"))
    ]
    keys = ("start", "length", "data", "zero")
    old, new = ([[entry[key] for key in keys] for entry in entries] for entries in shown)
    assert old == new
    assert len(old) > 2


def _merged(entries: list[dict[str, int]]) -> list[list[int]]:
    result: list[list[int]] = []
    for entry in entries:
        if result and result[-1][2] == entry["type"]:
            result[-1][1] += entry["length"]
        else:
            result.append([entry["offset"], entry["length"], entry["type"]])
    return result


# -- older clients ---------------------------------------------------------------------------------


def test_old_clients_see_no_change(image: Path, serve: Serve) -> None:
    """What libnbd 1.14 and qemu 7.2 print, by an export that offers more, and one that does not."""

    def printed(*words: str) -> list[str]:
        server = serve("-r", *words, "file", image)
        done = [
            run("nbdinfo", "--json", server.uri),
            run("nbdinfo", "--map", server.uri),
            run("nbdinfo", "--list", server.uri),
            run("qemu-img", "info", server.uri),
            run("qemu-img", "map", server.uri),
        ]
        return [each.stdout.replace(str(server.socket), "SOCKET") for each in done]

    assert printed() == printed("--no-eh")


# -- as a middle, and as servers for the package's own client --------------------------------------


@WAYS
def test_through_nbdkits_nbd_plugin(
    words: tuple[str, ...], image: Path, sockdir: Path, serve: Serve
) -> None:
    """A client of ours by libnbd 1.22, a server for others."""
    behind = serve(*words, "file", image)
    (sockdir / "middle").mkdir()
    plugin = ["nbd", f"uri={behind.uri}"]
    with support.ServerProcess(sockdir / "middle", plugin, [next_peer("nbdkit")]) as middle:
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, middle.uri)
        assert run("nbdinfo", "--map", middle.uri).stdout == (
            run("nbdinfo", "--map", behind.uri).stdout
        )


def test_our_client_and_a_newer_nbd_server(sockdir: Path, tmp_path: Path) -> None:
    """nbd-server 3.26 has structured replies, and refuses extended headers and contexts."""
    disk, config, path = tmp_path / "disk", tmp_path / "config", sockdir / "nbd.sock"
    disk.write_bytes(b"12345678" * 1024)
    config.write_text(f"[generic]\nunixsock = {path}\n[disk]\nexportname = {disk}\nflush = true\n")
    command = [next_peer("nbd-server"), "-d", "-C", str(config), "-p", str(sockdir / "pid")]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            uri = f"nbd+unix:///disk?socket={path}"
            wait_until("nbd-server", path.is_socket)
            with own_connect(uri) as client:
                assert not client.extended_headers
                assert client.contexts == ()
                client.write(b"hello", 4093)
                client.flush()
                assert client.read(16, 4088) == b"12345hello345678"
        finally:
            process.terminate()
    assert disk.read_bytes()[4093:4098] == b"hello"


# -- scripts/peers-next, which brings them ---------------------------------------------------------


def script(folder: str | Path, tools: Path) -> subprocess.CompletedProcess[str]:
    """The script where there is neither apt nor a network: nothing but a few tools."""
    tools.mkdir()
    for name in ("sh", "dirname", "cat"):
        (tools / name).symlink_to(support.program(name))
    return subprocess.run(
        [support.ROOT / "scripts" / "peers-next"],
        env={"PATH": str(tools), "PYNBDKIT_PEERS": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    done = script(Path(next_peer("nbdinfo")).parent.parent, tmp_path / "tools")
    assert (done.stdout, done.stderr) == ("", "")


def test_where_it_cannot_be_made_a_line_says_what_to_do(tmp_path: Path) -> None:
    done = script(tmp_path / "new", tmp_path / "tools")
    assert done.stderr.count("\n") == 1
    assert "no apt-get here" in done.stderr
    assert "PYNBDKIT_PEERS" in done.stderr
    assert not (tmp_path / "new").exists()
