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
_TRUE = frozenset(("1", "true", "t", "yes", "y", "on"))
_FALSE = frozenset(("0", "false", "f", "no", "n", "off"))


def parse_size(text: str) -> int:
    """A size such as "100M" in bytes.

    Suffixes b, k, M, G, T, P, E (powers of 1024, any case) and s (512-byte sectors).
    """
    stripped = text.strip()
    digits = stripped.lstrip("+")
    split = len(digits)
    for index, character in enumerate(digits):
        if not ("0" <= character <= "9"):
            split = index
            break
    number, suffix = digits[:split], digits[split:]
    if not number:
        if digits.startswith("-"):
            raise ValueError(f"could not parse size: {text!r} is negative")
        raise ValueError(
            f"could not parse size: {text!r} (a number, then b, k, M, G, T, P, E or s)"
        )
    scale = _SUFFIXES.get(suffix.lower())
    if scale is None:
        raise ValueError(
            f"could not parse size: unknown suffix {suffix!r} (b, k, M, G, T, P, E, s)"
        )
    value = int(number) * scale
    if value > MAX_SIZE:
        raise ValueError(f"could not parse size: {text!r} is larger than 8E - 1")
    return value


def parse_int(what: str, text: str, low: int = -(1 << 63), high: int = (1 << 64) - 1) -> int:
    """A decimal, hexadecimal (0x…) or octal (0…) integer between `low` and `high`."""
    stripped = text.strip()
    sign = -1 if stripped.startswith("-") else 1
    digits = stripped.lstrip("+-") if stripped[:1] in "+-" else stripped
    try:
        if digits[:2].lower() == "0x":
            value = int(digits[2:], 16)
        elif len(digits) > 1 and digits[0] == "0":
            value = int(digits, 8)
        else:
            value = int(digits, 10)
        if "_" in digits or digits[:1] in "+-":
            raise ValueError
    except ValueError:
        raise ValueError(f"{what}: could not parse number: {text!r}") from None
    value *= sign
    if not low <= value <= high:
        raise ValueError(f"{what}: {text!r} is out of range ({low} to {high})")
    return value


def parse_bool(text: str) -> bool:
    """A boolean: 1, true, t, yes, y, on; 0, false, f, no, n, off; in any case."""
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError(f"could not decipher boolean {text!r} (true or false, yes or no, on or off)")


def parse_probability(what: str, text: str) -> float:
    """A probability: a percentage ("10%"), a ratio ("1:1000" or "1/1000") or a number from 0 to 1."""
    stripped = text.strip()
    try:
        if stripped.endswith("%"):
            value = float(stripped[:-1]) / 100
        elif ":" in stripped or "/" in stripped:
            left, _, right = stripped.partition(":" if ":" in stripped else "/")
            value = float(left) / float(right)
        else:
            value = float(stripped)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{what}: could not parse probability {text!r}") from None
    if not 0 <= value <= 1:
        raise ValueError(f"{what}: probability out of range: {text!r} (0 to 1, or 0% to 100%)")
    return value


def parse_delay(what: str, text: str) -> float:
    """A time in seconds: "3", "0.5", "100ms", "10us" (or "μs"), "5ns", "2s", "1m"."""
    stripped = text.strip()
    for suffix, scale in (
        ("ms", 1e-3),
        ("us", 1e-6),
        ("μs", 1e-6),
        ("ns", 1e-9),
        ("m", 60.0),
        ("s", 1.0),
        ("", 1.0),
    ):
        if stripped.endswith(suffix):
            try:
                value = float(stripped[: len(stripped) - len(suffix)]) * scale
            except ValueError:
                break
            if value < 0 or value != value or value == float("inf"):
                break
            return value
    raise ValueError(
        f"{what}: could not parse delay {text!r} (seconds, or a number with ms, us, ns)"
    )


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
