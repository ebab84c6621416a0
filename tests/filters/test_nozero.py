"""The nozero filter: what each pair of modes offers, and what the layer below is called with.

The expectations are written down from nbdkit-nozero-filter(1) in `expected`; nbdkit itself, with
the same disk as a script, has to agree with them, but for the pair in `NBDKIT_DIFFERS`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit import ConfigError, OpenError, Session
from pynbdkit.chain import Chain
from pynbdkit.filters.nozero import FAST_ZERO_MODES, ZERO_MODES, NoZeroFilter
from recording import Event, Recording, RecordingDisk, WriteOnly

MAY_TRIM, FUA, FAST_ZERO = 1, 2, 8
MODES = list(product(ZERO_MODES, FAST_ZERO_MODES))
NBDKIT_DIFFERS = ("emulate", "ignore")
"""nbdkit 1.32 refuses fast zeroes there, though its page says that the flag is ignored."""

Answer = tuple[Any, ...]
REQUESTS = list(product((False, True), (False, True), (False, True)))
"""NO_HOLE, FUA, FAST_ZERO."""


def expected(zeromode: str, fastzeromode: str) -> list[Answer]:
    """What a client sees and causes, over a disk that has all there is."""
    offered = zeromode != "none"
    fast_offered = offered and fastzeromode != "none"
    refuses_fast = fastzeromode == "slow" or (zeromode == "emulate" and fastzeromode == "default")
    answers: list[Answer] = [("offers", offered, fast_offered)]
    for no_hole, fua, fast in REQUESTS:
        if not offered or (fast and not fast_offered):
            continue
        if fast and refuses_fast:
            answers.append((no_hole, fua, fast, errno.ENOTSUP, []))
            continue
        flags = 0 if no_hole or zeromode == "notrim" else MAY_TRIM
        if fast and fastzeromode != "ignore":
            flags |= FAST_ZERO
        if zeromode == "emulate":
            events: list[Event] = [("pwrite", 4096, 8192, 0)]
        else:
            events = [("zero", 4096, 8192, flags)]
        if fua:
            events.append(("flush", 0))
        answers.append((no_hole, fua, fast, 0, events))
    return answers


def ask(nbd: Any, uri: str, take: Callable[[], list[Event]]) -> list[Answer]:
    """What a client sees and causes, in the words of `expected`."""
    client = nbd.NBD()
    client.connect_uri(uri)
    answers: list[Answer] = [("offers", client.can_zero(), client.can_fast_zero())]
    for no_hole, fua, fast in REQUESTS:
        if not client.can_zero() or (fast and not client.can_fast_zero()):
            continue  # nbdkit does not survive such a client
        flags = (
            (nbd.CMD_FLAG_NO_HOLE if no_hole else 0)
            | (nbd.CMD_FLAG_FUA if fua else 0)
            | (nbd.CMD_FLAG_FAST_ZERO if fast else 0)
        )
        take()
        try:
            client.zero(4096, 8192, flags)
            error = 0
        except nbd.Error as failure:
            error = failure.errnum
        answers.append((no_hole, fua, fast, error, take()))
    client.shutdown()
    return answers


@pytest.mark.parametrize("modes", MODES, ids="-".join)
def test_modes(nbd: Any, modes: tuple[str, str]) -> None:
    plugin = Recording()
    filter = NoZeroFilter(zeromode=modes[0], fastzeromode=modes[1])
    with pynbdkit.serve(plugin, filters=[filter]) as server:
        assert ask(nbd, server.uri, plugin.take) == expected(*modes)


SCRIPT = """
import builtins
API_VERSION = 2
def event(*words):
    with builtins.open(EVENTS, "a") as out:
        print(repr(words), file=out)
