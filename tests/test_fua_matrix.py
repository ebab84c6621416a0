"""Every row of the contract's FUA table, over the wire, from libnbd.

{version 1, version 2, native} x {which callbacks exist} x {can_fua's answer} x {command} x {FUA or
not} x {what fails}: the callbacks that each row must cause come from `fua_model`, the plugins from
`fua_subjects`, the client is `fua_driver`. A test is a block of some thousand rows; it fails with
the rows that differ.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

import fua_subjects
import support
from fua_driver import Driver, FileLog, Log, Serve, check_all, join_pieces, report
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
BOTH = (False, True)

COMMANDS = ("write", "trim", "zero", "read", "flush", "block status")
PLAIN = [Request(command, fua) for command, fua in product(COMMANDS, BOTH)]
FAILING = [
    Request(command, fua, mood=mood)
    for command, fua, mood in product(
        ("write", "trim", "zero"), BOTH, (Mood.FAILS, Mood.FLUSH_FAILS)
    )
]
FALLING_BACK = [
    Request("zero", fua, mood=Mood.NO_ZERO | more)
    for fua, more in product(BOTH, (Mood.FINE, Mood.FAILS, Mood.FLUSH_FAILS))
]
NO_HOLE = [
    Request("zero", fua, no_hole=True, mood=mood)
    for fua, mood in product(BOTH, (Mood.FINE, Mood.NO_ZERO))
]
REQUESTS = [
    *PLAIN,
    *NO_HOLE,
    *FAILING,
    *FALLING_BACK,
    Request("flush", mood=Mood.FLUSH_FAILS),
    *PLAIN[:6],  # After all that went wrong, the connection is as good as new.
]
"""What every subject is asked, in this order."""


@pytest.fixture
def serve_here(nbd: ModuleType, sockdir: Path) -> Serve:
    """serve_here(subject): our server in this process, for every subject with the same script."""

    @contextmanager
    def start(
        subject: Subject, *, readonly: bool = False, serialized: bool = False
    ) -> Iterator[Driver]:
        import pynbdkit

        if subject.form == NATIVE:
            models = pynbdkit.ThreadModel
            plugin = fua_subjects.native_plugin(
                models.SERIALIZE_REQUESTS if serialized else models.PARALLEL
            )
        else:
            path = sockdir / "plugin.py"
            path.write_text(fua_subjects.script(subject))
            plugin = pynbdkit.load_plugin(str(path))
        socket = str(sockdir / "socket")
        with pynbdkit.serve(plugin, unix=socket, readonly=readonly):
            yield Driver(nbd, socket, Log(), read_only=readonly)

    return start


@pytest.fixture
def serve_by_nbdkit(nbd: ModuleType, sockdir: Path) -> Serve:
    """The same from nbdkit, which forks once it listens."""
    program = support.program("nbdkit")

    @contextmanager
    def start(subject: Subject) -> Iterator[Driver]:
        script, socket, pidfile, events = (
            sockdir / name for name in ("plugin.py", "socket", "pid", "events")
        )
        script.write_text(fua_subjects.script(subject))
        for path in (socket, pidfile, events):
            path.unlink(missing_ok=True)
        tests = str(Path(__file__).parent)
        subprocess.run(
            [program, "-U", socket, "-P", pidfile, "python", script],
            env=os.environ | {"PYTHONPATH": tests, "FUA_EVENTS": str(events)},
            check=True,
        )
        try:
            yield Driver(nbd, str(socket), FileLog(events), hang_up=True)
        finally:
            os.kill(int(pidfile.read_text()), signal.SIGTERM)

    return start


def block_name(callbacks: frozenset[str]) -> str:
    return "+".join(sorted(callbacks)) or "none"


@pytest.mark.parametrize("flush", [frozenset(), frozenset({"flush"})], ids=block_name)
@pytest.mark.parametrize(
    "writes",
    [frozenset(block) for block in ((), ("pwrite",), ("pwrite_fua",), ("pwrite", "pwrite_fua"))],
    ids=block_name,
)
@pytest.mark.parametrize("form", FORMS)
def test_every_row(
    serve_here: Serve, form: str, writes: frozenset[str], flush: frozenset[str]
) -> None:
    """Every set of callbacks, every answer of can_fua, every command, FUA and not."""
    cut = {"pwrite", "pwrite_fua", "flush"}
    subjects = [
        Subject(form, callbacks, can_fua)
        for callbacks, can_fua in product(callback_sets(), FUA_ANSWERS)
        if callbacks & cut == writes | flush
    ]
    assert len(subjects) == 16 * len(FUA_ANSWERS)
    report(check_all(serve_here, subjects, REQUESTS))


@pytest.mark.parametrize("form", FORMS)
def test_other_questions(serve_here: Serve, form: str) -> None:
    """can_flush, can_trim, can_zero, can_write say something else than the callbacks do."""
    subjects = []
    for callbacks, can_fua, can_flush, can_trim in product(
        callback_sets(), (None, "EMULATE", "NATIVE"), (None, False, True), (None, False, True)
    ):
        if form == V2 and callbacks & FUA_FORMS:
            continue  # Nobody calls them; test_every_row has shown it.
        subject = Subject(form, callbacks, can_fua, can_flush, can_trim)
        if terms(subject) == terms(Subject(form, callbacks, can_fua)):
            continue
        lies = (can_flush and not subject.has("flush")) or (
            can_trim and not (subject.has("trim") or subject.has("trim_fua"))
        )
        if not lies or isinstance(terms(subject), Refused):
            subjects.append(subject)
    subjects += [
        Subject(form, callbacks, can_fua, can_zero=can_zero)
        for callbacks, can_fua, can_zero in product(
            callback_sets(), (None, "EMULATE", "NATIVE"), BOTH
        )
        if form != V2 or not callbacks & FUA_FORMS
    ]
    subjects += [
        Subject(form, callbacks, can_fua, can_write=False)
        for callbacks, can_fua in product(list(callback_sets())[::7], (None, "NATIVE", "raises"))
    ]
    report(check_all(serve_here, subjects, PLAIN))


@pytest.mark.parametrize("form", FORMS)
def test_read_only_server(serve_here: Serve, form: str) -> None:
    """Neither FUA nor trim nor zero is offered, whatever the plugin has; nothing is refused."""

    def serve(subject: Subject) -> AbstractContextManager[Driver]:
        return serve_here(subject, readonly=True)

    subjects = [
        Subject(form, callbacks, can_fua)
        for callbacks, can_fua in product(
            list(callback_sets())[1::6], (None, "EMULATE", "NATIVE", "raises")
        )
    ]
    report(check_all(serve, subjects, PLAIN))


@pytest.mark.parametrize("form", FORMS)
def test_refusal_is_told(serve_here: Serve, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The log says in one line what is missing, and no more than that."""
    for callbacks, can_fua, word in (
        ({"pwrite"}, "EMULATE", "flush"),
        ({"pwrite", "flush"}, "7", "can_fua"),
        ({"pwrite", "flush"}, "None", "can_fua"),
        ({"pwrite_fua", "trim"}, None, "trim_fua"),
    ):
        subject = Subject(form, frozenset(callbacks), can_fua)
        if not isinstance(terms(subject), Refused):
            continue
        with serve_here(subject) as driver:
            capfd.readouterr()
            assert driver.check(subject, []) == []
            told = capfd.readouterr().err
        assert told.count("\n") == 1
        assert word in told


