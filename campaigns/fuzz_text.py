"""Fuzzing of what is parsed once: payloads, URIs, words of a command line, files of keys, data.

What all have in common: a mistake is one kind of exception, whose text is one line; nothing else is
ever raised; and what is understood is within the limits that the function promises.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from fuzz_base import Target, check, havoc

from pynbdkit import parse
from pynbdkit.cli import options as command_line
from pynbdkit.client.uri import UriError, parse_uri
from pynbdkit.errors import ConfigError
from pynbdkit.plugins._data import language
from pynbdkit.plugins._data.image import Bytes, Image
from pynbdkit.protocol import options as payloads
from pynbdkit.protocol.errors import HandshakeError
from pynbdkit.tls import LONGEST_KEY, read_keys


def one_line(message: str, what: str) -> None:
    """A message has to be one line, and to say something."""
    check(message and "\n" not in message and "\r" not in message, f"{what}: {message!r}")


class Payloads(Target):
    """What options and their replies carry: what is decoded can be encoded to the same bytes."""

    name = "payloads"
    modules = ("pynbdkit.protocol.options",)
    share = 2.0

    def one(self, data: bytes) -> None:
        """Decode."""
        data = data or b"\0"
        kind, body = data[0] % 8, data[1:]
        try:
            if kind == 0:
                query = payloads.decode_export_query(body)
                check(payloads.encode_export_query(query) == body, "another export query")
            elif kind == 1:
                contexts = payloads.decode_context_query(body)
                check(payloads.encode_context_query(contexts) == body, "another context query")
                known = ("base:allocation", "x:y", "x:z")
                for wild in (True, False):
                    found = payloads.match_contexts(known, contexts.queries, wildcards=wild)
                    check({*found} <= {*known} and len({*found}) == len(found), f"{found}")
                    for name in found:
                        near = name in contexts.queries or name.split(":")[0] + ":"
                        check(near is True or (wild and near in contexts.queries), name)
            elif kind == 2:
                name, text = payloads.decode_server(body)
                check(text.isprintable(), "control characters reach the terminal")
                check(payloads.encode_server(name, "")[4:] == name.encode(), "another name")
            elif kind == 3:
                info, rest = payloads.decode_info(body)
                check(info.to_bytes(2, "big") + rest == body, "another info")
            elif kind == 4:
                size, flags = payloads.decode_info_export(body)
                check(payloads.encode_info_export(size, flags)[2:] == body, "another export info")
            elif kind == 5:
                sizes = payloads.decode_info_block_size(body)
                check(payloads.encode_info_block_size(sizes)[2:] == body, "other block sizes")
                minimum, preferred, maximum = sizes
                check(0 < minimum <= preferred and minimum <= min(65536, maximum), f"{sizes}")
                check(minimum & (minimum - 1) == preferred & (preferred - 1) == 0, f"{sizes}")
            elif kind == 6:
                number, name = payloads.decode_context(body)
                check(payloads.encode_context(number, name) == body, "another context")
            else:
                text = payloads.decode_display(body)
                check(text.isprintable(), "control characters reach the terminal")
                again = payloads.encode_display(text)
                check(len(again) <= 4096 and 0 not in again, "a text that cannot be sent")
                again.decode()
        except HandshakeError as error:
            check(error.code & 1 << 31, "no error's code")
            one_line(error.message, "message")


class Texts(Target):
    """A text to a value."""

    text = True
    words: Sequence[bytes] = ()

    def one(self, data: bytes) -> None:
        """Parse the text."""
        self.read(data.decode("utf-8", "surrogateescape"))

    def read(self, text: str) -> None:
        """Parse the text."""
        raise NotImplementedError

    def mutate(self, data: bytes, random: Random) -> bytes:
        """Another text, which may have known words in it."""
        return havoc(data, random, self.words)


class Uris(Texts):
    """NBD URIs: what is understood is understood in the same way when it is written again."""

    name = "uri"
    modules = ("pynbdkit.client.uri",)
    share = 2.0
    words = (
        *(b"nbd://", b"nbds://", b"nbd+unix:///", b"nbds+unix:///", b"?socket=", b"%00", b"%2f"),
        *(b"[::1]", b":10809", b"@", b"/", b"#", b"?", b"&", b"=", b"&tls-certificates="),
        *(b"&tls-psk-file=", b"&tls-hostname=", b"&tls-verify-peer=", b"&tls-type=psk", b"x-a=b"),
    )

    def read(self, text: str) -> None:
        """Parse, write, parse."""
        try:
            uri = parse_uri(text)
        except UriError as error:
            if text.isprintable():
                one_line(str(error), "UriError")
            return
        check(uri.socket is None or uri.socket, "a socket without a path")
        check(0 <= uri.port <= 65535, f"port {uri.port}")
        check(uri.host, "no host")
        again = str(uri)
        check(parse_uri(again) == uri, f"{uri} is written {again}")


class Words(Texts):
    """Numbers, sizes, booleans, times: the values of parameters."""

    name = "words"
    modules = ("pynbdkit.parse",)
    share = 2.0
    words = (
        *(b"0x", b"1:", b"/", b"%", b"ms", b"us", b"ns", b"s", b"1e", b"-", b"+", b" ", b"E", b"k"),
        *(b"true", b"off", b"9223372036854775807", b"18446744073709551615", b".5", b"\xc2\xb5s"),
    )

    def read(self, text: str) -> None:
        """Parse it in every way."""
        found = self._try(parse.parse_size, text)
        check(found is None or 0 <= found < 1 << 63, f"size {found}")
        if text.isascii() and text.isdigit() and len(text) < 30:
            check(found == (int(text) if int(text) < 1 << 63 else None), f"size {found}")
        found = self._try(parse.parse_int, "x", text)
        check(found is None or -(1 << 63) <= found < 1 << 64, f"number {found}")
        found = self._try(parse.parse_int, "x", text, -5, 70)
        check(found is None or -5 <= found <= 70, f"number {found}")
        found = self._try(parse.parse_bool, text)
        check(found in (None, True, False), f"boolean {found}")
        found = self._try(parse.parse_probability, "x", text)
        check(found is None or 0 <= found <= 1, f"probability {found}")
        found = self._try(parse.parse_delay, "x", text)
        check(found is None or 0 <= found <= parse.MAX_DELAY, f"delay {found}")

    @staticmethod
    def _try(function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(*arguments)
        except ValueError as error:
            check(type(error) is ValueError, f"{function.__name__}: {error!r}")
            one_line(str(error), function.__name__)
            return None


class CommandLine(Texts):
    """The server's command line, as words between NUL characters."""

    name = "command-line"
    modules = ("pynbdkit.cli.options",)
    share = 2.0
    words = (
        *(name.encode() for option in command_line.OPTIONS for name in option.names),
        *(b"\0", b"\0--", b"\0-", b"=", b"\0memory\0", b"1M", b"require", b"--tls=", b"--log="),
    )

    def read(self, text: str) -> None:
        """Parse the words."""
        words = text.split("\0")
        try:
            found = command_line.parse(words)
        except command_line.UsageError as error:
            if text.replace("\0", "").isprintable():
                one_line(str(error), "UsageError")
            return
        keys = {option.key: option for option in command_line.OPTIONS}
        for key, value in found.options.items():
            option = keys[key]
            wanted = list if key in command_line.REPEATED else str if option.metavar else bool
            check(type(value) is wanted, f"{key} is {value!r}")
        check(found.tls in (None, "off", "on", "require"), f"tls is {found.tls!r}")
        left = iter(words)
        taken = [found.plugin, *found.parameters] if found.plugin is not None else []
        check(all(word in left for word in taken), f"{taken} are not the words, or not in order")


