"""The data format: against a model of its own, against nbdkit, and what it does with huge disks.

`Writer` makes a text and, at the same time, the bytes that it stands for, with nothing but
bytearrays. The same texts go to the installed nbdkit, so that the model is checked as well.
"""

from __future__ import annotations

import os
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import support
from pynbdkit.errors import ConfigError
from pynbdkit.plugins._data import Image, from_bytes, language, parse, source
from pynbdkit.sparse import SparseArray

MOST = 60000  # bytes of a generated disk: beyond the 32 KiB up to which images are flat


def content(image: Image) -> bytes:
    return bytes(image.read(image.size, 0))


def built(text: str, variables: Mapping[str, str] | None = None, **options: Any) -> bytes:
    return content(parse(text, (variables or {}).get, **options))


class Writer:
    """Draws a text and what it means."""

    def __init__(self, draw: Callable[..., Any], files: Mapping[str, bytes]) -> None:
        self.draw = draw
        self.files = files
        self.variables: dict[str, str] = {}

    def pick(self, low: int, high: int) -> int:
        value = self.draw(st.integers(low, high))
        assert isinstance(value, int)
        return value

    def number(self, value: int) -> str:
        return (str(value), f"0{value:o}", f"{value:#x}", f"0X{value:X}")[self.pick(0, 3)]

    def space(self) -> str:
        return (" ", "\n", " \t ", " # a ) comment ( \n", "\r\n ")[self.pick(0, 4)]

    def scope(self, depth: int, outer: Mapping[str, bytes]) -> tuple[str, bytes]:
        names = dict(outer)
        out = bytearray()
        offset = 0
        text = self.space() if self.pick(0, 1) else ""
        for _ in range(self.pick(0, 6)):
            kind = self.pick(0, 9)
            if kind < 6:
                field, written = self.expression(depth, names)
                if offset + len(written) > MOST:
                    continue
                out.extend(bytes(max(offset + len(written) - len(out), 0)))
                out[offset : offset + len(written)] = written
                offset += len(written)
            elif kind < 7:
                field, written = self.expression(depth, names)
                name = "ab-c_D9"[: self.pick(1, 7)]
                field += f"{self.space()}->{' ' * self.pick(0, 1)}\\{name}"
                names[name] = written
            else:
                field, offset = self.move(offset)
                out.extend(bytes(max(offset - len(out), 0)))
            text += field + self.space()
        return text, bytes(out)

    def move(self, offset: int) -> tuple[str, int]:
        how = ("@", "@+", "@-", "@^")[self.pick(0, 3)]
        if how == "@":
            to = self.pick(0, MOST if self.pick(0, 3) == 0 else 40)
            return how + self.number(to), to
        if how == "@^":
            power = 1 << self.pick(0, 9)
            return how + self.number(power), -(-offset // power) * power
        distance = self.pick(0, min(offset, 50) if how == "@-" else 50)
        return how + self.number(distance), offset + distance * (1 if how == "@+" else -1)

    def expression(self, depth: int, names: Mapping[str, bytes]) -> tuple[str, bytes]:
        text, written = self.primary(depth, names)
        for _ in range(self.pick(0, 2)):
            if self.pick(0, 1):
                times = self.pick(0, 5) if self.pick(0, 5) else self.pick(0, 40000)
                if len(written) * times > MOST:
                    continue
                text += f"{self.space()}*{self.number(times)}"
                written = bytes(written) * times
            else:
                start = self.pick(0, len(written))
                end = self.pick(start, len(written))
                left = self.number(start) if start or self.pick(0, 1) else ""
                right = self.number(end) if end < len(written) or self.pick(0, 1) else ""
                text += f"{self.space()}[{left}:{right}]"
                written = written[start:end]
        return text, written

    def primary(self, depth: int, names: Mapping[str, bytes]) -> tuple[str, bytes]:
        kind = self.pick(0, 9)
        if kind < 3:
            value = self.pick(0, 255)
            return self.number(value), bytes((value,))
        if kind == 3:
            size = (2, 4, 8)[self.pick(0, 2)]
            order = ("little", "big")[self.pick(0, 1)]
            value = self.pick(0, 256**size - 1)
            text = f"{order[0]}e{size * 8}:{self.number(value)} "
            return text, value.to_bytes(size, "little" if order == "little" else "big")
        if kind == 4:
            return self.string()
        if kind == 5 and names:
            name = sorted(names)[self.pick(0, len(names) - 1)]
            return f"\\{name}", names[name]
        if kind == 6:
            name = sorted(self.files)[self.pick(0, len(self.files) - 1)]
            return f"<{name} ", self.files[name]
        if kind == 7 and depth:
            inner, written = self.scope(depth - 1, names)
            name = f"v{len(self.variables)}"
            self.variables[name] = inner
            return f"${name}", written
        if kind == 8 and not self.pick(0, 9):
            return "<( printf '(%s)' x )", b"(x)"
        if depth:
            inner, written = self.scope(depth - 1, names)
            return f"({inner})", written
        return "()", b""

    def string(self) -> tuple[str, bytes]:
        plain = {"\\n": 10, "\\\\": 92, '\\"': 34, "\\t": 9, "\\x00": 0, "\\xfF": 255, "\\q": 113}
        text, written = "", b""
        for _ in range(self.pick(0, 6)):
            piece = (*plain, "a", "(", "#", "é", "\n")[self.pick(0, len(plain) + 4)]
            text += piece
            written += bytes((plain[piece],)) if piece in plain else piece.encode()
        return f'"{text}"', written


FILES = {"empty": b"", "abc": b"abcdefgh", "holes": b"x" + bytes(70000) + b"y" * 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that texts name."""
    folder = tmp_path_factory.mktemp("data")
    for name, text in FILES.items():
        (folder / name).write_bytes(text)
    (folder / "a-b,c(]").write_bytes(b"odd name")
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def check_data(image: Image, expected: bytes) -> None:
    rest = bytearray(expected)
    position = 0
    for first, last in image.data(0, image.size):
        assert position <= first < last <= image.size
        position = last
        rest[first:last] = bytes(last - first)
    assert not any(rest), "data in what is said to be a hole"


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_like_the_model(data: st.DataObject) -> None:
    writer = Writer(data.draw, {name: FILES[name] for name in ("empty", "abc")})
    text, expected = writer.scope(3, {})
    image = parse(text, writer.variables.get)
    assert image.size == len(expected)
    assert content(image) == expected
    start = data.draw(st.integers(0, len(expected)), label="start")
    end = data.draw(st.integers(start, len(expected)), label="end")
    assert bytes(image.read(end - start, start)) == expected[start:end]
    assert content(image.cut(start, end)) == expected[start:end]
    check_data(image, expected)
    size = data.draw(st.integers(0, 2 * MOST), label="size")
    assert content(image.resize(size)) == expected[:size].ljust(size, b"\0")


# -- nbdkit -----------------------------------------------------------------------------------


def peer(text: str, parameters: Mapping[str, str]) -> bytes:
    """What nbdkit serves for a text."""
    run = [support.program("nbdkit"), "-U", "-", "--run", 'nbdcopy -- "$uri" - | cat']
    run += ["data", f"data={text}", *(f"{key}={value}" for key, value in parameters.items())]
    done = subprocess.run(
        run, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


SAME = r"""
1 255 017 0xff 0XFF 0
"a""b"1(2)"c"<abc
1be16:2 1*2le16:3 @9be32:4
0 1 2 3 @0x1fe 0x55 0xaa
0 1 2 3 @^0x200 @-2 le16:0xaa55
@0x1be 0 0 2 0 0x83 0x20 0x20 0 le32:1 le32:0x7ff @0x1fe 0x55 0xaa
( 0x55 0xAA )*2048
( "Hello" )*2000
( "Hello" )[:3]*2
<abc @^512 <empty @^512 <abc @^512
</dev/zero[:512]*16
</dev/zero[2:5] 1
<abc
(<abc)
<abc[1:3]
<abc [1:3] *2
<abc*2[1:9]
<abc[:9]
(<abc)[:9]
<abc[8:]
<abc[9:]
<abc[:4][:2]
<holes[70000:]
<holes*3
<holes -> \a \a[69999:] \a
<a-b,c(] 5
<( i=0; while [ $i -lt 300 ]; do printf "%04d" $i; i=$((i+1)); done )
<( i=0; while :; do printf "%04d" $i; i=$((i+1)); done )[:3276]
<(yes)[:5]*2
(<(yes))[:5]
<(yes | head -c 3)[:5]
<(printf abcdef; exit 3)[:3]
<(printf '(a)') <((printf b); (printf c))
<(exec 1>&-) 1
<(cat) 1
"\n\t\r\a\b\f\v\\\"\'\?"
"\xAf\x00a\x414\q\e\N\ "
"é" "#(" (")")
( "\")" )
le16:1 be16:0x1234 le16:65535 le32:0xffffffff be32:1 le64:18446744073709551615 be64:010 le16:+1
(le16:1 )*2
1*3 1 * 3 1*0x10 1*010 1*0
1*3"a"
1*2*3 (1 2)*2[1:3] (1 2)[1:2]*4 1*2[1:]*3
(1 2)[:] (1 2)[0:] (1 2)[2:] (1 2)[1:1] (1 2) [1:2] (1 2)[0x1:02]
1 2[1:] 3
()*3 (())*3 (1*0)*5 2
@5
@5 @0
1 @+5 2
1 @-1 2
1 @^4 2 @^1 3 @^ 4
@+ 5 1 @- 1 2
@010 1 @0x10 2
@5@3 1
@5"a"@+2(1)
1@5
(@5)*3
(@4 1)*3 (1 @4)*3
(1 2 @0) 3
(1 2 @10 @0) 3
(1 2 @1)*2
@10 @0 1
1 2 3 @1 (4)*1
(1 2 3)*2 @2 9
1*5 @0 2 @0 @^4 3
(1 2) @-1 (3 4)
9*5 @0 (@4 1)
9*10 @0 (@3) -> \a \a
9*10 @0 (@2 0 @5)*2
9*10 @1 0 0
9*40000 @0 (@40000) @0 1
9*40000 @1 (@39998 1)
9*100000 @50000 (@10 1)*1000 @99990 (2 @40)
0*100000 @+100000 1 (0 0)*20000
# nothing but a comment
1 # one (
1#(
1 -> \a \a \a
1->\a \a
1 -> \a
1 2 -> \a \a 3
(1 2) -> \a \a*2 \a[1:]
1*3 -> \a \a
(1 2)[1:] -> \a \a
1 -> \a 2 -> \a \a
1 -> \a ( 2 -> \a \a ) \a
1 -> \a (\a 2 -> \a \a) \a
1 -> \a (\a \a) -> \b 2 -> \a \b \a
1 -> \a \a -> \a \a
1 -> \a-b_C9 \a-b_C9 2 -> \- \- 3 -> \_ \_ 4 -> \9 \9
(@5) -> \a 1 \a
<abc -> \x \x*2[1:3]
<nofile -> \a 1
"a" -> \a ("b" \a)*3
1 2 -> \a 3 \a (\a \a)*2 -> \b \b
( 0x55 0xAA ) -> \boot-signature ( @0x1fe \boot-signature ) -> \sector \sector \sector
$one $two $one*2 $two[1:]
$nested*2
(1 -> \a $uses)
$one -> \a \a \a
$empty 1
$comment 1
$HOME_OF_DATA
$one$two
"""

VARIABLES = {
    "one": "1 2",
    "two": "0x55 0xAA",
    "nested": "$one (3 $two)*2",
    "uses": r"\a 2 -> \a \a",
    "empty": "",
    "comment": "7 # foo",
    "HOME_OF_DATA": "5*5",
}


@pytest.fixture(scope="module")
def served(folder: Path) -> dict[str, bytes]:
    """What nbdkit makes of every line of SAME, a few at a time."""
    support.program("nbdkit")
    texts = [line for line in SAME.splitlines() if line]
    before = os.getcwd()
    os.chdir(folder)
    try:
        with ThreadPoolExecutor(4) as pool:
            return dict(
                zip(texts, pool.map(lambda text: peer(text, VARIABLES), texts), strict=True)
            )
    finally:
        os.chdir(before)


@pytest.mark.parametrize("text", [line for line in SAME.splitlines() if line])
def test_same_bytes_as_nbdkit(text: str, served: dict[str, bytes]) -> None:
    assert built(text, VARIABLES) == served[text]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_nbdkit_agrees_with_the_model(data: st.DataObject) -> None:
    writer = Writer(data.draw, {name: FILES[name] for name in ("empty", "abc")})
    text, expected = writer.scope(3, {})
    assert peer(text, writer.variables) == expected


# -- what nbdkit cannot do, or does by accident -----------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'"\0\101\7\1234"', b"\0A\x07S4"),
        (r'"\u00e9"', "é".encode()),
        ("(le16:1)*2 le16:1*2", b"\1\0" * 4),
        ('le16:1"a"', b"\1\0a"),
        ("(1 2)[ 1 : 2 ]", b"\2"),
        ("@ 3 1", b"\0\0\0\1"),
        ("<(yes)[1:5]", b"\ny\ny"),
        ("(1 </dev/zero)[:5]", b"\1\0\0\0\0"),
        (r"<(yes) -> \a (5 \a)[:3] \a[:2]", b"\5y\ny\n"),
        ("(<(yes)*2)[1:4]", b"\ny\n"),
        ("(<(yes)[1:])[:3]", b"\ny\n"),
        (r"(<(yes) -> \a \a)[:3]", b"y\ny"),
        (r"<(yes) -> \a \a[:2] \a[:5]", b"y\ny\ny\ny"),
        ("</dev/zero*0 <(yes)*0", b""),
        ("<(readlink /proc/self/fd/0)", b"/dev/null\n"),
        ("(@2 <(yes))[:1]", b"\0"),
        ("<abc[1:100]", b"bcdefgh"),
        ("<(printf abc)[5:]", b""),
        ("</proc/self/stat[:1]", None),
    ],
)
def test_more_than_nbdkit(text: str, expected: bytes | None) -> None:
    if expected is None:
        expected = str(os.getpid())[:1].encode()
    assert built(text) == expected


def test_a_limit_cuts_an_endless_source() -> None:
    image = parse('"a" <(yes)', limit=5)
    assert content(image.resize(5)) == b"ay\ny\n"


def test_bytes_of_the_command_line_stay_what_they_are() -> None:
    assert built(os.fsdecode(b'"\xff\xc3\xa9"')) == b"\xff\xc3\xa9"


MISTAKES = [
    ("256", 0, "0 to 255"),
    ("1 0x100", 2, "0 to 255"),
    ("-1", 0, "0 to 255"),
    ("08", 0, "octal: write 8"),
    ("0x", 0, "hexadecimal digits"),
    ("1x", 0, "must end"),
    ("1K", 0, "no suffix"),
    ("1 2,3", 3, "no field begins"),
    ("]", 0, "no field begins"),
    ("1\xa02", 1, "no field begins"),
    ("@1T 1", 0, "without a suffix"),
    ("@", 0, "@OFFSET"),
    ("@+1K", 0, "without a suffix"),
    ("@+-1", 0, "must not be negative"),
    ("1 @-2 2", 2, "goes back before the start: the offset is 1"),
    ("(1 2) (@-1)", 7, "goes back before the start: the offset is 0"),
    ("<abc @-9", 5, "goes back before the start: the offset is 8"),
    ("@^0", 0, "power of 2"),
    ("1 @^3 2", 2, "power of 2"),
    ("@9223372036854775808", 0, r"larger than 2\*\*63 - 1"),
    ("@" + "9" * 5000, 0, r"larger than 2\*\*63 - 1"),
    ("@9223372036854775807 1", 21, r"larger than 2\*\*63 - 1"),
    ("@9223372036854775807 <abc", 21, r"larger than 2\*\*63 - 1"),
    ("@0x7fffffffffffffff @^2", 20, r"larger than 2\*\*63 - 1"),
    ("@0x7fffffffffffffff @+1", 20, r"larger than 2\*\*63 - 1"),
    ("(1 @1000)*10000000000000000", 9, r"larger than 2\*\*63 - 1"),
    ("1*3x", 1, "how many times"),
    ("1**2", 1, "how many times"),
    ("1*-1", 1, "must not be negative"),
    ("*2", 0, r"\*N must follow what writes bytes"),
    ("1 @5*2", 4, r"\*N must follow what writes bytes"),
    (r"1 -> \a*2", 7, r"\*N must follow what writes bytes"),
    ("(*2)", 1, r"\*N must follow what writes bytes"),
    ("[1:2]", 0, r"\[N:M\] must follow what writes bytes"),
    (r"-> \a", 0, r"-> \\NAME must follow what writes bytes"),
    ("(1 2)[3:]", 5, "not within the expression, whose size is 2"),
    ("(1 2)[:3]", 5, "not within the expression, whose size is 2"),
    ("(1 2)[2:1]", 5, "ends before it starts"),
    ("<abc[2:1]", 4, "ends before it starts"),
    ("(<abc 1)[:10]", 8, "not within the expression, whose size is 9"),
    ("(1 2)[1]", 5, r"expected a slice"),
    ("(1 2)[-1:]", 5, r"expected a slice"),
    ("(1 2", 0, r"unmatched '\('"),
    ("1 ((2)", 2, r"unmatched '\('"),
    ("1 2)", 3, r"unmatched '\)'"),
    ('1 "abc', 2, 'another "'),
    (r'"\x4"', 0, "two hexadecimal digits"),
    (r'"\u12"', 0, "four with u"),
    (r'"\9"', 0, "octal digits"),
    (r'"\400"', 0, "larger than a byte"),
    ("le16:65536", 0, "does not fit in 16 bits"),
    ("be64:18446744073709551616", 0, "does not fit in 64 bits"),
    ("le16:-1", 0, "must not be negative"),
    ("le16: 1", 0, "right after the colon"),
    ("le16:08", 0, "octal: write 8"),
    ("le8:1", 0, 'expected "le16:"'),
    ("1 -> a", 2, r"expected -> \\NAME"),
    ("\\", 0, r"expected \\NAME"),
    (r"\a", 0, "not defined here"),
    (r"( 1 -> \a ) \a", 12, "not defined here"),
    (r"\a -> \a", 0, "not defined here"),
    ("$nothing", 0, "is not set"),
    ("${one}", 0, "without braces"),
    ("$1", 0, "expected [$]NAME"),
    ("$loop", 0, "[$]loop contains itself"),
    ("1 <nofile", 2, "nofile: No such file or directory"),
    ("1 <.", 2, "Is a directory"),
    ("< abc", 0, "expected <FILE"),
    ("1 <(exit 3)", 2, "failed with exit status 3"),
    ("1 <(printf abc; exit 3)[:9]", 2, "failed with exit status 3"),
    ("<(kill -9 $$)", 0, "killed by signal 9"),
    ("<()", 0, "expected a script"),
    ("<(printf '('", 0, "matching pairs"),
]


@pytest.mark.parametrize(("text", "offset", "message"), MISTAKES, ids=[m[0][:24] for m in MISTAKES])
def test_a_mistake_is_named_with_its_place(text: str, offset: int, message: str) -> None:
    variables = {"loop": "1 $again", "again": "$loop"}
    with pytest.raises(ConfigError, match=message) as raised:
        built(text, variables)
    said = str(raised.value)
    assert "\n" not in said
    if "$loop" in text:
        assert said.startswith("$again: offset 0, at '$loop'")
    else:
        assert said.startswith(f"data: offset {offset}")


def test_a_mistake_in_several_lines_or_a_variable_is_found() -> None:
    with pytest.raises(ConfigError, match=r"^data: offset 6 \(line 3, column 2\), at '256': "):
        built("1\n 2\n 256\n3")
    with pytest.raises(ConfigError, match=r"^\$x: offset 2, at 'y': "):
        built("1 $x", {"x": "1 y"})


# -- huge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size", "samples"),
    [
        ("@0x10000000000 1", 2**40 + 1, {2**40: b"\1", 0: b"\0\0"}),
        ("@9223372036854775806 1", 2**63 - 1, {2**63 - 2: b"\1"}),
        ("1*1000000000000", 10**12, {0: b"\1\1", 10**12 - 2: b"\1\1"}),
        ("0*1000000000000 5", 10**12 + 1, {10**12 - 1: b"\0\5"}),
        ("(0x55 0xAA)*1000000000", 2 * 10**9, {10**9 + 1: b"\xaa\x55\xaa"}),
        ("((1 @1000)*1000000 2)*1000000000", 10**18 + 10**9, {(10**9 + 1) * 7 - 1: b"\2\1\0"}),
        ("1*1000000000000 @5 2 @500000000000 3", 10**12, {4: b"\1\2\1", 5 * 10**11: b"\3\1"}),
        ("(1*1000000000000 @5 2)*1000", 10**15, {10**12 * 7 + 4: b"\1\2\1"}),
        ("(1 2 3)*1000000000000[4:]", 3 * 10**12 - 4, {0: b"\2\3\1", 2**33: b"\1\2\3"}),
        ("((1 @32768)*1000000000 @^65536)*5", 5 * 32768 * 10**9, {4 * 32768 * 10**9: b"\1\0"}),
        ("<abc*1000000000000", 8 * 10**12, {8 * 10**11 + 6: b"ghab"}),
        (
            r'"0123456789abcdef"->\x ' + r"(\x \x \x \x)->\x " * 20 + r"\x",
            2**44,
            {2**44 - 17: b"f0123456789abcdef"},
        ),
    ],
)
def test_huge_disks_are_quick_and_small(text: str, size: int, samples: dict[int, bytes]) -> None:
    tracemalloc.start()
    begin = time.monotonic()
    try:
        image = parse(text)
        assert image.size == size
        for offset, expected in samples.items():
            count = min(262144, size - offset)
            assert bytes(image.read(count, offset)[: len(expected)]) == expected
        array = SparseArray(size, image)
        extents = array.extents(size, 0)
        first = next(extents)
        assert first[0] == 0
        array.write(b"new", size // 2)
        assert bytes(array.read(3, size // 2)) == b"new"
        array.zero(size, 0)
        assert list(array.extents(size, 0)) == [(0, size, 3)]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begin < 5


@settings(max_examples=100, deadline=None)
@given(
    pattern=st.binary(min_size=1, max_size=40) | st.binary(min_size=5000, max_size=5003),
    inner=st.integers(1, 3000),
    outer=st.integers(1, 20),
    data=st.data(),
)
def test_repetitions_of_repetitions(
    pattern: bytes, inner: int, outer: int, data: st.DataObject
) -> None:
    """Larger than what is flattened, cut in the middle of a period, and repeated again."""
    inner = max(min(inner, 100000 // len(pattern)), 33000 // len(pattern))
    expected = pattern * inner
    image = from_bytes(pattern).repeat(inner)
    for _ in range(2):
        start = data.draw(st.integers(0, len(expected)))
        end = data.draw(st.integers(start, len(expected)))
        image, expected = image.cut(start, end).repeat(outer), expected[start:end] * outer
        outer = 2
    assert content(image) == expected
    start = data.draw(st.integers(0, len(expected)))
    assert bytes(image.read(len(expected) - start, start)) == expected[start:]


@settings(max_examples=60, deadline=None)
@given(
    lead=st.integers(0, 70000),
    bytes_between=st.integers(1, 40000),
    trail=st.integers(0, 70000),
    data=st.data(),
)
def test_holes_of_cut_repetitions(
    lead: int, bytes_between: int, trail: int, data: st.DataObject
) -> None:
    image = parse(f"(@{lead} 1*{bytes_between} @+{trail})*3")
    expected = (bytes(lead) + b"\1" * bytes_between + bytes(trail)) * 3
    start = data.draw(st.integers(0, len(expected)))
    end = data.draw(st.integers(start, len(expected)))
    image, expected = image.cut(start, end).repeat(2), expected[start:end] * 2
    assert content(image) == expected
    check_data(image, expected)


def test_holes_at_the_ends_of_a_period_are_one() -> None:
    image = parse("(@40000 1*60000 @+40000)*1000")
    holes, position = [], 0
    for first, last in image.data(0, image.size):
        holes.append(first - position)
        position = last
    assert holes == [40000, *[80000] * 999]


def test_endless_data_between_holes_too_short_to_tell_is_one_extent() -> None:
    image = parse("(1*40000 @+32767)*1000000000000")
    assert list(image.data(0, image.size)) == [(0, image.size - 32767)]
    extents = SparseArray(image.size, image).extents(image.size, 0)
    offset, length, kind = next(extents)
    assert (offset, kind) == (0, 0)
    assert length >= image.size - 32768


def test_holes_of_a_repetition_are_told_one_by_one() -> None:
    extents = SparseArray(10**15, parse("(1 @0x100000)*1000000000")).extents(10**15, 0)
    assert next(extents) == (0, 32768, 0)
    assert next(extents) == (32768, 1048576 - 32768, 3)
    assert next(extents) == (1048576, 32768, 0)


def test_deep_nesting_is_an_error_or_works() -> None:
    assert built("(" * 20000 + "1" + ")" * 20000) == b"\1"
    assert built("(" * 5000 + "1" + " 2)" * 5000) == b"\1" + b"\2" * 5000
    chain = r'"x"*40000->\a ' + r"(\a 1)->\a " * 3000 + r"\a"
    assert built(chain) == b"x" * 40000 + b"\1" * 3000
    deeper = [rf"((\a 2)*2)[1:{size + 3}]->\a " for size in range(40000, 40400, 2)]
    for text in (
        "".join((r"1*40000->\a ", *deeper, r"\a")),
        r"<abc -> \a " + r"(\a 1)->\a " * 200 + r"\a",
        "(" * 200 + "<abc" + " 2)" * 200,
    ):
        with pytest.raises(ConfigError, match="more than 100 deep"):
            built(text)
    with pytest.raises(ConfigError, match="more than 100 deep"):
        built("$v0", {f"v{index}": f"1 $v{index + 1}" for index in range(200)})


def test_variables_that_multiply_are_read_once_or_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "_FIELDS", 5000)
    laughs = {f"v{index}": f"$v{index + 1} $v{index + 1}" for index in range(40)} | {"v40": "1"}
    assert parse("$v0", laughs.get).size == 2**40
    open_ones = {f"v{index}": rf"$v{index + 1} $v{index + 1}" for index in range(40)}
    open_ones["v40"] = r"\a"
    with pytest.raises(ConfigError, match="more than 5000 fields"):
        parse(r"1 -> \a $v0", open_ones.get)


def test_a_variable_that_uses_an_outer_name_is_read_in_every_scope() -> None:
    assert built(r"1 -> \a ($x) (2 -> \a $x) $x", {"x": r"\a"}) == b"\1\2\1"
    assert built(r"1 -> \a $y 2 -> \a $y", {"x": r"\a", "y": "$x"}) == b"\1\2"


# -- sources --------------------------------------------------------------------------------------


def test_a_source_without_an_end_says_how_to_cut_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_ENDLESS", 1 << 22)
    for text in ("</dev/zero", "</dev/zero[5:]", "<(yes)", "(<(yes) @0 1)[:5]"):
        with pytest.raises(ConfigError, match=r"no end after .*\[:LENGTH\]"):
            built(text)
    assert parse("</dev/zero[:8388608]").size == 1 << 23


def test_what_files_may_fill_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "room_for_sources", lambda: 20)
    assert built("<abc <abc") == b"abcdefgh" * 2
    with pytest.raises(ConfigError, match="memory"):
        built("<abc <abc <abc")


def test_a_sparse_file_stays_sparse(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.seek(1 << 40)
        file.write(b"end")
        file.truncate((1 << 40) + (1 << 39))
    begin = time.monotonic()
    image = parse(f"<{path} 5")
    assert image.size == (1 << 40) + (1 << 39) + 1
    assert bytes(image.read(3, 1 << 40)) == b"end"
    assert bytes(image.read(1, image.size - 1)) == b"\5"
    assert parse(f"<{path}[:1099511627777]").size == (1 << 40) + 1
    assert built(f"<{path}[:1000]") == bytes(1000)
    assert time.monotonic() - begin < 5


def test_a_script_that_is_cut_leaves_nothing_running(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    try:
        text = f"<( exec 9>{fifo}; trap '' PIPE; while :; do printf a; done | cat )[:5]"
        assert built(text) == b"aaaaa"
        assert os.read(reader, 1) == b""  # end of file: whoever held it open is gone
    finally:
        os.close(reader)


def test_an_unused_script_is_not_run(tmp_path: Path) -> None:
    assert built(rf"<(touch {tmp_path}/ran) -> \a 1") == b"\1"
    assert not (tmp_path / "ran").exists()


def test_a_script_used_twice_is_run_once(tmp_path: Path) -> None:
    assert built(rf"<(echo >> {tmp_path}/ran; echo x) -> \a \a \a*2") == b"x\n" * 3
    assert (tmp_path / "ran").read_text() == "\n"


def test_zeros_in_bytes_are_holes() -> None:
    image = from_bytes(b"x" + bytes(100000) + b"y")
    assert content(image) == b"x" + bytes(100000) + b"y"
    assert sum(last - first for first, last in image.data(0, image.size)) < 70000
    assert list(parse("0*100000").data(0, 100000)) == []
