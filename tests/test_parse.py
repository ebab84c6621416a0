"""Texts to values: what nbdkit reads we read, to the same value, and what it refuses we refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from pynbdkit.parse import (
    MAX_SIZE,
    parse_bool,
    parse_delay,
    parse_int,
    parse_probability,
    parse_size,
    read_password,
)

T = TypeVar("T")


def words(text: str) -> list[str]:
    return text.split()


# -- sizes -----------------------------------------------------------------------------------------

SIZES = words("""
    0 1 512 1024 010 08 007K +1 +1K -0 -0K 1b 1B 1k 1K 1m 1M 1g 1G 1t 1T 1p 1P 1e 1E 1s 1S 7E 8E
    8191P 8192P 16777216T 9223372036854775807 9223372036854775808 18446744073709551616
    18014398509481983s 18014398509481984s K + - -1 -1K ++1 +-1 --1 0x10 0X10 0b1 1.5 1.5M 1,000
    1_000 1e3 1kk 1KB 1KiB 1Ki 1x 1Y 1Z 1w 1c 1d
""")
SIZES += [
    "",
    " ",
    " 1",
    "\t\n 1M",
    "\v1",
    "\f1",
    "\r1",
    "+ 1",
    "- 1",
    "1 ",
    "1K ",
    "1 K",
    "1\n",
    "1\vM",
]
SIZES += ["9" * 50, "0" * 50 + "7", "\u00a01", "\u0661", "\uff11"]
SIZES += ["1\u212a"]  # the Kelvin sign, whose lower case is k

SCRIPT = """
import json, sys, nbdkit
with open(TEXTS) as file:
    texts = json.load(file)
def size(text):
    try:
        return nbdkit.parse_size(text)
    except ValueError:
        return None
print("SIZES", json.dumps([size(text) for text in texts]))
def open(readonly): return 1
def get_size(h): return 0
def pread(h, buf, offset, flags): pass
"""


def nbdkit_sizes(texts: list[str]) -> list[int | None]:
    """What nbdkit's own parse_size makes of texts; None: refused."""
    with tempfile.TemporaryDirectory() as folder:
        file, script = Path(folder, "texts"), Path(folder, "script.py")
        file.write_text(json.dumps(texts))
        script.write_text(f"API_VERSION = 2\nTEXTS = {str(file)!r}\n{SCRIPT}")
        done = support.run("nbdkit", "python", script, "--dump-plugin")
    line = next(line for line in done.stdout.splitlines() if line.startswith("SIZES "))
    sizes: list[int | None] = json.loads(line[6:])
    return sizes


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """What it returns and "", or None and the message of its ValueError."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


def our_size(text: str) -> int | None:
    size, message = attempt(lambda: parse_size(text))
    assert size is not None or message.startswith("could not parse size: ")
    return size


def test_sizes_are_nbdkits() -> None:
    theirs = dict(zip(SIZES, nbdkit_sizes(SIZES), strict=True))
    assert {text: our_size(text) for text in SIZES} == theirs
    assert sum(size is not None for size in theirs.values()) >= 30


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text("0123456789+- \tbkmgtpesKMGTPESxX._", max_size=8), max_size=100))
def test_any_text_is_as_nbdkit_has_it(texts: list[str]) -> None:
    assert [our_size(text) for text in texts] == nbdkit_sizes(texts)


@given(st.integers(0, MAX_SIZE))
def test_any_number_of_bytes(number: int) -> None:
    assert parse_size(str(number)) == number


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-5", "'-5' is negative"),
        ("1Q", "unknown suffix 'Q'"),
        ("", "''"),
        ("8E", "larger than"),
    ],
)
def test_size_errors_say_why(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_size(text)


# -- integers --------------------------------------------------------------------------------------

INTEGERS = words("""
    0 1 10 010 0777 00 0x10 0X1f +1 +0x10 4294967295 4294967296 -1 08 0x 0xg 1_0 ++1 + x 0b1 0o7 1e3
    1.0 0x+1
