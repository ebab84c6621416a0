"""Fuzzing of TLS on the server's side: a genuine client, and somebody between the two.

The input: a byte for how the bytes come in pieces, then a script of items ``kind, length, bytes``:
what the client writes, and what is done to what it sends (nothing, a bit changed, records dropped,
doubled, cut, put in). The oracle is what TLS is for: the server gets what the client has written,
or the beginning of it and an error, and never anything else; and so does the client.
"""

from __future__ import annotations

import shutil
import ssl
import sys
import tempfile
from pathlib import Path
from random import Random

from fuzz_base import LONGEST, Target, check, havoc, pieces, reframe
from fuzz_client import items, split_items

from pynbdkit.server.secure import SecureStream
from pynbdkit.tls import Credentials, why_refused

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

PASS, WRITE, FLIP, DROP, DOUBLE, CUT, RAW, GOODBYE, SWAP, PASS_ALL = range(10)


class Between:
    """The server's socket, whose other end is the client, with somebody between."""

    family = 0

    def __init__(self, client: ssl.SSLContext, script: bytes, split: int) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._script = list(items(script))
        self._split = split
        self._queue: list[bytes] = []
        self.written = bytearray()
        self.read = bytearray()
        self.touched = False
        self._ready = False
        self._turns = 0

    # -- the client ------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Let the client do what it can."""
        try:
            if not self._ready:
                self.client.do_handshake()
                self._ready = True
            while data := self.client.read(1 << 16):
                self.read += data
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            self._script.clear()

    def _flight(self) -> bytes:
        """What comes next over the wire; b"" when there is nothing any more."""
        self._go_on()
        sent = self._outgoing.read()
        while self._script and not self._queue:
            kind, data = self._script.pop(0)
            kind %= 10
            if kind == WRITE:
                if self._ready:
                    try:
                        self.client.write(data)
                    except ssl.SSLError:
                        continue
                    self.written += data
                    sent += self._outgoing.read()
            elif kind == GOODBYE:
                if self._ready:
                    try:
                        self.client.unwrap()
                    except (ssl.SSLError, OSError):
                        pass
                    sent += self._outgoing.read()
            elif kind == PASS_ALL or (kind == PASS and sent):
                break
            elif kind == RAW:
                self.touched = self.touched or bool(data)
                sent += data
            elif sent and kind not in (PASS, WRITE):
                self.touched = True
                at = int.from_bytes(data[:2], "big") % len(sent)
                if kind == FLIP:
                    bit = data[2] % 8 if len(data) > 2 else 0
                    sent = sent[:at] + bytes((sent[at] ^ 1 << bit,)) + sent[at + 1 :]
                elif kind == DROP:
                    sent = b""
                elif kind == DOUBLE:
                    sent += sent[at:]
                elif kind == CUT:
                    sent = sent[:at]
                elif kind == SWAP:
                    sent = sent[at:] + sent[:at]
        return sent

    # -- the server's socket ---------------------------------------------------------------------

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """As a socket's; 0 when the client has nothing more to say."""
        self._turns += 1
        check(self._turns < 10 * LONGEST, "the server receives without end")
        if not self._queue:
            self._queue = [piece for piece in pieces(self._flight(), self._split) if piece]
        if not self._queue:
            return 0
        piece = self._queue[0][: len(buffer)]
        buffer[: len(piece)] = piece
        self._queue[0] = self._queue[0][len(piece) :]
        if not self._queue[0]:
            del self._queue[0]
        return len(piece)

    def sendmsg(self, buffers: list[bytes | memoryview]) -> int:
        """As a socket's."""
        data = b"".join(buffers)
        self._incoming.write(data)
        return len(data)

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        """As a socket's."""
        return self.sendmsg([data])

    def settimeout(self, seconds: float | None) -> None:
        """As a socket's; it never waits."""

    def close(self) -> None:
        """As a socket's."""

    def end(self) -> None:
        """Let the client read what has come."""
        self._go_on()


class Tls(Target):
    """What arrives when somebody else has his hands on it."""

    name = "tls"
    modules = ("pynbdkit.server.secure",)
    share = 0.15

    def __init__(self) -> None:
        from certificates import Certificates

        folder = Path(tempfile.mkdtemp(prefix="fuzz-tls-"))
        try:
            Certificates(folder).make()
            self._credentials = Credentials(str(folder / "good"))
        finally:
            shutil.rmtree(folder)
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._client.check_hostname = False
        self._client.verify_mode = ssl.CERT_NONE
        self._older = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._older.check_hostname = False
        self._older.verify_mode = ssl.CERT_NONE
        self._older.maximum_version = ssl.TLSVersion.TLSv1_2

    def one(self, data: bytes) -> None:
        """Shake hands, and echo what comes."""
        head, script = (data + bytes(1))[:1], data[1:]
        version = self._older if head[0] & 128 else self._client
        wire = Between(version, script, head[0] & 127)
        stream = SecureStream(wire, self._credentials.context())  # type: ignore[arg-type]
        got = bytearray()
        sent = bytearray()
        try:
            stream.handshake()
            buffer = memoryview(bytearray(100))
            while count := stream.recv_into(buffer):
                got += buffer[:count]
                sent += buffer[:count]
                check(stream.sendmsg([buffer[:count]]) == count, "sent in part")
        except ssl.SSLError as error:
            text = why_refused(error, self._credentials)
            check(text and text.isprintable(), f"no reason: {text!r}")
            check(wire.touched or not wire.client.version(), f"an honest client: {text}")
        except (OSError, EOFError) as error:
            check(wire.touched or not got or isinstance(error, EOFError), f"{error!r}")
        stream.close()
        wire.end()
        check(wire.written.startswith(got), "the server got what the client has not written")
        check(sent.startswith(wire.read), "the client got what the server has not sent")
        check(wire.touched or got == wire.written, "the server has not got all of it")

    def mutate(self, data: bytes, random: Random) -> bytes:
        """Another script."""
        data = data or b"\0"
        head = data[:1] if random.randrange(8) else random.randbytes(1)

        def make() -> bytes:
            kind = random.choice((PASS, PASS, WRITE, WRITE, WRITE, *range(10)))
            body = random.randbytes(random.choice((0, 2, 3, 3, 20, 200)))
            if kind == RAW and random.randrange(2):
                form = bytes((random.choice((20, 21, 22, 23, 24, 128)), 3, random.randrange(5)))
                body = form + len(body).to_bytes(2, "big") + body
            return bytes((kind, len(body))) + body

        return head + reframe(split_items(data[1:]), random, make, lambda item: havoc(item, random))
