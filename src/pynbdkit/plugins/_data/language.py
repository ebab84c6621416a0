"""The data format of nbdkit-data-plugin(1): from a text to an image.

The text is read once, from left to right. Whatever needs nothing from outside becomes an image at
once; `<FILE` and `<(SCRIPT)`, and what is built on them, become an `Expression` that is evaluated
when it is known how much of it is wanted, so that a slice can stop an endless script and an unused
one is never run. Names are resolved where they are used, in the scope that they stand in.
"""

from __future__ import annotations

import os
import re

from ...errors import ConfigError
from .image import MAX_SIZE, Builder, Image, from_bytes
from .source import load_file, load_script, room_for_sources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

_SPACE: Final = r"[ \t\n\r\v\f]*"  # the C locale's, not Unicode's
_NUMBER: Final = r"(0[xX][0-9a-fA-F]+|[0-9]+)"
_END: Final = r"(?= [lb]e(?:16|32|64): | (?![0-9A-Za-z_.]))"  # of a number: a word may follow
_TOKEN: Final = re.compile(
    rf"""
      (?P<space>   [ \t\n\r\v\f]+ | \#[^\n]* )
    | (?P<byte>    {_NUMBER} {_END} )
    | (?P<word>    ([lb])e(16|32|64): \+? {_NUMBER} (?![0-9A-Za-z_.]) )
    | (?P<string>  " [^"\\]* (?: \\. [^"\\]* )* " )
    | (?P<move>    @ ([-+^]?) {_SPACE} {_NUMBER} {_END} )
    | (?P<open>    \( )
    | (?P<close>   \) )
    | (?P<repeat>  \* {_SPACE} {_NUMBER} {_END} )
    | (?P<slice>   \[ {_SPACE} {_NUMBER}? {_SPACE} : {_SPACE} {_NUMBER}? {_SPACE} \] )
    | (?P<assign>  -> {_SPACE} \\([0-9A-Za-z_-]+) )
    | (?P<name>    \\ ([0-9A-Za-z_-]+) )
    | (?P<variable> \$ ([A-Za-z_][0-9A-Za-z_]*) )
    | (?P<script>  <\( )
    | (?P<file>    < ([^ \t\n\r\v\f*\[()] [^ \t\n\r\v\f*\[)]*) )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_ESCAPE: Final = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|([0-7]{1,3})|(.))", re.S)
_ESCAPES: Final = dict(zip(b"abfnrtv", (7, 8, 12, 10, 13, 9, 11), strict=True))
_FIELDS: Final = 1 << 20  # of one disk, all variables written out
_NESTED: Final = 100  # variables within variables, expressions on files within each other

_HINTS: Final = (  # what a text that is no field may have been meant to be
    (r"0[xX](?![0-9a-fA-F])", "0x must be followed by hexadecimal digits"),
    (r"[0-9]+[kKmMgGtTpPeEbs]\b", "numbers have no suffix here; write the number of bytes"),
    (r"[0-9]", "a number must end before the next field"),
    (r"[-+][0-9]", "a byte must be in the range 0 to 255"),
    (r'"', 'a string must end with another "'),
    (r"[lb]e[0-9]*:-", "a word must not be negative"),
    (
        r"[lb]e(?:16|32|64):",
        "a word is a decimal, octal (0...) or hexadecimal (0x...) number right after the colon",
    ),
    (r"[lb]e", 'expected "le16:", "le32:", "le64:", "be16:", "be32:" or "be64:"'),
    (r"@[-+^]" + _SPACE + "[-+]", "the number after @ must not be negative (back is @-N)"),
    (r"@", "expected @OFFSET, @+N, @-N or @^ALIGNMENT: a number of bytes, without a suffix"),
    (r"\*" + _SPACE + "-", "the N of *N must not be negative"),
    (r"\*", "expected *N: how many times, without a suffix"),
    (r"\[", "expected a slice: [N:M], [:M], [N:] or [:]"),
    (r"->", r"expected -> \NAME (letters, digits, - and _)"),
    (r"\\", r"expected \NAME (letters, digits, - and _)"),
    (r"\$", "expected $NAME (letters, digits and _), without braces"),
    (r"<", "expected <FILE (no space after <, none in the name) or <(SCRIPT)"),
    (r"", "no field begins like this; see DATA FORMAT in the documentation of the data plugin"),
)


class Place:
    """A position in the text or in a variable's, for messages."""

    __slots__ = ("label", "offset", "text")

    def __init__(self, label: str, text: str, offset: int) -> None:
        self.label = label
        self.text = text
        self.offset = offset

    def error(self, message: object) -> ConfigError:
        """The error to raise: the place, what is there, and what is wrong with it."""
        where = f"{self.label}: offset {self.offset}"
        line = self.text.count("\n", 0, self.offset) + 1
        if "\n" in self.text.strip():
            column = self.offset - self.text.rfind("\n", 0, self.offset)
            where += f" (line {line}, column {column})"
        shown = self.text[self.offset : self.offset + 20].split("\n")[0]
        return ConfigError(f"{where}, at {shown!r}: {message}" if shown else f"{where}: {message}")


class Expression:
    """Something that needs a file or a script."""

    clips = False
    """Whether a slice that ends behind it takes what there is."""
    depth = 1

    def __init__(self) -> None:
        self._image: Image | None = None

    def image(self, limit: int | None) -> Image:
        """Its bytes; with a limit at least so many of them, if it has them."""
        if self._image is None:
            image = self.load(limit)
            if limit is not None and image.size >= limit:
                return image
            self._image = image
        return self._image

    def load(self, limit: int | None) -> Image:
        """As `image`, without remembering it."""
        raise NotImplementedError


class _Source(Expression):
    """A file or a script. All sources of a disk share the room that they have."""

    clips = True

    def __init__(self, parser: _Parser, place: Place, kind: str, what: str) -> None:
        super().__init__()
        self.parser = parser
        self.place = place
        self.kind = kind
        self.what = what

    def load(self, limit: int | None) -> Image:
        load = load_file if self.kind == "file" else load_script
        try:
            image = load(self.what, limit, self.parser.room)
        except OSError as error:
            what = self.what if self.what.isprintable() else repr(self.what)
            raise self.place.error(f"{what}: {error.strerror}") from None
        except ValueError as error:
            raise self.place.error(error) from None
        self.parser.room -= sum(end - start for start, end in image.data(0, image.size))
        return image


class _Group(Expression):
    """Several fields, some of which need a source."""

    def __init__(self, steps: list[_Step]) -> None:
        super().__init__()
        self.steps = steps
        self.depth = 1 + max(what.depth for _, what, _ in steps if isinstance(what, Expression))

    def load(self, limit: int | None) -> Image:
        return _lay_out(self.steps, limit)


class _Repeated(Expression):
    """A repeated expression."""

    def __init__(self, inner: Expression, times: int, place: Place) -> None:
        super().__init__()
        self.inner = inner
        self.times = times
        self.place = place
        self.depth = 1 + inner.depth

    def load(self, limit: int | None) -> Image:
        if not self.times:
            return from_bytes(b"")
        image = self.inner.image(limit)
        if limit is not None and image.size >= limit:
            return image
        return _repeat(image, self.times, self.place)


class _Sliced(Expression):
    """A part of an expression."""

    def __init__(self, inner: Expression, start: int, end: int | None, place: Place) -> None:
        super().__init__()
        self.inner = inner
        self.start = start
        self.end = end
        self.place = place
        self.depth = 1 + inner.depth

    def load(self, limit: int | None) -> Image:
        wanted = self.end
        if wanted is None and limit is not None:
            wanted = self.start + limit
        image = self.inner.image(wanted)
        return _cut(image, self.start, self.end, self.inner.clips, self.place)


# A field of a group: how it moves the offset ("" where it writes something), what it writes or how
# far it moves, and where it stands.
_Step = tuple[str, "Image | Expression | int", Place]


class _Scope:
    """One ( ... ) or variable while it is read."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.names: dict[str, Image | Expression] = {}
        self.steps: list[_Step] = []
        self.run = bytearray()  # bytes that no operator can reach any more
        self.run_place = place
        self.last: bytes | Image | Expression | None = None  # what an operator would apply to
        self.last_place = place

    def push(self, what: bytes | Image | Expression, place: Place) -> None:
        """Another field that writes."""
        if isinstance(what, Expression) and what.depth > _NESTED:
            raise place.error(f"expressions are built on each other more than {_NESTED} deep")
        self.commit()
        self.last = what
        self.last_place = place

    def commit(self) -> None:
        """No operator follows the last field."""
        last, self.last = self.last, None
        if isinstance(last, bytes):
            if not self.run:
                self.run_place = self.last_place
            self.run += last
        elif last is not None:
            self._end_run()
            self.steps.append(("", last, self.last_place))

    def move(self, how: str, distance: int, place: Place) -> None:
        """@ in one of its forms."""
        self.commit()
        self._end_run()
        self.steps.append((how, distance, place))

    def operand(self) -> Image | Expression | None:
        """Take the last field for an operator."""
        last, self.last = self.last, None
        return from_bytes(last) if isinstance(last, bytes) else last

    def finish(self) -> Image | Expression:
        """What the scope writes: an image where nothing in it needs a source."""
        self.commit()
        self._end_run()
        if len(self.steps) == 1 and self.steps[0][0] == "":
            what = self.steps[0][1]
            assert not isinstance(what, int)
            return what
        if any(isinstance(what, Expression) for _, what, _ in self.steps):
            return _Group(self.steps)
        return _lay_out(self.steps, None)

    def _end_run(self) -> None:
        if self.run:
            self.steps.append(("", from_bytes(bytes(self.run)), self.run_place))
            self.run = bytearray()


class _Parser:
    """What the text and the variables in it share."""

    def __init__(self, variable: Callable[[str], str | None]) -> None:
        self.variable = variable
        self.fields = _FIELDS
        self.room = room_for_sources()
        self.scopes: list[_Scope] = []
        self.outermost = 0  # the outermost scope that a name was taken from
        self.known: dict[str, Image | Expression] = {}  # variables that mean the same everywhere

    def parse(self, label: str, text: str, active: tuple[str, ...]) -> Image | Expression:
        """One text, in a scope of its own."""
        bottom = len(self.scopes)
        self.scopes.append(_Scope(Place(label, text, 0)))
        position = 0
        match_token = _TOKEN.match
        while position < len(text):
            match = match_token(text, position)
            place = Place(label, text, position)
            if match is None:
                raise _no_field(place)
            kind = match.lastgroup
            scope = self.scopes[-1]
            position = match.end()
            if kind == "space":
                continue
            self.fields -= 1
            if self.fields < 0:
                raise place.error(f"more than {_FIELDS} fields when the variables are written out")
            if kind == "byte":
                value = _number(match[0], place)
                if value > 255:
                    raise place.error("a byte must be in the range 0 to 255 (see le16:, be32: ...)")
                scope.push(_BYTES[value], place)
            elif kind == "word":
                scope.push(_word(match, place), place)
            elif kind == "string":
                scope.push(_string(match[0], place), place)
            elif kind == "move":
                how = match[_group("move") + 1]
                distance = _number(match[_group("move") + 2], place)
                if how == "^" and (not distance or distance & (distance - 1)):
                    raise place.error("the alignment must be a power of 2")
                scope.move("@" + how, distance, place)
            elif kind == "open":
                self.scopes.append(_Scope(place))
            elif kind == "close":
                if len(self.scopes) == bottom + 1:
                    raise place.error("unmatched ')'; there is no '(' before it")
                self.scopes.pop()
                self.scopes[-1].push(scope.finish(), scope.place)
            elif kind in ("repeat", "slice", "assign"):
                self.operate(kind, match, place)
            elif kind == "name":
                scope.push(self.lookup(match[_group("name") + 1], place), place)
            elif kind == "variable":
                name = match[_group("variable") + 1]
                scope.push(self.substitute(name, place, active), place)
            elif kind == "file":
                name = match[_group("file") + 1]
                scope.push(_Source(self, place, "file", name), place)
            else:
                end = _script_end(text, position, place)
                script = text[position:end]
                if not script.strip():
                    raise place.error("expected a script in <( ... )")
                position = end + 1
                scope.push(_Source(self, place, "script", script), place)
        if len(self.scopes) > bottom + 1:
            raise self.scopes[-1].place.error("unmatched '('; there is no ')' for it")
        return self.scopes.pop().finish()

    def operate(self, kind: str, match: re.Match[str], place: Place) -> None:
        """*N, [N:M] or -> \\NAME on the last field."""
        scope = self.scopes[-1]
        operand = scope.operand()
        group = _group(kind)
        if operand is None:
            what = {"repeat": "*N", "slice": "[N:M]", "assign": r"-> \NAME"}[kind]
            raise place.error(f"{what} must follow what writes bytes, not @... or -> \\NAME")
        if kind == "assign":
            scope.names[match[group + 1]] = operand
            return
        result: Image | Expression
        if kind == "repeat":
            times = _number(match[group + 1], place)
            if isinstance(operand, Expression):
                result = _Repeated(operand, times, place)
            else:
                result = _repeat(operand, times, place)
        else:
            start = _number(match[group + 1] or "0", place)
            end = _number(match[group + 2], place) if match[group + 2] else None
            if end is not None and end < start:
                raise place.error("the slice ends before it starts")
            if isinstance(operand, Expression):
                result = _Sliced(operand, start, end, place)
            else:
                result = _cut(operand, start, end, False, place)
        scope.push(result, scope.last_place)

    def lookup(self, name: str, place: Place) -> Image | Expression:
        """What a name stands for in the innermost scope that has it."""
        for index in range(len(self.scopes) - 1, -1, -1):
            what = self.scopes[index].names.get(name)
            if what is not None:
                self.outermost = min(self.outermost, index)
                return what
        raise place.error(rf"\{name} is not defined here (define it before: ... -> \{name})")

    def substitute(self, name: str, place: Place, active: tuple[str, ...]) -> Image | Expression:
        """A variable, as a nested scope."""
        if name in self.known:
            return self.known[name]
        if name in active:
            raise place.error(f"${name} contains itself")
        if len(active) >= _NESTED:
            raise place.error(f"variables are nested more than {_NESTED} deep")
        text = self.variable(name)
        if text is None:
            raise place.error(
                f"${name} is not set (give {name}=... on the command line or in the environment)"
            )
        before, self.outermost = self.outermost, len(self.scopes)
        what = self.parse(f"${name}", text, (*active, name))
        if self.outermost >= len(self.scopes):
            self.known[name] = what
        self.outermost = min(before, self.outermost)
        return what


def parse(
    text: str,
    variable: Callable[[str], str | None] = lambda name: None,
    *,
    limit: int | None = None,
    label: str = "data",
) -> Image:
    """The image that the text describes.

    Arguments: `variable` gives the text of $NAME, None where it is not set; `limit`: no more than
    so many bytes are wanted (an endless source is then cut there); `label` begins the messages.
    Raises ConfigError with one line that names the place in the text.
    """
    what = _Parser(variable).parse(label, text, ())
    return what if isinstance(what, Image) else what.image(limit)


_BYTES: Final = tuple(bytes((value,)) for value in range(256))


def _group(name: str) -> int:
    return _TOKEN.groupindex[name]


def _no_field(place: Place) -> ConfigError:
    text = place.text[place.offset : place.offset + 4096]
    return place.error(next(hint for pattern, hint in _HINTS if re.match(pattern, text)))


def _number(text: str, place: Place) -> int:
    """A decimal, octal or hexadecimal number that is a possible offset."""
    value = _any_number(text, place)
    if value > MAX_SIZE:
        raise place.error("the number is larger than 2**63 - 1")
    return value


def _any_number(text: str, place: Place) -> int:
    if text[0] != "0" or text == "0":
        return int(text[:40])
    if text[1] in "xX":
        return int(text, 16)
    try:
        return int(text, 8)
    except ValueError:
        raise place.error(
            f"a number that begins with 0 is octal: write {text.lstrip('0')}"
        ) from None


def _word(match: re.Match[str], place: Place) -> bytes:
    order, bits, text = match.group(*(_group("word") + index for index in (1, 2, 3)))
    value = _any_number(text, place)
    if value >> int(bits):
        raise place.error(f"the number does not fit in {bits} bits")
    return value.to_bytes(int(bits) // 8, "little" if order == "l" else "big")


def _string(text: str, place: Place) -> bytes:
    try:
        content = os.fsencode(text[1:-1])
    except UnicodeEncodeError:  # not from this machine's command line
        content = text[1:-1].encode("utf-8", "surrogateescape")
    return (
        _ESCAPE.sub(lambda match: _unescape(match, place), content) if b"\\" in content else content
    )


def _unescape(match: re.Match[bytes], place: Place) -> bytes:
    """C's escapes; another character stands for itself."""
    hexadecimal, unicode, octal, other = match.groups()
    if hexadecimal:
        return bytes((int(hexadecimal, 16),))
    if unicode:
        return chr(int(unicode, 16)).encode("utf-8", "surrogatepass")
    if octal:
        if int(octal, 8) > 255:
            raise place.error(f"\\{octal.decode()} is larger than a byte (\\377)")
        return bytes((int(octal, 8),))
    if other in b"xu89":
        raise place.error(
            r"after \ come two hexadecimal digits with x, four with u, or up to three octal digits"
        )
    return _BYTES[_ESCAPES.get(other[0], other[0])]


def _script_end(text: str, position: int, place: Place) -> int:
    """Where the ) is that matches the ( before `position`."""
    depth = 1
    for match in re.compile(r"[()]").finditer(text, position):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise place.error("the script has no end: ( and ) in it must be in matching pairs")


def _repeat(image: Image, times: int, place: Place) -> Image:
    try:
        return image.repeat(times)
    except ValueError as error:
        raise place.error(error) from None


def _cut(image: Image, start: int, end: int | None, clips: bool, place: Place) -> Image:
    if clips:
        start = min(start, image.size)
        end = image.size if end is None else min(end, image.size)
    elif end is None:
        end = image.size
    if not 0 <= start <= end <= image.size:
        raise place.error(f"the slice is not within the expression, whose size is {image.size}")
    return image.cut(start, end)


def _lay_out(steps: list[_Step], limit: int | None) -> Image:
    """Put the fields of a scope where they belong."""
    builder = Builder()
    for index, (how, what, place) in enumerate(steps):
        try:
            if isinstance(what, Image):
                builder.put(what)
            elif isinstance(what, Expression):
                wanted = None
                if limit is not None and index == len(steps) - 1:
                    wanted = max(limit - builder.offset, 0)  # nothing after it depends on its size
                builder.put(what.image(wanted))
            elif how == "@":
                builder.move(what)
            elif how == "@+":
                builder.move(builder.offset + what)
            elif how == "@^":
                builder.move((builder.offset + what - 1) & -what)
            elif what > builder.offset:
                raise place.error(f"goes back before the start: the offset is {builder.offset}")
            else:
                builder.move(builder.offset - what)
        except ValueError as error:
            raise place.error(error) from None
    return builder.finish()
