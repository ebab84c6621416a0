"""The contract's FUA table as a model: which callbacks a request must cause, in which order.

Written from plugin-contract.md alone; it knows nothing of the server. A `Subject` is a plugin: its
form, the callbacks that it has, what it answers to the capability questions. `terms` tells what a
client that opens it is offered, or why the open is refused. `outcome` tells what one request to it
must cause: the callbacks with their arguments, and the error that the client may get.

An event is a tuple: ("pwrite", offset, count, fill, *rest), ("flush", *rest), and (name, offset,
count, *rest) for all others. `fill` is the byte that the buffer is full of; `rest` are the last
arguments of the callback: flags in version 2 and native classes, may_trim and fua in version 1.

The contract leaves a few cells open. They are decided here, each beside the word DECIDED.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, IntFlag
from itertools import product
from typing import Any

V1, V2, NATIVE = FORMS = ("v1", "v2", "native")

CALLBACKS = ("pwrite", "pwrite_fua", "trim", "trim_fua", "zero", "zero_fua", "flush")
FUA_FORMS = frozenset({"pwrite_fua", "trim_fua", "zero_fua"})

ANSWERS: dict[str, object] = {
    "NONE": 0,
    "EMULATE": 1,
    "NATIVE": 2,
    "True": True,
    "False": False,
    "7": 7,
    "-1": -1,
    "text": "native",
    "None": None,
}
"""What `can_fua` may answer, by the name that a Subject has it under ("raises" raises)."""
NONSENSE = frozenset({"raises", "7", "-1", "text", "None"})

MAY_TRIM = 1
FUA = 2
FAST_ZERO = 8

FILL = 0x5A
"""The byte that the client writes."""
REGION = 256 << 20
"""Bytes of disk to each `Mood`."""
LARGEST_PIECE = 64 << 20
"""Zeros that are written by pwrite come in pieces that a client could have sent itself."""

Event = tuple[Any, ...]


class Mood(IntFlag):
    """What goes wrong in the plugin; the region of the disk that a request is for says it."""

    FINE = 0
    FAILS = 1
    """Every callback that writes, trims or zeroes raises ENOSPC."""
    FLUSH_FAILS = 2
    """A flush raises ENOMEM when the last callback before it was for this region."""
    NO_ZERO = 4
    """zero and zero_fua raise EOPNOTSUPP."""
    LATER_FAILS = 8
    """Writing raises ENOSPC except where the region starts: every piece but the first."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A plugin. None for a capability question: the plugin does not have it."""

    form: str
    callbacks: frozenset[str]
    can_fua: str | None = None
    can_flush: bool | None = None
    can_trim: bool | None = None
    can_zero: bool | None = None
    can_write: bool | None = None
    can_fast_zero: bool | None = None
    caches: bool = False
    """It has `cache`, and can_cache answers NATIVE."""

    def __str__(self) -> str:
        """One line, which is the export's name as well, and which `parse` reads."""
        words = [self.form, "+".join(name for name in CALLBACKS if name in self.callbacks)]
        for question in QUESTIONS:
            answer = getattr(self, question)
            if answer is not None:
                words.append(f"{question}={answer}")
        if self.caches:
            words.append("caches")
        return " ".join(words)

    @classmethod
    def parse(cls, line: str) -> Subject:
        form, callbacks, *words = line.split(" ")
        rest: dict[str, Any] = {}
        for word in words:
            question, _, answer = word.partition("=")
            rest[question] = answer if question == "can_fua" else answer != "False"
        return cls(form, frozenset(filter(None, callbacks.split("+"))), **rest)

    def has(self, callback: str) -> bool:
        """The plugin has it, and it counts: version 2 does not know the draft's forms."""
        counts = self.form != V2 or callback not in FUA_FORMS
        return counts and callback in self.callbacks

    @property
    def zeroes(self) -> bool:
        """It has a zero callback, and lets it be called."""
        return (self.has("zero") or self.has("zero_fua")) and self.can_zero is not False


QUESTIONS = ("can_fua", "can_flush", "can_trim", "can_zero", "can_write", "can_fast_zero")


