"""The plugins of the FUA matrix: every `Subject` of the model as something that can be served.

Scripts are text (`script`), one for every form, set of callbacks and set of capability questions;
what the questions answer comes from the export's name, which is the Subject in one line. Native
classes (`native_plugin`) take everything from the export's name.

All of them tell this module what they were called with, in the model's terms (`events`); so a
script finds it as a module. In another process (nbdkit) the events go to the file that
FUA_EVENTS names, one line each. There is no disk behind: what is written is forgotten.
"""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from fua_model import (
    ANSWERS,
    CALLBACKS,
    FUA_FORMS,
    NATIVE,
    QUESTIONS,
    REGION,
    V1,
    Event,
    Mood,
    Subject,
)

SIZE = REGION << len(Mood.__members__)

events: list[Event] = []
"""What was called since the list was last cleared."""
asked: Counter[str] = Counter()
"""The capability questions since the counter was last cleared."""

_mood = Mood.FINE
_file = os.environ.get("FUA_EVENTS")


def _record(event: Event) -> None:
    events.append(event)
    if _file:
        with open(_file, "a") as out:
            out.write(f"{event!r}\n")


def answer(subject: Subject, question: str) -> Any:
    """What the subject answers to a capability question; may raise."""
    asked[question] += 1
    if question != "can_fua":
        return getattr(subject, question)
    assert subject.can_fua is not None
    if subject.can_fua == "raises":
        raise RuntimeError("can_fua was told to fail")
    return ANSWERS[subject.can_fua]


def ranged(name: str, offset: int, count: int, *rest: object) -> None:
    """Any callback but pwrite and flush was called."""
    _set_mood(offset)
    _record((name, offset, count, *rest))
    if name.startswith("zero") and Mood.NO_ZERO in _mood:
        raise OSError(errno.EOPNOTSUPP, "told not to zero")
    if name.startswith(("zero", "trim")) and Mood.FAILS in _mood:
        raise OSError(errno.ENOSPC, "told to fail")


def wrote(name: str, offset: int, buf: Any, *rest: object) -> None:
    """pwrite or pwrite_fua was called."""
    _set_mood(offset)
    data = bytes(buf)
    fill = data[0] if data == data[:1] * len(data) else None
    _record((name, offset, len(data), fill, *rest))
    if Mood.FAILS in _mood or (Mood.LATER_FAILS in _mood and offset % REGION):
        raise OSError(errno.ENOSPC, "told to fail")


def flushed(*rest: object) -> None:
    """flush was called."""
    _record(("flush", *rest))
    if Mood.FLUSH_FAILS in _mood:
        raise OSError(errno.ENOMEM, "told to fail")


def truth(value: object) -> object:
    """A boolean as it is; anything else so that it differs from every boolean."""
    return value if isinstance(value, bool) else ("not a boolean", value)


