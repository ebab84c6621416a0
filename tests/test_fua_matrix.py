"""Every row of the contract's FUA table, over the wire, from libnbd.

{version 1, version 2, native} x {which callbacks exist} x {can_fua's answer} x {command} x {FUA or
not} x {what fails}; the callbacks that each must cause come from `fua_model`. A test is a block of
some hundred rows and fails with the rows that differ.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import fua_subjects
from fua_client import FileLog, Log, check, connect, join_pieces, nbd, send
from fua_model import (
    ANSWERS,
    FORMS,
    FUA_FORMS,
    LARGEST_PIECE,
    NATIVE,
    V1,
    V2,
    Mood,
    Refused,
    Request,
    Subject,
    callback_sets,
    outcome,
    terms,
)

FUA_ANSWERS = (None, "raises", *ANSWERS)

COMMANDS = ("write", "trim", "zero", "read", "flush", "block status")
BOTH = (False, True)

PLAIN = [Request(command, fua) for command, fua in product(COMMANDS, BOTH)]
FAILING = [
    Request(command, fua, mood=mood)
    for command, fua, mood in product(
        ("write", "trim", "zero"), BOTH, (Mood.FAILS, Mood.FLUSH_FAILS)
    )
]
FALLING_BACK = [
    Request("zero", fua, mood=Mood.NO_ZERO | more, no_hole=no_hole)
    for fua, more, no_hole in product(BOTH, (Mood.FINE, Mood.FAILS, Mood.FLUSH_FAILS), BOTH)
    if not (more and no_hole)
]
REQUESTS = [
    *PLAIN,
    *(Request("zero", fua, no_hole=True) for fua in BOTH),
    *FAILING,
    *FALLING_BACK,
    Request("flush", mood=Mood.FLUSH_FAILS),
    *PLAIN[:6],  # After all that went wrong, the connection is as good as new.
]
"""What every subject is asked."""


class Servers:
    """Serves subjects in this process, each script on its own socket; a socket is reused while
    only the answers to the capability questions change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def serve(self, subject: Subject, **options: Any) -> Iterator[str]:
        import pynbdkit

        if subject.form == NATIVE:
            plugin = fua_subjects.native_plugin()
        else:
            path = self._folder / "plugin.py"
            path.write_text(fua_subjects.script(subject))
            plugin = pynbdkit.load_plugin(str(path))
        socket = self._folder / "socket"
        with pynbdkit.serve(plugin, unix=str(socket), **options):
            yield str(socket)


@pytest.fixture
def servers(tmp_path: Path) -> Servers:
    need(nbd, "python3-libnbd")
    return Servers(tmp_path)


def need(peer: object, package: str) -> None:
    """Skip where a peer is missing, and say so; in CI that is a failure."""
    if not peer:
        message = f"this test needs {package} (apt-get install {package})"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