class Mode(Enum):
    """How one operation keeps FUA."""

    NOT = "not at all"
    PASS = "the callback is told"
    FLUSH = "a flush follows"
    WRITE = "zeros are written by pwrite"


@dataclass(frozen=True, slots=True)
class Terms:
    """What the client is offered, and how FUA is kept for each operation."""

    read_only: bool = False
    fua: bool = False
    flush: bool = False
    trim: bool = False
    zero: bool = False
    fast_zero: bool = False
    write_mode: Mode = Mode.NOT
    trim_mode: Mode = Mode.NOT
    zero_mode: Mode = Mode.NOT


@dataclass(frozen=True, slots=True)
class Refused:
    """The client's open fails."""

    why: str


@dataclass(frozen=True, slots=True)
class Request:
    command: str
    fua: bool = False
    no_hole: bool = False
    fast: bool = False
    mood: Mood = Mood.FINE
    count: int = 512

    @property
    def offset(self) -> int:
        return int(self.mood) * REGION

    def __str__(self) -> str:
        flags = [name for name in ("fua", "no_hole", "fast") if getattr(self, name)]
        mood = "" if self.mood is Mood.FINE else f" where the plugin has {self.mood!r}"
        return f"{self.command} {'+'.join(flags) or 'plain'} of {self.count}{mood}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The callbacks, in order, and the errors that the client may get (0: success)."""

    events: tuple[Event, ...] = ()
    errnos: frozenset[int] = frozenset({0})


