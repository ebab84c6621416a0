"""The error filter: which requests fail, how, how often, and when."""

from __future__ import annotations

import errno
import itertools
import random
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit import ConfigError, Device, Session
from pynbdkit.chain import Chain
from pynbdkit.filters.error import ERRORS, OPERATIONS, ErrorFilter

CALLS: dict[str, tuple[Any, ...]] = {
    "pread": (512, 0, 0),
    "pwrite": (b"x" * 512, 0, 0),
    "trim": (512, 0, 0),
    "zero": (512, 0, 0),
    "extents": (512, 0, 0),
    "cache": (512, 0, 0),
    "flush": (0,),
}


class Disk(Device):
    """Has everything."""

    def get_size(self) -> int:
        return 1 << 20

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return bytes(count)

    def pwrite(self, buf: Any, offset: int, flags: int) -> None: ...

    def flush(self, flags: int) -> None: ...

    def trim(self, count: int, offset: int, flags: int) -> None: ...

    def zero(self, count: int, offset: int, flags: int) -> None: ...

    def cache(self, count: int, offset: int, flags: int) -> None: ...

    def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
        return [(offset, count, 0)]


class DiskPlugin(pynbdkit.Plugin):
    name = "disk"

    def open(self, session: Session) -> Device:
        return Disk()


def opened(filter: ErrorFilter, *config: str) -> pynbdkit.Layer:
    chain = Chain(DiskPlugin(), [filter])
    for word in config:
        chain.config(*word.split("=", 1))
    chain.complete()
    return chain.open(Session())


def failures(layer: pynbdkit.Layer) -> dict[str, str]:
    """Which operations fail, and with what."""
    failed: dict[str, OSError] = {}
    for name, arguments in CALLS.items():
        try:
            getattr(layer, name)(*arguments)
        except OSError as error:
            failed[name] = error
    words = {name: errno.errorcode[error.errno or 0] for name, error in failed.items()}
    for name, raised in failed.items():
        assert raised.strerror == f"injecting {words[name]} error into {name}"
    return words


def everything(word: str, **others: str) -> dict[str, str]:
    return dict.fromkeys(OPERATIONS, word) | others


@pytest.mark.parametrize(
    ("config", "failed"),
    [
        ([], {}),
        (["error=ENOSPC"], {}),
        (["error-rate=0"], {}),
        (["error-rate=100%"], everything("EIO")),
        (["error-rate=1", "error=ENOMEM"], everything("ENOMEM")),
        (["error-rate=1", "error=ENOMEM", "error-pread=EPERM"],
         everything("ENOMEM", pread="EPERM")),
        (["error-rate=1", "error-pread=EPERM", "error=ENOMEM"], everything("ENOMEM")),
        (["error-pread-rate=1"], {"pread": "EIO"}),
        (["error-pwrite-rate=1"], {"pwrite": "EIO"}),
        (["error-trim-rate=1"], {"trim": "EIO"}),
        (["error-zero-rate=1"], {"zero": "EIO"}),
        (["error-extents-rate=1"], {"extents": "EIO"}),
        (["error-cache-rate=1"], {"cache": "EIO"}),
        (["error-rate=1", "error-pwrite-rate=0", "error-zero-rate=0", "error-trim-rate=0",
          "error-cache-rate=0"], {"pread": "EIO", "extents": "EIO"}),
        (["error=ENOSPC", "error-pwrite-rate=100%", "error-zero-rate=100%"],
         {"pwrite": "ENOSPC", "zero": "ENOSPC"}),
    ],
)  # fmt: skip
def test_which_and_what(config: list[str], failed: dict[str, str]) -> None:
    """General settings, settings of one operation, and the later of two; never a flush."""
    assert failures(opened(ErrorFilter(), *config)) == failed