class Keys(Texts):
    """Files of pre-shared keys. No part of a key gets into a message."""

    name = "keys"
    modules = ("pynbdkit.tls",)
    share = 1.0
    words = (
        b"alice:",
        b"00112233445566778899aabbccddeeff",
        b"\n",
        b":",
        b"ff" * 200,
        b"\xff",
        b"\r",
    )

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="keys-", buffering=0)  # noqa: SIM115

    def one(self, data: bytes) -> None:
        """Read a file of these bytes."""
        fd = self._file.fileno()
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        try:
            keys = read_keys(self._file.name)
        except ConfigError as error:
            message = str(error).replace(self._file.name, "FILE")
            for line in data.decode("utf-8", "replace").splitlines():
                digits = line.strip().rpartition(":")[2]
                check(len(digits) < 12 or digits not in message, f"a key in {message!r}")
            one_line(message, "ConfigError")
            return
        check(keys, "no keys, and no error")
        for user, key in keys.items():
            check(user and 0 < len(key) <= LONGEST_KEY, f"user {user!r} with {len(key)} bytes")


class Data(Texts):
    """The data plugin's format. Files and scripts are made believe: nothing is run."""

    name = "data"
    modules = ("pynbdkit.plugins._data.language", "pynbdkit.plugins._data.image")
    share = 1.5
    words = (
        *(
            b"(",
            b")",
            b"*",
            b"[",
            b"]",
            b":",
            b"@",
            b"@+",
            b"@-",
            b"@^",
            b"$x",
            b"$y",
            b"\\x",
            b"->",
        ),
        *(b" 1 ", b" 255 ", b'"abc"', b"0x1", b"<file", b"<(echo)", b" le64:", b" be16:", b"#\n"),
        *(b"*1000 ", b"[1:3]", b"9223372036854775807", b" nop ", b"\n", b"'", b"\\"),
    )

    def read(self, text: str) -> None:
        """Parse it, and look at the ends of what it is."""
        variables = {"x": "1 2 @8 3", "y": "($x)*3", "z": "$z"}
        module: Any = language
        before = module.load_file, module.load_script
        module.load_file = module.load_script = self._load
        try:
            for limit in (None, 1000):
                self._look(language.parse(text, variables.get, limit=limit))
        except ConfigError as error:
            one_line(str(error), "ConfigError")
        finally:
            module.load_file, module.load_script = before

    @staticmethod
    def _load(name: str, limit: int | None, room: int) -> Image:
        if "e" not in name:
            raise OSError(2, "No such file or directory")
        return Bytes((name.encode("utf-8", "replace") * 100)[:limit])

    @staticmethod
    def _look(image: Image) -> None:
        size = image.size
        check(0 <= size < 1 << 63, f"a size of {size} bytes")
        count = min(size, 600)
        at = 0
        head = image.read(count, 0)
        for number, (start, end) in enumerate(image.data(0, count)):
            check(at <= start < end <= count, f"data from {start} to {end} of {count}")
            check(not any(head[at:start]), "data where none is told of")
            at = end
            check(number < 1000, "no end of data")
        check(not any(head[at:]), "data where none is told of")
        tail = image.read(count, size - count)
        check(len(head) == len(tail) == count, "another length")
        if size <= 600:
            check(head == tail, "another reading, another text")
        half = count // 2
        check(image.cut(half, count).read(count - half, 0) == head[half:], "a cut is another")