def error(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


def terms(subject: Subject, *, read_only: bool = False) -> Terms | Refused:
    """What a client that opens the subject gets; `read_only`: from a server that only reads."""
    can_flush = subject.has("flush") if subject.can_flush is None else subject.can_flush
    can_write = subject.has("pwrite") or subject.has("pwrite_fua")
    if read_only or not can_write or subject.can_write is False:
        # DECIDED: nothing that writes is offered, so can_fua is not asked and nothing is refused.
        return Terms(read_only=True, flush=can_flush)
    can_trim = subject.has("trim") or subject.has("trim_fua")
    if subject.can_trim is not None:
        can_trim = subject.can_trim
    offer = Terms(
        flush=can_flush,
        trim=can_trim,
        zero=True,
        fast_zero=bool(subject.can_fast_zero and subject.zeroes),
    )
    if subject.can_fua in NONSENSE:
        return Refused(f"can_fua: {subject.can_fua}")
    if subject.can_fua in ("NONE", "False"):
        return offer
    if subject.can_fua is None and not (subject.has("pwrite_fua") or can_flush):
        return offer

    modes: dict[str, Mode] = {}
    for operation in ("pwrite", "trim", "zero"):
        mode = mode_of(subject, operation)
        if mode is Mode.FLUSH and not subject.has("flush"):
            # DECIDED: what the contract says of a version 1 plugin's trim and zero here holds for
            # a native class that leaves can_fua out, too: FUA is never offered on hope.
            if operation == "zero" and modes["pwrite"] is Mode.PASS:
                mode = Mode.WRITE
            elif operation != "trim" or can_trim:
                return Refused(f"{operation} with FUA needs a flush")
        modes[operation] = mode
    if not subject.zeroes:
        # DECIDED: without any zero callback, a zero is a write, and keeps FUA as a write does.
        modes["zero"] = Mode.WRITE
    return replace(
        offer,
        fua=True,
        write_mode=modes["pwrite"],
        trim_mode=modes["trim"],
        zero_mode=modes["zero"],
    )


def mode_of(subject: Subject, operation: str) -> Mode:
    """PASS or FLUSH, for an operation of a plugin that has FUA to offer."""
    if subject.can_fua == "EMULATE":
        return Mode.FLUSH
    if subject.has(f"{operation}_fua"):
        return Mode.PASS
    if subject.can_fua == "NATIVE" and subject.form != V1:
        return Mode.PASS
    # DECIDED: a version 1 plugin that answers NATIVE has the flag passed on to its `_fua` forms;
    # its other callbacks take no flag, so a flush follows them.
    # DECIDED: so it is where pwrite_fua alone brought the offer and can_flush is false, but flush
    # exists.
    return Mode.FLUSH


def outcome(subject: Subject, offer: Terms, request: Request) -> Outcome:
    """What the request must cause in a plugin whose open was not refused."""
    writes = request.command in ("write", "trim", "zero")
    if offer.read_only and writes:
        # A trim, a zero and a FUA flag were not offered either, so EINVAL is as right.
        plain_write = request.command == "write" and not request.fua
        return Outcome(
            errnos=error(errno.EPERM) if plain_write else error(errno.EPERM, errno.EINVAL)
        )
    if request.fua and not offer.fua:
        return Outcome(errnos=error(errno.EINVAL))
    if request.command == "write":
        return written(subject, offer.write_mode, request, FILL)
    if request.command == "trim":
        if not offer.trim:
            return Outcome(errnos=error(errno.EINVAL))
        return changed(subject, "trim", offer.trim_mode, request, ())
    if request.command == "zero":
        if request.fast and not offer.fast_zero:
            return Outcome(errnos=error(errno.EINVAL))
        return zeroed(subject, offer, request)
    flags: Event = () if subject.form == V1 else (0,)
    if request.command == "read":
        return Outcome((("pread", request.offset, request.count, *flags),))
    if request.command == "flush":
        if not offer.flush:
            return Outcome(errnos=error(errno.EINVAL))
        fails = request.mood & Mood.FLUSH_FAILS
        return Outcome((("flush", *flags),), error(errno.ENOMEM if fails else 0))
    if request.command == "cache":
        if not subject.caches:
            return Outcome(errnos=error(errno.EINVAL))
        return Outcome((("cache", request.offset, request.count, 0),))
    assert request.command == "block status"
    return Outcome()


def written(subject: Subject, mode: Mode, request: Request, fill: int) -> Outcome:
    """The write, or the zeros that are written as one (pieces count as one event)."""
    return changed(subject, "pwrite", mode, request, (), fill)


def zeroed(subject: Subject, offer: Terms, request: Request) -> Outcome:
    if not subject.zeroes or (request.fua and offer.zero_mode is Mode.WRITE):
        if request.fast:
            return Outcome(errnos=error(errno.ENOTSUP))
        return written(subject, offer.write_mode, request, 0)
    first = changed(subject, "zero", offer.zero_mode, request, (not request.no_hole,))
    if not request.mood & Mood.NO_ZERO:
        return first
    if request.fast:
        return Outcome(first.events[:1], error(errno.ENOTSUP))
    # DECIDED: from here on it is a write, and keeps FUA as a write does.
    fallback = written(subject, offer.write_mode, request, 0)
    return Outcome(first.events[:1] + fallback.events, fallback.errnos)


def changed(
    subject: Subject,
    operation: str,
    mode: Mode,
    request: Request,
    may_trim: tuple[bool, ...],
    *fill: int,
) -> Outcome:
    """One callback that changes the disk, and the flush behind it."""
    told = request.fua and mode is Mode.PASS
    where = (request.offset, request.count, *fill)
    if subject.has(f"{operation}_fua"):
        call: Event = (f"{operation}_fua", *where, *may_trim, told)
    elif subject.form == V1:
        call = (operation, *where, *may_trim)
    else:
        flags = FUA * told | MAY_TRIM * any(may_trim) | FAST_ZERO * request.fast
        call = (operation, *where, flags)
    events: tuple[Event, ...] = (call,)
    if request.mood & Mood.FAILS:
        return Outcome(events, error(errno.ENOSPC))
    if not request.fua or mode is Mode.PASS:
        return Outcome(events)
    assert mode is Mode.FLUSH
    events += (("flush",) if subject.form == V1 else ("flush", 0),)
    fails = request.mood & Mood.FLUSH_FAILS
    return Outcome(events, error(errno.ENOMEM if fails else 0))


def callback_sets() -> Iterator[frozenset[str]]:
    """All 128 of them."""
    for chosen in product((False, True), repeat=len(CALLBACKS)):
        yield frozenset(name for name, there in zip(CALLBACKS, chosen, strict=True) if there)
