"""The FUA matrix of the contract for plugins in C, of both versions, from the wire.

The rows are those of tests/test_fua_matrix.py that C can say: no `_fua` forms, and answers that are
numbers. One plugin, `fua.c`, has what the environment says when it is loaded; the client and the
model are the same as for scripts. The peer gets the same rows.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
from fua_driver import Driver, FileLog
from fua_model import LARGEST_PIECE, V1, V2, Mood, Refused, Request, Subject, terms
from fua_subjects import questions

Built = Callable[..., Path]
VERSIONS = (V1, V2)
BOTH = (False, True)
CALLBACKS = ("pwrite", "trim", "zero", "flush")
ANSWERS = (None, "NONE", "EMULATE", "NATIVE", "7", "raises")

PLAIN = [
    Request(command, fua)
    for command, fua in product(("write", "trim", "zero", "read", "flush", "block status"), BOTH)
]
REQUESTS = [
    *PLAIN,
    *(
        Request("zero", fua, no_hole=True, mood=mood)
        for fua, mood in product(BOTH, (Mood.FINE, Mood.NO_ZERO))
    ),
    *(
        Request(command, fua, mood=mood)
        for command, fua, mood in product(
            ("write", "trim", "zero"), BOTH, (Mood.FAILS, Mood.FLUSH_FAILS)
        )
    ),
    *(
        Request("zero", fua, mood=Mood.NO_ZERO | more)
        for fua, more in product(BOTH, (Mood.FINE, Mood.FAILS, Mood.FLUSH_FAILS))
    ),
    Request("flush", mood=Mood.FLUSH_FAILS),
    *PLAIN[:6],
]


def callback_sets() -> Iterator[frozenset[str]]:
    for chosen in product(BOTH, repeat=len(CALLBACKS)):
        yield frozenset(name for name, there in zip(CALLBACKS, chosen, strict=True) if there)


def environment(subject: Subject, events: Path) -> dict[str, str]:
    """What makes `fua.c` the subject."""
    return {
        "FUA_EVENTS": str(events),
        "FUA_CALLBACKS": " ".join([*subject.callbacks, *(["cache"] if subject.caches else [])]),
        "FUA_QUESTIONS": " ".join(questions(subject)),
    }


class Rows:
    """Serves subjects, those that are the same plugin by one server, and checks what they do."""

    def __init__(self, nbd: Any, built: Built, folder: Path, peer: str | None) -> None:
        self._nbd = nbd
        self._built = built
        self._folder = folder
        self._peer = peer
        self._events = folder / "events"

    def check(
        self, subjects: Iterable[Subject], requests: Sequence[Request], readonly: bool = False
    ) -> list[str]:
        """What differs from the model."""
        groups: dict[tuple[str, ...], list[Subject]] = {}
        for subject in subjects:
            key = (subject.form, *environment(subject, self._events).values())
            groups.setdefault(key, []).append(subject)
        wrong = []
        for group in groups.values():
            with self._serve(group[0], readonly) as driver:
                for subject in group:
                    wrong += driver.check(subject, requests)
        return wrong

    def _serve(self, subject: Subject, readonly: bool) -> Any:
        version = 1 if subject.form == V1 else 2
        path = self._built("fua", f"-DNBDKIT_API_VERSION={version}")
        self._events.unlink(missing_ok=True)
        return (self._by_peer if self._peer else self._here)(subject, path, readonly)

    @contextmanager
    def _here(self, subject: Subject, path: Path, readonly: bool) -> Iterator[Driver]:
        for name, value in environment(subject, self._events).items():
            os.environ[name] = value
        plugin = pynbdkit.load_plugin(str(path))
        socket = str(self._folder / "socket")
        with pynbdkit.serve(plugin, unix=socket, readonly=readonly):
            yield Driver(self._nbd, socket, FileLog(self._events), read_only=readonly)

    @contextmanager
    def _by_peer(self, subject: Subject, path: Path, readonly: bool) -> Iterator[Driver]:
        assert self._peer
        socket, pidfile = self._folder / "socket", self._folder / "pid"
        socket.unlink(missing_ok=True)
        subprocess.run(
            [self._peer, "-U", socket, "-P", pidfile, *(["-r"] if readonly else []), path],
            env=os.environ | environment(subject, self._events),
            check=True,
        )
        try:
            yield Driver(
                self._nbd, str(socket), FileLog(self._events), read_only=readonly, hang_up=True
            )
        finally:
            os.kill(int(pidfile.read_text()), signal.SIGTERM)


@pytest.fixture
def rows(
    nbd: Any, built: Built, sockdir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    for name in ("FUA_EVENTS", "FUA_CALLBACKS", "FUA_QUESTIONS"):
        monkeypatch.setenv(name, "")  # put back afterwards
    return Rows(nbd, built, sockdir, None).check


@pytest.fixture
def rows_of_peer(nbd: Any, built: Built, sockdir: Path, peer: str) -> Callable[..., list[str]]:
    return Rows(nbd, built, sockdir, peer).check


def report(wrong: Sequence[str]) -> None:
    if wrong:
        shown = "\n".join(wrong[:20])
        pytest.fail(f"{len(wrong)} differences; the first of them:\n{shown}", pytrace=False)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_row(rows: Callable[..., list[str]], version: str) -> None:
    """Every set of callbacks, every answer of can_fua, every command, FUA and not."""
    subjects = [
        Subject(version, callbacks, can_fua)
        for callbacks, can_fua in product(callback_sets(), ANSWERS)
    ]
    assert len(subjects) == 16 * 6
    assert sum(not isinstance(terms(subject), Refused) for subject in subjects) > 40
    report(rows(subjects, REQUESTS))


@pytest.mark.parametrize("version", VERSIONS)
def test_other_questions(rows: Callable[..., list[str]], version: str) -> None:
    """can_flush, can_trim, can_zero, can_write say something else than the callbacks do."""
    whole = frozenset(CALLBACKS)
    subjects = [
        Subject(version, whole - without, can_fua, can_flush=can_flush, can_trim=can_trim)
        for without, can_fua, can_flush, can_trim in product(
            (frozenset[str](), {"trim"}, {"zero"}), (None, "EMULATE", "NATIVE"), BOTH, BOTH
        )
        if not (can_trim and "trim" in without)
    ]
    subjects += [
        Subject(version, callbacks, can_fua, can_zero=can_zero)
        for callbacks, can_fua, can_zero in product(
            (whole, whole - {"zero"}, whole - {"flush"}), (None, "NATIVE"), BOTH
        )
    ]
    subjects += [
        Subject(version, whole, can_fua, can_write=False) for can_fua in (None, "NATIVE", "raises")
    ]
    report(rows(subjects, PLAIN))


@pytest.mark.parametrize("version", VERSIONS)
def test_read_only_server(rows: Callable[..., list[str]], version: str) -> None:
    """Neither FUA nor trim nor zero is offered, whatever the plugin has; nothing is refused."""
    subjects = [
        Subject(version, callbacks, can_fua)
        for callbacks, can_fua in product(list(callback_sets())[1::3], (None, "NATIVE", "raises"))
    ]
    report(rows(subjects, PLAIN, readonly=True))


@pytest.mark.parametrize("version", VERSIONS)
def test_large_zero(rows: Callable[..., list[str]], version: str) -> None:
    """Zeros larger than a piece: the flag on every piece, or one flush at the end."""
    request = Request("zero", fua=True, mood=Mood.NO_ZERO, count=LARGEST_PIECE + 4096 + 512)
    subjects = [
        Subject(version, frozenset(callbacks), can_fua)
        for callbacks, can_fua in product(
            (("pwrite", "flush"), ("pwrite", "zero", "flush")), (None, "EMULATE", "NATIVE")
        )
    ]
    report(rows(subjects, [request]))


def test_fast_zero(rows: Callable[..., list[str]]) -> None:
    """A fast zero keeps FUA as any zero does, and is never written instead."""
    requests = [
        Request("zero", fua, fast=True, mood=mood, no_hole=no_hole)
        for fua, mood, no_hole in product(
            BOTH, (Mood.FINE, Mood.NO_ZERO, Mood.FAILS, Mood.FLUSH_FAILS), BOTH
        )
    ]
    subjects = [
        Subject(V2, callbacks, can_fua, can_fast_zero=can_fast_zero)
        for callbacks, can_fua, can_fast_zero in product(
            callback_sets(), (None, "NATIVE"), (None, False, True)
        )
    ]
    report(rows(subjects, requests))


@pytest.mark.parametrize("version", VERSIONS)
def test_cache_with_fua(rows: Callable[..., list[str]], version: str) -> None:
    """Cache takes FUA where it is offered, and the callback does not see it."""
    subjects = [
        Subject(version, frozenset(callbacks), can_fua, caches=True)
        for callbacks, can_fua in product(((), ("pwrite", "flush")), (None, "NONE", "NATIVE"))
    ]
    report(rows(subjects, [Request("cache", fua) for fua in BOTH]))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_peer_agrees(rows_of_peer: Callable[..., list[str]], version: str) -> None:
    """Where the contract and the peer say the same, the model and the peer do the same.

    Where they differ, the contract is the stricter one: the peer offers an emulated FUA without a
    flush, and a fast zero where there is none, which then fails at once.
    """
    subjects = [
        Subject(version, callbacks, can_fua)
        for callbacks, can_fua in product(callback_sets(), (None, "NONE", "EMULATE", "NATIVE"))
    ]
    expected = []
    for subject in subjects:
        offer = terms(subject)
        if isinstance(offer, Refused):
            expected.append(f"{subject}: opened, expected a refusal: {offer.why}")
        elif offer.zero and (version == V1 or not subject.has("zero")):
            expected.append(f"{subject}: the client is told can_fast_zero = True")
    report(sorted(set(rows_of_peer(subjects, REQUESTS)) ^ set(expected)))