@pytest.mark.parametrize("form", FORMS)
def test_pipelined(serve_here: Serve, form: str) -> None:
    """Requests that come together are each answered as if they had come alone."""
    requests = [request for request in REQUESTS if request.command != "flush"] * 2
    wrong: list[str] = []
    for callbacks, can_fua in product(callback_sets(), (None, "NATIVE")):
        if not callbacks >= {"trim", "zero"} or (form == V2 and callbacks & FUA_FORMS):
            continue
        subject = Subject(form, callbacks, can_fua)
        if not isinstance(terms(subject), Refused):
            with serve_here(subject, serialized=True) as driver:
                wrong += driver.check_pipelined(subject, requests)
    report(wrong)


@pytest.mark.parametrize("form", FORMS)
def test_large_zero(serve_here: Serve, form: str) -> None:
    """Zeros larger than a piece: the flag on every piece, or one flush at the end."""
    request = Request(
        "zero", fua=True, mood=Mood.NO_ZERO, count=LARGEST_PIECE + LARGEST_PIECE // 4 + 512
    )
    wrong: list[str] = []
    for callbacks, can_fua in product(
        (
            {"pwrite"},
            {"pwrite", "flush"},
            {"pwrite", "zero", "flush"},
            {"pwrite_fua"},
            {"pwrite_fua", "zero_fua"},
        ),
        (None, "EMULATE", "NATIVE"),
    ):
        subject = Subject(form, frozenset(callbacks), can_fua)
        offer = terms(subject)
        if not isinstance(offer, Refused) and offer.fua:
            with serve_here(subject) as driver:
                wrong += driver.check(subject, [request])
                wrong += fails_halfway(driver, subject, request.count)
    report(wrong)


