"""-r: every way to write is refused with EPERM, whatever plugin and filter is served."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit import loader
from recording import Recording

SIZE = 1 << 20
SCRIPT = """
API_VERSION = 2
def open(readonly): return bytearray(b"script" * 200000)[: 1 << 20]
def get_size(h): return len(h)
def can_trim(h): return True
def can_zero(h): return True
def can_fast_zero(h): return True
def can_fua(h): return 2
def pread(h, buf, offset, flags): buf[:] = h[offset : offset + len(buf)]
def pwrite(h, buf, offset, flags): h[offset : offset + len(buf)] = buf
def zero(h, count, offset, flags): h[offset : offset + count] = bytes(count)
def trim(h, count, offset, flags): h[offset : offset + count] = bytes(count)
def flush(h, flags): pass
"""
PLUGIN_IN_C = """
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
static char disk[1 << 20];
static void *my_open (int readonly) { (void) readonly; return disk; }
static int64_t size (void *h) { (void) h; return sizeof disk; }
static int read_ (void *h, void *buf, uint32_t n, uint64_t at, uint32_t flags)
{ (void) flags; __builtin_memcpy (buf, (char *) h + at, n); return 0; }
static int write_ (void *h, const void *buf, uint32_t n, uint64_t at, uint32_t flags)
{ (void) flags; __builtin_memcpy ((char *) h + at, buf, n); return 0; }
static int flush (void *h, uint32_t flags) { (void) h; (void) flags; return 0; }
static int clear (void *h, uint32_t n, uint64_t at, uint32_t flags)
{ (void) flags; __builtin_memset ((char *) h + at, 0, n); return 0; }
static struct nbdkit_plugin plugin = {
  .name = "can_all", .open = my_open, .get_size = size, .pread = read_, .pwrite = write_,
  .flush = flush, .trim = clear, .zero = clear,
};
NBDKIT_REGISTER_PLUGIN (plugin)
"""


def parameters(kind: str, name: str, folder: Path) -> dict[str, str]:
    """What a plugin or filter cannot do without. Most plugins want a size, most filters nothing."""
    special = {
        ("plugin", "cc"): {"script": str(folder / "plugin.c")},
        ("plugin", "data"): {"data": '"data"', "size": "1M"},
        ("plugin", "file"): {"file": str(folder / "disk")},
        ("plugin", "python"): {"script": str(folder / "script.py")},
        ("filter", "log"): {"logfile": str(folder / "log")},
    }
    found = special.get((kind, name))
    if found is not None:
        return found
    made = loader.load_plugin(name) if kind == "plugin" else loader.load_filter(name)
    return {"size": "1M"} if kind == "plugin" and "size" in made._declared else {}


def ways_to_write(nbd: Any) -> Iterator[tuple[str, int, int, int]]:
    """Each command that changes a disk, with each flag that it may have, inside and outside."""
    flags = {
        "pwrite": (nbd.CMD_FLAG_FUA,),
        "trim": (nbd.CMD_FLAG_FUA,),
        "zero": (nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO),
    }
    for command, possible in flags.items():
        for chosen in product((0, 1), repeat=len(possible)):
            flag = sum(f for f, is_set in zip(possible, chosen, strict=True) if is_set)
            for count, offset in ((512, 0), (1, 513), (65536, SIZE - 65536), (512, SIZE), (0, 0)):
                yield command, count, offset, flag


def check(nbd: Any, client: Any) -> None:
    """Nothing is offered, nothing is taken, nothing has changed, and the client goes on."""
    assert client.is_read_only()
    assert not any(
        getattr(client, f"can_{what}")() for what in ("trim", "zero", "fast_zero", "fua")
    )
    size = min(client.get_size(), SIZE)
    before = client.pread(size, 0) if size else b""
    for command, count, offset, flags in ways_to_write(nbd):
        what = b"w" * count if command == "pwrite" else count
        with pytest.raises(nbd.Error) as caught:
            getattr(client, command)(what, offset, flags)
        assert caught.value.errnum == errno.EPERM, (command, count, offset, flags, caught.value)
    assert (client.pread(size, 0) if size else b"") == before
    client.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(os.urandom(SIZE))
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "plugin.c").write_text(PLUGIN_IN_C)
    return tmp_path


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("name", loader.names("plugin"))
def test_plugin(
    connect: Callable[..., Any], nbd: Any, folder: Path, name: str, structured: bool
) -> None:
    before = (folder / "disk").read_bytes(), (folder / "disk").stat().st_mtime_ns
    plugin = pynbdkit.load_plugin(name, **parameters("plugin", name, folder))
    with pynbdkit.serve(plugin, readonly=True, structured_replies=structured) as server:
        check(nbd, connect(server, contexts=(), strict=False))
    assert ((folder / "disk").read_bytes(), (folder / "disk").stat().st_mtime_ns) == before


@pytest.mark.parametrize("name", loader.names("filter"))
def test_filter(connect: Callable[..., Any], nbd: Any, folder: Path, name: str) -> None:
    """Over a disk that can all: nothing reaches it, whatever the filter answers for it."""
    plugin = Recording(SIZE)
    plugin.data[:] = os.urandom(SIZE)
    options = parameters("filter", name, folder)
    with pynbdkit.serve(plugin, filters=[name], parameters=options, readonly=True) as server:
        check(nbd, connect(server, contexts=(), strict=False))
    assert {event[0] for event in plugin.events} <= {"pread", "close", "flush"}


NEWER = """
import nbd, sys
client = nbd.NBD()
client.set_strict_mode(nbd.STRICT_AUTO_FLAG)
client.connect_uri(sys.argv[1])
print(client.get_extended_headers_negotiated(), client.is_read_only())
size = client.get_size()
for call in (
    lambda: client.pwrite(b"w" * 512, 0),
    lambda: client.pwrite(b"w" * 512, 0, nbd.CMD_FLAG_FUA),
    lambda: client.zero(size, 0),
    lambda: client.zero(size, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE),
    lambda: client.trim(size, 0, nbd.CMD_FLAG_FUA),
    lambda: client.pread(512, 0),
):
    try:
        call()
        print("done")
    except nbd.Error as error:
        print(error.errno)
"""


def test_extended_headers(serve: Callable[..., support.ServerProcess]) -> None:
    """With lengths that take 64 bits."""
    server = serve("-r", "memory", "8G")
    done = support.run(support.next_peer("python3"), "-c", NEWER, server.uri)
    assert done.stdout.split() == ["True", "True", *5 * ["EPERM"], "done"]


def test_oldstyle(
    nbd: Any, connect: Callable[..., Any], serve: Callable[..., support.ServerProcess]
) -> None:
    server = serve("-r", "-o", "memory", "1M")
    check(nbd, connect(server, contexts=(), strict=False))
