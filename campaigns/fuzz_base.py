"""What every fuzz target is made of: an input, an oracle, a mutator, seeds.

A target is a function of bytes that raises `Finding` when something has happened that must not.
How the bytes are chosen is another matter: atheris chooses by what they reach in the code, the
test suite by chance, from a fixed seed. Both go through the target's own mutator, which knows
frames (options, requests, replies), so that inputs stay understandable for the machine that is
tested, and reach its deep states; half of the time, and for what is text, plain bytes are changed.

Seeds are in tests/seeds/NAME, one a line: ``what it is = hexadecimal digits``, or a Python literal
where the input is a text. What a target has ever failed on is added there by hand, with a name
that says what it was.
"""

from __future__ import annotations

import ast
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

SEEDS = Path(__file__).resolve().parent.parent / "tests" / "seeds"
LONGEST = 2048
"""Bytes of an input, unless the target says otherwise."""
INTERESTING = (
    *(0, 1, 2, 3, 4, 7, 8, 16, 20, 27, 28, 31, 32, 64, 124, 127, 128, 255, 256, 511, 512, 513),
    *(4095, 4096, 4097, 32767, 32768, 65535, 65536, (1 << 26) - 1, 1 << 26, (1 << 26) + 1),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
"""Numbers at the borders of something."""


class Finding(AssertionError):
    """An input has made the code do what it must not."""


def check(holds: object, what: str) -> None:
    """Raise Finding unless it holds."""
    if not holds:
        raise Finding(what)


class Target:
    """One thing that is fuzzed.

    Attributes: `name` (also of its seeds' file); `modules` of the package whose lines it is to
    reach; `share` of the inputs of a campaign; `longest`: bytes of an input; `text`: whether seeds
    are texts.
    """

    name = ""
    modules: Sequence[str] = ()
    share = 1.0
    longest = LONGEST
    text = False

    def one(self, data: bytes) -> None:
        """Try one input. Raises Finding; any other exception is a finding as well."""
        raise NotImplementedError

    def mutate(self, data: bytes, random: Random) -> bytes:
        """Another input, made from this one."""
        return havoc(data, random)

    def seeds(self) -> dict[str, bytes]:
        """The seeds that are kept, by name."""
        return read_seeds(self.name, self.text)


def read_seeds(name: str, text: bool) -> dict[str, bytes]:
    """The seeds of a file. Raises ValueError where a line is none."""
    seeds: dict[str, bytes] = {}
    for number, line in enumerate((SEEDS / name).read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        title, equals, value = line.partition(" = ")
        if not equals or title in seeds:
            raise ValueError(f"{SEEDS / name}:{number}: not a title of its own, ' = ', a seed")
        if text:
            seeds[title] = str(ast.literal_eval(value)).encode("utf-8", "surrogateescape")
        else:
            seeds[title] = bytes.fromhex(value)
    return seeds


# -- changing bytes --------------------------------------------------------------------------------


def havoc(data: bytes, random: Random, words: Sequence[bytes] = ()) -> bytes:
    """Change a few bytes, anywhere. `words`: what may be put in."""
    result = bytearray(data)
    for _ in range(1 << random.randrange(4)):
        at = random.randrange(len(result) + 1)
        what = random.randrange(7 if words else 6)
        if what == 0:
            result[at : at + 1] = bytes((random.randrange(256),))
        elif what == 1:
            result[at : at + 1] = bytes(
                [byte ^ 1 << random.randrange(8) for byte in result[at : at + 1]]
            )
        elif what == 2:
            del result[at : at + 1 + random.randrange(8)]
        elif what == 3:
            width = random.choice((1, 2, 4, 8))
            number = random.choice(INTERESTING) & ((1 << 8 * width) - 1)
            result[at : at + width] = number.to_bytes(width, "big")
        elif what == 4:
            start = random.randrange(len(result) + 1)
            result[at:at] = result[start : start + 1 + random.randrange(32)]
        elif what == 5:
            result[at:at] = random.randbytes(1 + random.randrange(4))
        else:
            result[at:at] = random.choice(words)
    return bytes(result)


def reframe(
    frames: list[bytes], random: Random, make: Callable[[], bytes], change: Callable[[bytes], bytes]
) -> bytes:
    """Change a sequence of frames; `make` makes a new one, `change` changes one."""
    frames = frames[:]
    for _ in range(1 + random.randrange(3)):
        at = random.randrange(len(frames) + 1)
        what = random.randrange(6)
        if what <= 1 or not frames:
            frames.insert(at, make())
        elif at == len(frames):
            frames.append(random.choice(frames))
        elif what == 2:
            frames[at] = change(frames[at])
        elif what == 3:
            del frames[at]
        elif what == 4:
            other = random.randrange(len(frames))
            frames[at], frames[other] = frames[other], frames[at]
        else:
            frames[at] = havoc(frames[at], random)
    return b"".join(frames)


def pieces(data: bytes, seed: int) -> list[bytes]:
    """The same bytes in pieces; 0 is one piece, 1 is byte by byte."""
    if seed == 0 or not data:
        return [data]
    if seed == 1:
        return [data[at : at + 1] for at in range(len(data))]
    random = Random(seed)
    result = []
    at = 0
    while at < len(data):
        length = 1 + random.randrange(1 << random.randrange(1, 9))
        result.append(data[at : at + length])
        at += length
    return result


class FakeSocket:
    """A socket whose client has sent everything, and takes everything: no system call is made.

    `seed` says how the client's bytes come in pieces, and whether all that is sent is taken at
    once. After the last piece the client has gone. `sent` is what was sent to it.
    """

    family = socket.AF_INET

    def __init__(self, data: bytes, seed: int = 0) -> None:
        self._pieces = pieces(data, seed)
        self._next = 0
        self._takes = 1 << 62 if seed < 128 else seed
        self.sent = bytearray()
        self.largest = 0
        """Bytes of the largest buffer that it was to fill."""

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """As a socket's."""
        self.largest = max(self.largest, len(buffer))
        view = memoryview(buffer)[: nbytes or None]
        check(len(view), "bytes are received into a buffer that is full")
        filled = 0
        while filled < len(view) and self._next < len(self._pieces):
            piece = self._pieces[self._next]
            part = piece[: len(view) - filled]
            view[filled : filled + len(part)] = part
            filled += len(part)
            if len(part) < len(piece):
                self._pieces[self._next] = piece[len(part) :]
            else:
                self._next += 1
            if not flags & socket.MSG_WAITALL:
                break
        return filled

    def sendmsg(self, buffers: Sequence[bytes | memoryview]) -> int:
        """As a socket's."""
        data = b"".join(buffers)
        self.sent += data[: self._takes]
        return min(len(data), self._takes)

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        """As a socket's."""
        return self.sendmsg([data])

    def getpeername(self) -> object:
        """As a TCP socket's."""
        return ("127.0.0.1", 1)

    def settimeout(self, seconds: float | None) -> None:
        """As a socket's; it never waits."""

    def shutdown(self, how: int) -> None:
        """As a socket's."""

    def close(self) -> None:
        """As a socket's."""

    def fileno(self) -> int:
        """It has none."""
        return -1


def try_at_random(target: Target, count: int, seed: int) -> None:
    """Try `count` inputs: the seeds, changed by chance, the same ones for the same `seed`.

    Raises Finding, which has the input in its text, for whatever is raised.
    """
    random = Random(seed)
    pool = list(target.seeds().values()) or [b""]
    for _ in range(count):
        data = random.choice(pool)
        for _ in range(1 + random.randrange(3)):
            data = target.mutate(data, random)[: target.longest]
        if random.randrange(16) == 0:
            pool.append(data)
            if len(pool) > 400:
                del pool[random.randrange(len(pool))]
        attempt(target, data)


def attempt(target: Target, data: bytes) -> None:
    """Try one input. Raises Finding, which has the input in its text."""
    try:
        target.one(data)
    except Exception as failure:
        if str(failure).startswith(f"{target.name}: "):
            raise
        why = failure if isinstance(failure, Finding) else repr(failure)
        raise Finding(f"{target.name}: {why}\n  input: {data.hex()}") from failure