def open(readonly): return 1
def get_size(h): return 1 << 20
def can_trim(h): return True
def can_zero(h): return True
def can_fast_zero(h): return True
def can_fua(h): return 1
def pread(h, buf, offset, flags): pass
def pwrite(h, buf, offset, flags): event("pwrite", len(buf), offset, flags)
def trim(h, count, offset, flags): event("trim", count, offset, flags)
def zero(h, count, offset, flags): event("zero", count, offset, flags)
def flush(h, flags): event("flush", flags)
"""


@pytest.mark.parametrize("modes", MODES, ids="-".join)
def test_nbdkit_agrees(nbd: Any, sockdir: Path, modes: tuple[str, str]) -> None:
    events = sockdir / "events"
    events.touch()
    script = sockdir / "disk.py"
    script.write_text(f"EVENTS = {str(events)!r}\n{SCRIPT}")

    def take() -> list[Event]:
        lines = [eval(line) for line in events.read_text().splitlines()]
        events.write_text("")
        return lines

    command = [support.program("nbdkit")]
    words = [f"zeromode={modes[0]}", f"fastzeromode={modes[1]}"]
    with support.ServerProcess(
        sockdir, ["--filter=nozero", "python", script, *words], command
    ) as server:
        answers = ask(nbd, server.uri, take)
    if modes == NBDKIT_DIFFERS:
        assert answers != expected(*modes), "nbdkit does as its page says now"
        return
    assert answers == expected(*modes)


class NativeFua(RecordingDisk):
    def can_fua(self) -> int:
        return 2


def test_emulated_zeros_are_stable_with_as_few_flushes_as_can_be() -> None:
    """Bounded pieces; FUA on each where it is native, else one flush at the end."""
    count = (2 << 20) + 4096
    pieces = [(1 << 20, 0), (1 << 20, 1 << 20), (4096, 2 << 20)]
    for kind, flag, end in ((NativeFua, FUA, []), (RecordingDisk, 0, [("flush", 0)])):
        plugin = Recording(4 << 20, kind)
        plugin.data[:] = b"x" * len(plugin.data)
        layer = Chain(plugin, [NoZeroFilter(zeromode="emulate")]).open(Session())
        layer.zero(count, 0, FUA | MAY_TRIM)
        assert plugin.take() == [*(("pwrite", n, at, flag) for n, at in pieces), *end]
        assert plugin.data == bytes(count) + b"x" * (len(plugin.data) - count)


def test_a_write_that_fails_is_not_flushed() -> None:
    class Failing(RecordingDisk):
        def pwrite(self, buf: Any, offset: int, flags: int) -> None:
            super().pwrite(buf, offset, flags)
            raise OSError(errno.ENOSPC, "full")

    plugin = Recording(4 << 20, Failing)
    layer = Chain(plugin, [NoZeroFilter(zeromode="emulate")]).open(Session())
    with pytest.raises(OSError, match="full"):
        layer.zero(2 << 20, 0, FUA)
    assert plugin.take() == [("pwrite", 1 << 20, 0, 0)]


@pytest.mark.parametrize("zeromode", ["notrim", "plugin"])
def test_a_plugin_without_zero_is_refused(zeromode: str) -> None:
    """… unless the client cannot write anyway; emulate and none need no zero."""
    filter = NoZeroFilter(zeromode=zeromode)
    with pytest.raises(OpenError, match=f"zeromode={zeromode}: the plugin has no zero"):
        Chain(Recording(kind=WriteOnly), [filter]).open(Session())
    layer = Chain(Recording(kind=WriteOnly), [filter]).open(Session(readonly=True))
    assert not layer.can_zero()
    assert not layer.can_fast_zero()
    for other in ("none", "emulate"):
        Chain(Recording(kind=WriteOnly), [NoZeroFilter(zeromode=other)]).open(Session())


def test_a_fast_zero_that_the_plugin_refuses_is_not_written() -> None:
    class Slow(RecordingDisk):
        def zero(self, count: int, offset: int, flags: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "slow")

    plugin = Recording(kind=Slow)
    layer = Chain(plugin, [NoZeroFilter(zeromode="plugin")]).open(Session())
    with pytest.raises(OSError, match="slow"):
        layer.zero(4096, 0, FAST_ZERO)
    assert not plugin.take()
    layer.zero(4096, 0, 0)
    assert plugin.take() == [("pwrite", 4096, 0, 0)]


def test_defaults_and_unknown_modes() -> None:
    filter = NoZeroFilter()
    assert (filter.zeromode, filter.fastzeromode) == ("none", "default")
    with pytest.raises(ConfigError, match="unknown zeromode 'some'"):
        filter.config("zeromode", "some")
    with pytest.raises(ConfigError, match="unknown fastzeromode 'some'"):
        filter.config("fastzeromode", "some")