""")
INTEGERS += ["", " ", " 1", "\t1", "1 ", "+ 1", "0x 1", "\uff11"]


@pytest.mark.parametrize("text", INTEGERS)
def test_integers_are_nbdkits(text: str) -> None:
    """As the limit filter reads its unsigned int: taken or refused."""
    command = [support.program("nbdkit"), "-U", "-", "--filter=limit", "null", f"limit={text}"]
    done = subprocess.run([*command, "--run", "true"], capture_output=True, check=False)
    number, message = attempt(lambda: parse_int("limit", text, 0, (1 << 32) - 1))
    assert (number is not None) == (done.returncode == 0), done.stderr
    assert number is not None or message.startswith("limit: ")


@given(st.integers(-(1 << 63), (1 << 64) - 1))
def test_any_integer_in_any_base(number: int) -> None:
    sign, digits = ("-", -number) if number < 0 else ("", number)
    for text in (
        f"{sign}{digits}",
        f"{sign}0x{digits:x}",
        f"{sign}0X{digits:X}",
        f"{sign}0{digits:o}",
    ):
        assert parse_int("number", text) == number


@given(st.integers(), st.integers(), st.integers())
def test_range(number: int, low: int, high: int) -> None:
    value, message = attempt(lambda: parse_int("number", str(number), low, high))
    assert value == (number if low <= number <= high else None)
    assert value is not None or "out of range" in message


def test_a_number_of_any_length_is_out_of_range() -> None:
    """Python refuses to convert more than 4300 digits, in its own words."""
    with pytest.raises(ValueError, match=r"^number: .* is out of range"):
        parse_int("number", "9" * 5000)
    with pytest.raises(ValueError, match="larger than"):
        parse_size("9" * 5000)


# -- booleans --------------------------------------------------------------------------------------

TRUE = words("1 true t yes y on TRUE True tRuE T Yes Y ON oN")
FALSE = words("0 false f no n off FALSE F No N OFF")
NEITHER = ["", " ", *words("2 -1 01 00 tr truee enable disabled nil"), " true", "true "]


@pytest.mark.parametrize("text", TRUE + FALSE + NEITHER)
def test_booleans_are_nbdkits(text: str) -> None:
    """As the delay filter reads delay-fast-zero."""
    words = ["-U", "-", "--filter=delay", "null", f"delay-fast-zero={text}", "--run", "true"]
    done = subprocess.run([support.program("nbdkit"), *words], capture_output=True, check=False)
    value, message = attempt(lambda: parse_bool(text))
    assert (value is not None) == (done.returncode == 0)
    assert value is (True if text in TRUE else False if text in FALSE else None)
    assert value is not None or repr(text) in message


# -- probabilities and delays ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0.0), ("1", 1.0), ("0.25", 0.25), (".5", 0.5), ("1.", 1.0), ("1e-3", 1e-3),
        ("-0", 0.0), ("0%", 0.0), ("50%", 0.5), ("12.5%", 0.125), ("100%", 1.0), (" 1 ", 1.0),
        ("1:4", 0.25), ("1/4", 0.25), ("0:1", 0.0), ("3:3", 1.0), ("1:1000000", 1e-6),
    ],
)  # fmt: skip
def test_probabilities(text: str, value: float) -> None:
    assert parse_probability("rate", text) == value


@pytest.mark.parametrize(
    "text",
    [
        *words("% x 1%% 2 101% -1 -1% 2:1 1:0 0:0 : 1: :1 1:2:3 1:50% nan inf -inf 1_0% 0x1 1e999"),
        *("", "50 %", "\uff11", "1e", "1:1e999"),
    ],
)
def test_no_probabilities(text: str) -> None:
    with pytest.raises(ValueError, match=r"^rate: .*probability"):
        parse_probability("rate", text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0.0), ("3", 3.0), ("0.5", 0.5), (" 3", 3.0), ("3s", 3.0), ("0x10", 16.0),
        ("010", 8.0), ("100ms", 0.1), ("0x10ms", 0.016), ("1.5ms", 0.0015), ("10us", 1e-5),
        ("10μs", 1e-5), ("5ns", 5e-9), ("2147483647", 2147483647.0), ("1e3", 1000.0),
        ("2147483648ms", 2147483.648),
    ],
)  # fmt: skip
def test_delays(text: str, value: float) -> None:
    assert parse_delay("rdelay", text) == value


@pytest.mark.parametrize(
    "text",
    [
        *words("ms s x -1 -1ms 1m 1h 1MS nan inf infs 1_0 2147483648 1e300 1msms"),
        *("", "1 ms2", "\uff11"),
    ],
)
def test_no_delays(text: str) -> None:
    """A bare m is refused, for nobody knows whether it is minutes."""
    with pytest.raises(ValueError, match=r"^rdelay: "):
        parse_delay("rdelay", text)


ANY: list[Callable[[str], object]] = [
    parse_size,
    lambda text: parse_int("x", text),
    parse_bool,
    lambda text: parse_probability("x", text),
    lambda text: parse_delay("x", text),
]


@given(st.text(), st.sampled_from(ANY))
def test_only_value_errors_in_one_line(text: str, parse: Callable[[str], object]) -> None:
    _, message = attempt(lambda: parse(text))
    assert "\n" not in message


# -- passwords -------------------------------------------------------------------------------------


def test_password_itself() -> None:
    assert read_password("secret") == "secret"
    assert read_password("") == ""


@pytest.mark.parametrize("content", ["secret\n", "secret", "secret\nmore\n"])
def test_password_from_a_file(tmp_path: Path, content: str) -> None:
    """Its first line."""
    file = tmp_path / "password"
    file.write_text(content)
    assert read_password(f"+{file}") == "secret"


def test_password_from_a_descriptor() -> None:
    """Read to the end of the line, and closed."""
    read, write = os.pipe()
    os.write(write, b"-secret\n")
    os.close(write)
    assert read_password(f"-{read}") == "-secret"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-0", "stdin, stdout or stderr"),
        ("-2", "stdin, stdout or stderr"),
        ("-x", "could not parse number"),
        ("-1000000", "Bad file descriptor"),
        ("+/nowhere/at/all", "No such file"),
    ],
)
def test_no_password(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_password(text)


def test_password_is_not_asked_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(ValueError, match="not a terminal"):
            read_password("-")
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(ValueError, match="not a terminal"):
            read_password("-")