def fails_halfway(driver: Driver, subject: Subject, count: int) -> list[str]:
    """The first piece is written, the second fails: nothing is called after it."""
    mood = Mood.NO_ZERO | Mood.LATER_FAILS
    request = Request("zero", fua=True, mood=mood, count=count)
    client = driver.connect(subject)
    [number] = driver.send(client, request)
    client.shutdown()
    offer = terms(subject)
    assert not isinstance(offer, Refused)
    *before, (name, offset, _, *rest) = (
        event for event in outcome(subject, offer, request).events if event[0] != "flush"
    )
    events = driver.log.take()
    pieces = events[len(before) :]
    sizes = [piece[2] for piece in pieces if piece[0] == name]
    if (
        number == errno.ENOSPC
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
def test_fast_zero(serve_here: Serve, form: str) -> None:
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
    report(check_all(serve_here, subjects, requests))


@pytest.mark.parametrize("form", [V2, NATIVE])
def test_cache_with_fua(serve_here: Serve, form: str) -> None:
    """Cache takes FUA too, where it is offered; read, flush and block status: test_every_row."""
    subjects = [
        Subject(form, frozenset(callbacks), can_fua, caches=True)
        for callbacks, can_fua in product(
            ((), ("pwrite",), ("pwrite", "flush")), (None, "NONE", "EMULATE", "NATIVE")
        )
    ]
    report(check_all(serve_here, subjects, [Request("cache", fua) for fua in BOTH]))


def test_the_matrix_is_whole() -> None:
    """The rows reach every kind of answer; otherwise the tests above would prove little."""
    kinds = set()
    rows = 0
    for form, callbacks, can_fua in product(FORMS, callback_sets(), FUA_ANSWERS):
        subject = Subject(form, callbacks, can_fua)
        assert Subject.parse(str(subject)) == subject
        offer = terms(subject)
        if isinstance(offer, Refused):
            kinds.add(f"{form} refused: {offer.why}")
            continue
        for request in REQUESTS:
            rows += 1
            called = " ".join(event[0] for event in outcome(subject, offer, request).events)
            kinds.add(f"{form} {'fua' if request.fua else 'plain'}: {called}")
    assert rows > 50_000
    for form in FORMS:
        assert kinds >= {
            f"{form} refused: can_fua: raises",
            f"{form} refused: pwrite with FUA needs a flush",
            f"{form} plain: pwrite",
            f"{form} fua: pwrite",
            f"{form} fua: pwrite flush",
            f"{form} fua: trim flush",
            f"{form} fua: zero flush",
            f"{form} fua: zero pwrite flush",
        }
    assert kinds >= {
        "v1 refused: trim with FUA needs a flush",
        "v1 fua: pwrite_fua",
        "v1 fua: pwrite_fua flush",
        "v1 fua: zero_fua pwrite_fua",
        "v1 fua: zero_fua pwrite flush",
        "v2 fua: zero pwrite",
        "native fua: zero pwrite",
        "native fua: zero_fua pwrite",
    }
    assert not any("_fua" in kind.partition(": ")[2] for kind in kinds if kind.startswith("v2 f"))


@pytest.mark.parametrize("form", [V1, V2])
def test_nbdkit_agrees(serve_by_nbdkit: Serve, form: str) -> None:
    """Where the contract and nbdkit say the same, the model and nbdkit do the same.

    Where they differ, the contract is the stricter one: nbdkit's Python plugin offers an emulated
    FUA without a flush, and a fast zero without a zero callback (it would fail at once). What it
    does with a version 1 script that answers NATIVE is not compared: it drops the flag.
    """
    answers = [None, "NONE", "EMULATE", "NATIVE", "True", "False", "raises"]
    if form == V1:
        answers.remove("NATIVE")
    subjects = [
        Subject(form, callbacks, can_fua)
        for callbacks, can_fua in product(callback_sets(), answers)
        if not callbacks & FUA_FORMS
    ]
    expected = []
    for subject in subjects:
        offer = terms(subject)
        if isinstance(offer, Refused):
            if subject.can_fua != "raises":
                expected.append(f"{subject}: opened, expected a refusal: {offer.why}")
        elif offer.zero and not subject.has("zero"):
            expected.append(f"{subject}: the client is told can_fast_zero = True")
    wrong = check_all(serve_by_nbdkit, subjects, REQUESTS)
    report(sorted(set(wrong) ^ set(expected)))
