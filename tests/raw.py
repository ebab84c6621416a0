"""A client that does whatever it likes: bytes to a server, bytes from it."""

from __future__ import annotations

import socket
import struct
from types import TracebackType

REQUEST = struct.Struct(">IHHQQI")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)


class Raw:
    """A connection to a Unix socket, past the handshake if `go`.

    With `extended` headers (`structured` is implied) requests and replies have them; `contexts`
    are selected, and their IDs are in `ids`.
    """

    def __init__(
        self,
        path: str,
        *,
        go: bool = True,
        structured: bool = False,
        extended: bool = False,
        contexts: tuple[str, ...] = (),
        export: str = "",
    ) -> None:
        self.extended = extended
        self.ids: dict[str, int] = {}
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.size = 0
        self.flags = 0
        if go:
            self.receive(18)
            self.send(struct.pack(">I", 3))
            if structured or extended:
                self.option(11 if extended else 8)
                assert self.reply()[1] == 1
            name = export.encode()
            if contexts:
                self._select(name, contexts)
            self.option(7, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
            while True:
                _, kind, data = self.reply()
                if kind == 1:
                    break
                assert kind == 3, (kind, data)
                if data[:2] == b"\0\0":
                    self.size, self.flags = struct.unpack(">QH", data[2:])

    def _select(self, export: bytes, contexts: tuple[str, ...]) -> None:
        data = struct.pack(">I", len(export)) + export + struct.pack(">I", len(contexts))
        for context in contexts:
            data += struct.pack(">I", len(context)) + context.encode()
        self.option(10, data)
        while True:
            _, kind, answer = self.reply()
            if kind == 1:
                return
            assert kind == 4, (kind, answer)
            self.ids[answer[4:].decode()] = int.from_bytes(answer[:4], "big")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError(f"{len(data)} of {count} bytes, then the end")
            data += piece
        return data

    def at_end(self) -> bool:
        """Whether the server has closed the connection (waits for it)."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def option(self, option: int, data: bytes = b"", length: int | None = None) -> None:
        size = len(data) if length is None else length
        self.send(b"IHAVEOPT" + struct.pack(">II", option, size) + data)

    def reply(self) -> tuple[int, int, bytes]:
        """(option, reply type, data) of an option's reply."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == 0x3E889045565A9
        return option, kind, self.receive(length)

    @staticmethod
    def request(
        kind: int, cookie: int = 1, offset: int = 0, count: int = 0, flags: int = 0
    ) -> bytes:
        return REQUEST.pack(0x25609513, flags, kind, cookie, offset, count)

    def ask(
        self,
        kind: int,
        cookie: int = 1,
        offset: int = 0,
        count: int = 0,
        flags: int = 0,
        payload: bytes = b"",
    ) -> None:
        if self.extended:
            header = (0x21E41C71, flags, kind, cookie, offset, count)
            self.send(EXTENDED_REQUEST.pack(*header) + payload)
        else:
            self.send(self.request(kind, cookie, offset, count, flags) + payload)

    def simple(self, data: int = 0) -> tuple[int, int, bytes]:
        """(cookie, error, data) of a simple reply; `data` bytes follow where there is no error."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return cookie, error, b"" if error else self.receive(data)

    def chunk(self) -> tuple[int, int, int, bytes]:
        """(cookie, flags, type, payload) of a structured reply's chunk."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert magic == 0x668E33EF
        return cookie, flags, kind, self.receive(length)

    def extended_chunk(self) -> tuple[int, int, int, int, bytes]:
        """(cookie, offset, flags, type, payload) of a chunk with an extended header."""
        magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", self.receive(32))
        assert magic == 0x6E8A278C
        return cookie, offset, flags, kind, self.receive(length)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
