"""Texts from a command line to values: sizes, integers, booleans, probabilities, passwords.

The forms are those of nbdkit-plugin(3), "PARSING COMMAND LINE PARAMETERS". Every function raises
ValueError with one line that names the text and what would be right.
"""

from __future__ import annotations

MAX_SIZE = (1 << 63) - 1
_SUFFIXES = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "p": 1 << 50,
    "e": 1 << 60,
    "s": 512,
}
_DECIMAL = "0123456789"
_TRUE = frozenset(("1", "true", "t", "yes", "y", "on"))
_FALSE = frozenset(("0", "false", "f", "no", "n", "off"))


def parse_size(text: str) -> int:
    """A size such as "100M" in bytes.

    Suffixes b, k, M, G, T, P, E (powers of 1024, any case) and s (512-byte sectors).
    """
    sign, digits = _split_sign(text)
    split = len(digits) - len(digits.lstrip(_DECIMAL))
    number, suffix = digits[:split], digits[split:]
    if not number:
        raise ValueError(
            f"could not parse size: {text!r} (a number, then b, k, M, G, T, P, E or s)"
        )
    scale = _SUFFIXES.get(suffix.lower()) if suffix.isascii() else None
    if scale is None:
        raise ValueError(
            f"could not parse size: unknown suffix {suffix!r} (b, k, M, G, T, P, E, s)"
        )
    value = _decimal(number) * scale
    if sign == "-" and value:
        raise ValueError(f"could not parse size: {text!r} is negative")
    if value > MAX_SIZE:
        raise ValueError(f"could not parse size: {text!r} is larger than 8E - 1")
    return value


def parse_int(what: str, text: str, low: int = -(1 << 63), high: int = (1 << 64) - 1) -> int:
    """A decimal, hexadecimal (0x…) or octal (0…) integer between `low` and `high`."""
    sign, digits = _split_sign(text)
    if digits[:2] in ("0x", "0X"):
        digits, base, alphabet = digits[2:], 16, _DECIMAL + "abcdefABCDEF"
    elif len(digits) > 1 and digits[0] == "0":
        base, alphabet = 8, "01234567"
    else:
        base, alphabet = 10, _DECIMAL
    if not digits or digits.strip(alphabet):
        raise ValueError(f"{what}: could not parse number: {text!r}")
    value = _decimal(digits) if base == 10 else int(digits, base)
    if sign == "-":
        value = -value
    if not low <= value <= high:
        raise ValueError(f"{what}: {text!r} is out of range ({low} to {high})")
    return value


def _split_sign(text: str) -> tuple[str, str]:
    """The sign and what follows it; white space is skipped in front, as strtol(3) does."""
    stripped = text.lstrip(" \t\n\v\f\r")
    return (stripped[0], stripped[1:]) if stripped[:1] in ("+", "-") else ("", stripped)


def _decimal(digits: str) -> int:
    """Decimal digits to a number; where int() refuses for their count, one beyond every range."""
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) < 40 else 1 << 128


def _number(text: str) -> float | None:
    """A plain decimal such as "10", "0.5", ".5" or "1e-3"; None for all else that float() takes."""
    if not text or text.strip("+-.eE" + _DECIMAL):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value not in (float("inf"), float("-inf")) else None


def parse_bool(text: str) -> bool:
    """A boolean: 1, true, t, yes, y, on; 0, false, f, no, n, off; in any case."""
    lowered = text.lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError(f"could not decipher boolean {text!r} (true or false, yes or no, on or off)")


def parse_probability(what: str, text: str) -> float:
    """A probability: a percentage ("10%"), a ratio ("1:1000", "1/1000") or a number from 0 to 1."""
    stripped = text.strip()
    above, below = stripped, "1"
    if stripped.endswith("%"):
        above, below = stripped[:-1], "100"
    else:
        for colon in ":/":
            if colon in stripped:
                above, below = stripped.split(colon, 1)
                break
    numerator, denominator = _number(above), _number(below)
    if numerator is None or not denominator:
        raise ValueError(
            f"{what}: could not parse probability {text!r} (such as 10%, 1:1000 or 0.1)"
        )
    value = numerator / denominator
    if not 0 <= value <= 1:
        raise ValueError(f"{what}: probability out of range: {text!r} (0 to 1, or 0% to 100%)")
    return value


MAX_DELAY = (1 << 31) - 1


def parse_delay(what: str, text: str) -> float:
    """A time in seconds, at most 2**31 - 1 of them: "3", "0.5", "2s", "100ms", "10us", "5ns".

    A whole number may be hexadecimal or octal, as `parse_int` reads it.
    """
    stripped = text.strip()
    per_second = 1.0
    for suffix, each in (("ms", 1e3), ("us", 1e6), ("μs", 1e6), ("ns", 1e9), ("s", 1.0)):
        if stripped.endswith(suffix):
            stripped, per_second = stripped[: -len(suffix)], each
            break
    try:
        number: float | None = parse_int(what, stripped)
    except ValueError:
        number = _number(stripped)
    if number is None:
        raise ValueError(
            f"{what}: could not parse delay {text!r} (seconds, or a number with ms, us or ns)"
        )
    value = number / per_second
    if not 0 <= value <= MAX_DELAY:
        raise ValueError(f"{what}: delay out of range: {text!r} (0 to {MAX_DELAY} seconds)")
    return value


def read_password(text: str) -> str:
    """A password: the text itself, "-" (asked on the terminal), "+FILE", or "-FD".

    A password that begins with "-" or "+" has to come from a file (nbdkit-plugin(3), "Reading
    passwords"). Raises ValueError where nothing can be read.
    """
    import os

    if text == "-":
        import sys

        if not sys.stdin or not sys.stdin.isatty():
            raise ValueError("password=-: stdin is not a terminal; use password=+FILE")
        import getpass

        return getpass.getpass("password: ")
    if text.startswith("-"):
        fd = parse_int("password file descriptor", text[1:], 0, (1 << 31) - 1)
        if fd <= 2:
            raise ValueError("password=-FD: cannot be stdin, stdout or stderr (use 3 or higher)")
        try:
            with os.fdopen(fd, encoding="utf-8") as stream:
                return stream.readline().rstrip("\n")
        except OSError as error:
            raise ValueError(f"password={text}: {error.strerror}") from None
    if text.startswith("+"):
        try:
            with open(text[1:], encoding="utf-8") as stream:
                return stream.readline().rstrip("\n")
        except OSError as error:
            raise ValueError(f"password file {text[1:]!r}: {error.strerror}") from None
    return text