def test_errors_are_those_of_the_protocol() -> None:
    manual = {"EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "ESHUTDOWN"}
    assert set(ERRORS) == manual | {"EOVERFLOW"}


@pytest.mark.parametrize("word", ERRORS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_error_of_every_operation(name: str, word: str) -> None:
    layer = opened(ErrorFilter(), f"error-{name}={word}", f"error-{name}-rate=1")
    assert failures(layer) == {name: word}


def test_nothing_added_where_nothing_fails() -> None:
    """An operation without a rate is bound to the layer below as it is."""
    layer = opened(ErrorFilter(), "error-pread-rate=1")
    assert layer.next is not None
    for name in CALLS:
        same = getattr(layer, name) == getattr(layer.next, name)
        assert same == (name != "pread"), name


def test_file_is_the_trigger(tmp_path: Path) -> None:
    trigger = tmp_path / "inject"
    layer = opened(ErrorFilter(), "error-rate=1", f"error-file={trigger}")
    for _ in range(2):
        assert failures(layer) == {}
        trigger.touch()
        assert failures(layer) == everything("EIO")
        trigger.unlink()


def test_file_of_one_operation(tmp_path: Path) -> None:
    trigger = tmp_path / "inject"
    layer = opened(ErrorFilter(), "error-rate=1", f"error-trim-file={trigger}")
    without_trim = {name: "EIO" for name in OPERATIONS if name != "trim"}
    assert failures(layer) == without_trim
    trigger.touch()
    assert failures(layer) == everything("EIO")


def test_file_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in the background has changed to "/"."""
    monkeypatch.chdir(tmp_path)
    layer = opened(ErrorFilter(), "error-rate=1", "error-file=inject")
    (tmp_path / "inject").touch()
    monkeypatch.chdir("/")
    assert failures(layer) == everything("EIO")


def rates(rate: str, tries: int = 4000) -> float:
    filter = ErrorFilter()
    filter.random.seed(20)
    layer = opened(filter, f"error-rate={rate}")
    failed = 0
    for _ in range(tries):
        try:
            layer.pread(512, 0, 0)
        except OSError:
            failed += 1
    return failed / tries


@pytest.mark.parametrize(("rate", "expected"), [("50%", 0.5), ("0.1", 0.1), ("1:4", 0.25)])
def test_rate(rate: str, expected: float) -> None:
    assert abs(rates(rate) - expected) < 0.03


def test_seeded_runs_are_alike() -> None:
    """With the same seed the same requests fail; with another, others."""
    filter = ErrorFilter()
    filter.random.seed(1)
    layer = opened(filter, "error-rate=50%")
    first = [failures(layer) for _ in range(20)]
    filter.random.seed(1)
    assert [failures(layer) for _ in range(20)] == first
    filter.random.seed(2)
    assert [failures(layer) for _ in range(20)] != first


def test_unseeded_runs_differ() -> None:
    first, second = (opened(ErrorFilter(), "error-rate=50%") for _ in range(2))
    assert [failures(first) for _ in range(20)] != [failures(second) for _ in range(20)]


ON_THE_WIRE: dict[str, Callable[[Any], Any]] = {
    "pread": lambda client: client.pread(512, 0),
    "pwrite": lambda client: client.pwrite(b"x" * 512, 0),
    "trim": lambda client: client.trim(512, 0),
    "zero": lambda client: client.zero(512, 0),
    "extents": lambda client: client.block_status(512, 0, lambda *_: 0),
    "cache": lambda client: client.cache(512, 0),
    "flush": lambda client: client.flush(),
}


def wire(nbd: Any, client: Any) -> dict[str, str]:
    failed = {}
    for name, call in ON_THE_WIRE.items():
        try:
            call(client)
        except nbd.Error as error:
            failed[name] = error.errno
    return failed


@pytest.mark.parametrize("word", ERRORS)
def test_client_gets_the_error(nbd: Any, connect: Callable[..., Any], word: str) -> None:
    """Over the wire, the very error that was asked for, and the connection goes on."""
    settings = dict.fromkeys((f"error_{name}_rate" for name in OPERATIONS), "100%")
    with pynbdkit.serve(Disk, filters=[ErrorFilter(error=word, **settings)]) as server:
        client = connect(server)
        for _ in range(2):
            assert wire(nbd, client) == everything(word)


def test_nbdkit_agrees(nbd: Any, connect: Callable[..., Any], sockdir: Path) -> None:
    """The same settings, the same client, the same failures."""
    config = {"error": "ENOSPC", "error-rate": "1", "error-zero": "EINVAL", "error-trim-rate": "0"}
    with support.ServerProcess(
        sockdir,
        ["--filter=error", "memory", "1M", *(f"{key}={value}" for key, value in config.items())],
        [support.program("nbdkit")],
    ) as peer:
        client = connect(peer)
        theirs = wire(nbd, client)
        client.shutdown()  # nbdkit would wait for it
    filter = ErrorFilter()
    with pynbdkit.serve(Disk, filters=[filter], parameters=config) as server:
        ours = wire(nbd, connect(server))
    assert ours == theirs
    assert Counter(ours.values()) == {"ENOSPC": 4, "EINVAL": 1}


def test_log_says_what_happened(
    nbd: Any, connect: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with pynbdkit.serve(Disk, filters=[ErrorFilter(error_pread_rate="1")]) as server:
        client = connect(server)
        with pytest.raises(nbd.Error):
            client.pread(512, 1024)
    log = capfd.readouterr().err
    assert "injecting EIO error into pread" in log
    assert "Traceback" not in log


def nbdkit_takes(word: str) -> bool:
    done = subprocess.run(
        [support.program("nbdkit"), "-U", "-", "--filter=error", "null", word, "--run", "true"],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


@pytest.mark.parametrize("value", ["0", "1", "0.5", "0%", "100%", "1e-3", "12.5%"])
def test_rates_that_nbdkit_takes(value: str) -> None:
    assert nbdkit_takes(f"error-rate={value}")
    ErrorFilter().config("error-rate", value)


@pytest.mark.parametrize("value", ["", "101%", "-1", "2", "inf", "50%%", "1s", "0.1.2"])
def test_rates_that_nbdkit_refuses(value: str) -> None:
    assert not nbdkit_takes(f"error-rate={value}")
    with pytest.raises(ConfigError, match=r"^error-rate: "):
        ErrorFilter().config("error-rate", value)


@pytest.mark.parametrize("value", ["", "eio", "5", "ENOTSUP", "EWHATEVER"])
def test_unknown_errors(value: str) -> None:
    assert not nbdkit_takes(f"error={value}")
    with pytest.raises(ConfigError, match=r"unknown error .*EPERM, EIO"):
        ErrorFilter().config("error", value)


def test_keys_are_those_of_the_manual_page() -> None:
    names = ["error", *(f"error-{name}" for name in OPERATIONS)]
    expected = {a + b for a, b in itertools.product(names, ("", "-rate", "-file"))}
    assert set(ErrorFilter._declared) == expected
    for key in ("error-cache", "error-extents-file", "error-zero-rate"):
        assert nbdkit_takes(f"{key}={'1' if 'rate' in key else 'EIO'}")


def test_workers_do_not_all_fail_the_same_requests() -> None:
    """A copy of one generator in each would."""
    draws = []
    for workers in (1, 2, 2):
        filter = ErrorFilter(error_rate="10%")
        filter.random.seed(1)
        filter.worker_count = workers
        filter.after_fork()
        draws.append(filter.random.random())
    assert len(set(draws)) == 3
    assert draws[0] == random.Random(1).random()