def _set_mood(offset: int) -> None:
    global _mood
    _mood = Mood(offset // REGION)


def questions(subject: Subject) -> list[str]:
    """The capability questions that the subject has."""
    return [question for question in QUESTIONS if getattr(subject, question) is not None]


_HEAD = """\
import nbdkit
import fua_subjects as told
from fua_model import Subject

def open(readonly):
    return Subject.parse(nbdkit.export_name())

def get_size(h):
    return told.SIZE

def run(callback, *arguments):
    try:
        callback(*arguments)
    except OSError as error:
        nbdkit.set_error(error.errno)
        raise RuntimeError("a callback was told to fail")
"""

_QUESTION = """
def {name}(h):
    return told.answer(h, "{name}")
"""

_VERSION_1 = {
    "pread": """
def pread(h, count, offset):
    run(told.ranged, "pread", offset, count)
    return bytes(count)
""",
    "pwrite": """
def pwrite(h, buf, offset):
    run(told.wrote, "pwrite", offset, buf)
""",
    "trim": """
def trim(h, count, offset):
    run(told.ranged, "trim", offset, count)
""",
    "zero": """
def zero(h, count, offset, may_trim):
    run(told.ranged, "zero", offset, count, told.truth(may_trim))
""",
    "flush": """
def flush(h):
    run(told.flushed)
""",
    "pwrite_fua": """
def pwrite_fua(h, buf, offset, fua):
    run(told.wrote, "pwrite_fua", offset, buf, told.truth(fua))
""",
    "trim_fua": """
def trim_fua(h, count, offset, fua):
    run(told.ranged, "trim_fua", offset, count, told.truth(fua))
""",
    "zero_fua": """
def zero_fua(h, count, offset, may_trim, fua):
    run(told.ranged, "zero_fua", offset, count, told.truth(may_trim), told.truth(fua))
""",
}

_VERSION_2 = {name: text for name, text in _VERSION_1.items() if name in FUA_FORMS} | {
    "pread": """
def pread(h, buf, offset, flags):
    run(told.ranged, "pread", offset, len(buf), flags)
    buf[:] = bytes(len(buf))
""",
    "pwrite": """
def pwrite(h, buf, offset, flags):
    run(told.wrote, "pwrite", offset, buf, flags)
""",
    "trim": """
def trim(h, count, offset, flags):
    run(told.ranged, "trim", offset, count, flags)
""",
    "zero": """
def zero(h, count, offset, flags):
    run(told.ranged, "zero", offset, count, flags)
""",
    "flush": """
def flush(h, flags):
    run(told.flushed, flags)
""",
    "cache": """
def cache(h, count, offset, flags):
    run(told.ranged, "cache", offset, count, flags)

def can_cache(h):
    return nbdkit.CACHE_NATIVE
""",
}


def script(subject: Subject) -> str:
    """The plugin as a Python file of module-level functions."""
    texts = _VERSION_1 if subject.form == V1 else _VERSION_2
    parts = [_HEAD, texts["pread"]]
    if subject.form != V1:
        parts.append("\nAPI_VERSION = 2\n")
    parts += [_QUESTION.format(name=question) for question in questions(subject)]
    parts += [texts[name] for name in CALLBACKS if name in subject.callbacks]
    if subject.caches:
        parts.append(texts["cache"])
    return "".join(parts)


def async_script(subject: Subject) -> str:
    """As `script`, with all callbacks and questions but open `async def`, on one event loop."""
    return re.sub(r"(?m)^def (?!open|run)", "async def ", script(subject))


def native_plugin(model: int, *, asynchronous: bool = False) -> Any:
    """One plugin for all native subjects: the export's name says which device it opens.

    Where it is `asynchronous`, all methods of its devices are coroutines that wait once.
    """
    import pynbdkit

    def get_size(self: Any) -> int:
        return SIZE

    def pread(self: Any, count: int, offset: int, flags: int) -> bytes:
        ranged("pread", offset, count, flags)
        return bytes(count)

    def pwrite(self: Any, buf: Any, offset: int, flags: int) -> None:
        wrote("pwrite", offset, buf, flags)

    def pwrite_fua(self: Any, buf: Any, offset: int, fua: bool) -> None:
        wrote("pwrite_fua", offset, buf, truth(fua))

    def trim(self: Any, count: int, offset: int, flags: int) -> None:
        ranged("trim", offset, count, flags)

    def trim_fua(self: Any, count: int, offset: int, fua: bool) -> None:
        ranged("trim_fua", offset, count, truth(fua))

    def zero(self: Any, count: int, offset: int, flags: int) -> None:
        ranged("zero", offset, count, flags)

    def zero_fua(self: Any, count: int, offset: int, may_trim: bool, fua: bool) -> None:
        ranged("zero_fua", offset, count, truth(may_trim), truth(fua))

    def flush(self: Any, flags: int) -> None:
        flushed(flags)

    def cache(self: Any, count: int, offset: int, flags: int) -> None:
        ranged("cache", offset, count, flags)

    def can_cache(self: Any) -> int:
        return pynbdkit.CacheMode.NATIVE

    methods: dict[str, Callable[..., Any]] = {
        function.__name__: function
        for function in (pwrite, pwrite_fua, trim, trim_fua, zero, zero_fua, flush)
    }

    def question(name: str) -> Callable[[Any], Any]:
        return lambda self: answer(self.subject, name)

    def device(subject: Subject) -> Any:
        assert subject.form == NATIVE
        body: dict[str, Any] = {"subject": subject, "get_size": get_size, "pread": pread}
        body |= {name: methods[name] for name in CALLBACKS if name in subject.callbacks}
        body |= {name: question(name) for name in questions(subject)}
        if subject.caches:
            body |= {"cache": cache, "can_cache": can_cache}
        if asynchronous:
            body = {
                name: awaiting(value) if callable(value) else value for name, value in body.items()
            }
        return type("Disk", (pynbdkit.Device,), body)()

    def awaiting(function: Callable[..., Any]) -> Callable[..., Any]:
        async def method(*arguments: Any) -> Any:
            import asyncio

            await asyncio.sleep(0)
            return function(*arguments)

        return method

    class Disks(pynbdkit.Plugin):
        thread_model = model

        def open(self, session: Any) -> Any:
            return device(Subject.parse(session.export_name))

    return Disks()