def run(servers: Servers, subjects: list[Subject], requests: list[Request], **options: Any) -> None:
    """Check all subjects; those with the same script share a server."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        key = NATIVE if subject.form == NATIVE else fua_subjects.script(subject)
        groups.setdefault(key, []).append(subject)
    wrong: list[str] = []
    for group in groups.values():
        with servers.serve(group[0], **options) as socket:
            for subject in group:
                wrong += check(socket, subject, requests, Log())
    report(wrong)


def report(wrong: list[str]) -> None:
    if wrong:
        shown = "\n".join(wrong[:20])
        pytest.fail(f"{len(wrong)} differences; the first of them:\n{shown}", pytrace=False)


def block_name(callbacks: frozenset[str]) -> str:
    return "+".join(sorted(callbacks)) or "none"


BLOCKS = [
    frozenset(block) for block in ((), ("pwrite",), ("pwrite_fua",), ("pwrite", "pwrite_fua"))
]
"""The matrix is cut along the forms of pwrite, and along flush."""


@pytest.mark.parametrize("flush", [frozenset(), frozenset({"flush"})], ids=block_name)
@pytest.mark.parametrize("writes", BLOCKS, ids=block_name)
@pytest.mark.parametrize("form", FORMS)
def test_every_row(
    servers: Servers, form: str, writes: frozenset[str], flush: frozenset[str]
) -> None:
    """Every set of callbacks, every answer of can_fua, every command, FUA and not."""
    cut = {"pwrite", "pwrite_fua", "flush"}
    subjects = [
        Subject(form, callbacks, can_fua)
        for callbacks, can_fua in product(callback_sets(), FUA_ANSWERS)
        if callbacks & cut == writes | flush
    ]
    assert len(subjects) == 16 * len(FUA_ANSWERS)
    run(servers, subjects, REQUESTS)


@pytest.mark.parametrize("form", FORMS)
def test_other_questions(servers: Servers, form: str) -> None:
    """can_flush and can_trim, and can_write, say something else than the callbacks do."""
    subjects = []
    for callbacks, can_fua, can_flush, can_trim in product(
        callback_sets(), (None, "EMULATE", "NATIVE"), (None, False, True), (None, False, True)
    ):
        if form == V2 and callbacks & FUA_FORMS:
            continue  # Nobody calls them; test_every_row has shown it.
        subject = Subject(form, callbacks, can_fua, can_flush, can_trim)
        if (can_flush is None and can_trim is None) or terms(subject) == terms(plain(subject)):
            continue
        lies = (can_flush and not subject.has("flush")) or (
            can_trim and not (subject.has("trim") or subject.has("trim_fua"))
        )
        if not lies or isinstance(terms(subject), Refused):
            subjects.append(subject)
    subjects += [
        Subject(form, callbacks, can_fua, can_write=False)
        for callbacks, can_fua in product(list(callback_sets())[::7], (None, "NATIVE", "raises"))
    ]
    run(servers, subjects, PLAIN)


def plain(subject: Subject) -> Subject:
    return Subject(subject.form, subject.callbacks, subject.can_fua)


@pytest.mark.parametrize("form", FORMS)
def test_large_zero(servers: Servers, form: str) -> None:
    """Zeros larger than a piece: flags on every piece, one flush at the end, none after an error."""
    count = LARGEST_PIECE + (32 << 20) + 512
    wrong: list[str] = []
    for callbacks in (
        {"pwrite"},
        {"pwrite", "flush"},
        {"pwrite", "zero", "flush"},
        {"pwrite_fua", "zero_fua"},
        {"pwrite_fua"},
    ):
        for can_fua in (None, "EMULATE", "NATIVE"):
            subject = Subject(form, frozenset(callbacks), can_fua)
            offer = terms(subject)
            if isinstance(offer, Refused) or not offer.fua:
                continue
            with servers.serve(subject) as socket:
                request = Request("zero", fua=True, mood=Mood.NO_ZERO, count=count)
                wrong += check(socket, subject, [request], Log())
                wrong += fails_halfway(socket, subject, count)
    report(wrong)


def fails_halfway(socket: str, subject: Subject, count: int) -> list[str]:
    """The first piece is written, the second fails: nothing is called after it."""
    mood = Mood.NO_ZERO | Mood.LATER_FAILS
    request = Request("zero", fua=True, mood=mood, count=count)
    log = Log()
    client = connect(socket, str(subject))
    log.take()
    number = send(client, request)
    client.shutdown()
    offer = terms(subject)
    assert not isinstance(offer, Refused)
    *before, (name, offset, _, *rest) = (
        event for event in outcome(subject, offer, request).events if event[0] != "flush"
    )
    events = log.take()
    pieces = events[len(before) :]
    sizes = [piece[2] for piece in pieces]
    if (
        number == 28
        and events[: len(before)] == before
        and len(pieces) == 2
        and join_pieces(pieces) == [(name, offset, sum(sizes), *rest)]
        and max(sizes) <= LARGEST_PIECE
    ):
        return []
    return [
        f"{subject}: {request}: expected two pieces of {name} and ENOSPC, got {events} {number}"
    ]


@pytest.mark.parametrize("form", [V2, NATIVE])
def test_fast_zero(servers: Servers, form: str) -> None:
    """A fast zero keeps FUA as any zero does, and is never written instead."""
    requests = [
        Request("zero", fua, fast=True, mood=mood, no_hole=no_hole)
        for fua, mood, no_hole in product(
            BOTH, (Mood.FINE, Mood.NO_ZERO, Mood.FAILS, Mood.FLUSH_FAILS), BOTH
        )
    ]
    subjects = [
        Subject(form, callbacks, can_fua, can_fast_zero=can_fast_zero)
        for callbacks, can_fua, can_fast_zero in product(
            callback_sets(), (None, "EMULATE", "NATIVE"), (None, False, True)
        )
        if "zero_fua" not in callbacks and "trim_fua" not in callbacks
    ]
    run(servers, subjects, requests)


@pytest.mark.parametrize("form", [V2, NATIVE])
def test_fua_without_effect(servers: Servers, form: str) -> None:
    """Cache takes FUA too, where it is offered; read, flush and block status: test_every_row."""
    subjects = [
        Subject(form, frozenset(callbacks), can_fua, caches=True)
        for callbacks, can_fua in product(
            ((), ("pwrite",), ("pwrite", "flush")), (None, "NONE", "EMULATE", "NATIVE")
        )
    ]
    run(servers, subjects, [Request("cache", fua) for fua in BOTH])


def test_the_matrix_is_whole() -> None:
    """The rows reach every kind of answer; otherwise the tests above would prove little."""
    seen: dict[str, int] = {}
    rows = 0
    for form, callbacks, can_fua in product(FORMS, callback_sets(), FUA_ANSWERS):
        subject = Subject(form, callbacks, can_fua)
        assert Subject.parse(str(subject)) == subject
        offer = terms(subject)
        if isinstance(offer, Refused):
            kind = f"{form} refused: {offer.why}"
            seen[kind] = seen.get(kind, 0) + 1
            continue
        for request in REQUESTS:
            rows += 1
            result = outcome(subject, offer, request)
            kind = f"{form} {'fua' if offer.fua else 'no fua'} {[e[0] for e in result.events]}"
            seen[kind] = seen.get(kind, 0) + 1
    assert rows > 50_000
    for form in FORMS:
        for kind in (
            "refused: can_fua: raises",
            "refused: pwrite with FUA needs a flush",
            "no fua ['pwrite']",
            "fua ['pwrite']",
            "fua ['pwrite', 'flush']",
            "fua ['trim', 'flush']",
            "fua ['zero', 'flush']",
            "fua ['zero', 'pwrite', 'flush']",
        ):
            assert seen.get(f"{form} {kind}"), (form, kind)
    for kind in (
        "v1 refused: trim with FUA needs a flush",
        "v1 fua ['pwrite_fua', 'flush']",
        "v1 fua ['zero_fua', 'pwrite_fua']",
        "v1 fua ['zero_fua', 'pwrite', 'flush']",
        "v2 fua ['zero', 'pwrite']",
        "native fua ['zero', 'pwrite']",
    ):
        assert seen.get(kind), kind
    assert not any(name in kind for kind in seen if kind.startswith(V2) for name in FUA_FORMS)
    assert any(kind.startswith(V1) for kind in seen)


@contextmanager
def nbdkit(folder: Path, subject: Subject) -> Iterator[tuple[str, Log]]:
    """The peer serves the subject; it forks once it listens."""
    script, socket, pidfile = folder / "plugin.py", folder / "socket", folder / "pid"
    script.write_text(fua_subjects.script(subject))
    for path in (folder / "events", pidfile, socket):
        path.unlink(missing_ok=True)
    tests = str(Path(__file__).parent)
    subprocess.run(
        ["nbdkit", "-U", socket, "-P", pidfile, "python", script],
        env=os.environ | {"PYTHONPATH": tests, "FUA_EVENTS": str(folder / "events")},
        check=True,
    )
    try:
        yield str(socket), FileLog(folder / "events")
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGTERM)


def test_nbdkit_agrees(tmp_path: Path) -> None:
    """Where the contract and nbdkit say the same, the model and nbdkit do the same."""
    need(nbd, "python3-libnbd")
    need(shutil.which("nbdkit"), "nbdkit nbdkit-plugin-python")
    wrong = []
    for callbacks in callback_sets():
        if callbacks & FUA_FORMS:
            continue
        for answers in (None,), ("NONE", "EMULATE", "NATIVE", "True", "False", "raises"):
            subjects = [Subject(V2, callbacks, can_fua) for can_fua in answers]
            with nbdkit(tmp_path, subjects[0]) as (socket, log):
                for subject in subjects:
                    wrong += check(socket, subject, REQUESTS, log)
    report(wrong)
