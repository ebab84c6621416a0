"""Fuzzing of whole connections to a server: options, then requests, in one stream of bytes.

It goes through the server's real Connection, on a socket that makes no system calls, to a plugin
whose exports are the disks of fuzz_disks.py. What was agreed on in the first phase has to be what
counts in the second, and no byte may be lost or taken twice between the two. The oracles are those
of the two phases.

The input: a byte of switches, one for how the bytes come and go; the rest is what the client sends.
With ``tls`` the server offers or demands it; nothing that is not encrypted may then be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import fuzz_disks
import fuzz_handshake
import fuzz_requests
from fuzz_base import FakeSocket, Target, check, havoc
from fuzz_handshake import CONTEXTS, DF, FILTER, HAS_FLAGS, Oracle, Switches

from pynbdkit.chain import Chain
from pynbdkit.complete import Layer
from pynbdkit.device import Device
from pynbdkit.errors import OpenError
from pynbdkit.flags import ThreadModel
from pynbdkit.plugin import Plugin
from pynbdkit.protocol.handshake_server import ExportInfo
from pynbdkit.protocol.options import BlockSize
from pynbdkit.server.connection import Connection, transmission_flags
from pynbdkit.server.server import Server
from pynbdkit.session import Session

DISKS: dict[str, Any] = {
    "": fuzz_disks.Strict(),
    "a": fuzz_disks.ReadOnly(),
    "odd": fuzz_disks.Odd(),
    "secret": fuzz_disks.Group(),
}
LAYERS = {name: Layer(disk, Session(), name) for name, disk in DISKS.items()}


class Disks(Plugin):
    """A plugin that has them."""

    name = "disks"
    thread_model = ThreadModel.SERIALIZE_REQUESTS

    def list_exports(self, readonly: bool, is_tls: bool) -> Sequence[str]:
        """All of them."""
        return [*DISKS]

    def open(self, session: Session) -> Device:
        """The disk of this name."""
        try:
            return DISKS[session.export_name]  # type: ignore[no-any-return]
        except KeyError:
            raise OpenError("there is none") from None


def info(name: str) -> ExportInfo:
    """What a client is told of it."""
    layer = LAYERS[name]
    sizes = layer.block_size()
    flags = transmission_flags(layer) & ~(DF | FILTER) | HAS_FLAGS
    return ExportInfo(name, layer.get_size(), flags, "", BlockSize(*sizes) if any(sizes) else None)


class Reading(Oracle):
    """The handshake's oracle, with this plugin's exports."""

    exports = {name: info(name) for name in DISKS}
    secret = None

    def available(self, name: str, queries: Sequence[str]) -> tuple[str, ...]:
        """A disk without contexts of its own has one."""
        return CONTEXTS if name in DISKS and name != "a" else CONTEXTS[:1]

    def _knows_without_export(self, queries: list[str]) -> bool:
        return bool(queries) and all(query.startswith("base:") for query in queries)


class Connections(Target):
    """Connections to a server, from the first byte to the last."""

    name = "connection"
    modules = (
        *("pynbdkit.server.connection", "pynbdkit.server.negotiation"),
        *("pynbdkit.server.transmission", "pynbdkit.protocol.handshake_server"),
    )
    share = 3.0

    def __init__(self) -> None:
        self._servers: dict[int, Server] = {}

    def _server(self, byte: int) -> Server:
        if byte not in self._servers:
            switches = Switches.of(byte | 0x80)
            self._servers[byte] = Server(
                Chain(Disks()),
                structured_replies=switches.structured,
                meta_contexts=switches.meta,
                extended_headers=switches.extended,
                handshake_mask=switches.fixed | switches.no_zeroes << 1,
                tls=switches.tls,
            )
        return self._servers[byte]

    def one(self, data: bytes) -> None:
        """Connect, send it all, and look at what has come back."""
        head, stream = (data + bytes(2))[:2], data[2:]
        byte = head[0] & 0x7F
        if fuzz_requests.announces_much(stream[-200:], False):
            return
        switches = Switches.of(byte)._replace(stopping=False)
        if switches.tls != "off":  # there are no credentials here: this is about what comes first
            stream = stream.replace(b"IHAVEOPT\0\0\0\5", b"IHAVEOPT\0\0\0\6")
        for disk in DISKS.values():
            disk.fresh()
        with fuzz_disks.no_surprises():
            contents = {name: bytes(disk.content) for name, disk in DISKS.items()}
            sock = FakeSocket(stream, head[1])
            server = self._server(byte)
            connection = Connection(server, sock, 1)  # type: ignore[arg-type]
            server._connections.add(connection)
            connection.run()
            check(connection not in server._connections, "the connection is not forgotten")
            fuzz_disks.nothing_wrong()
            sent = bytes(sock.sent)
            flags = switches.fixed | switches.no_zeroes << 1
            check(sent[:18] == b"NBDMAGICIHAVEOPT" + bytes((0, flags)), "the greeting")
            oracle = Reading(switches, stream, b"", sent[18:])
            terms = oracle.run()
            if terms is None:
                check(oracle.out == len(sent) - 18, "bytes that answer no option")
                return
            check(switches.tls != "require", "an export is served before TLS")
            model = fuzz_requests.Model(
                DISKS[terms.name],
                LAYERS[terms.name],
                fuzz_requests.Terms(
                    terms.structured, terms.extended, dict(enumerate(terms.contexts, 1))
                ),
            )
            model.content = bytearray(contents[terms.name])
            model.check_replies(stream[terms.at :], sent[18 + terms.sent :])
            check(sock.largest <= fuzz_requests.MOST + 32, f"a buffer of {sock.largest} bytes")

    def mutate(self, data: bytes, random: Random) -> bytes:
        """Another handshake, or other requests behind the same one."""
        data += bytes(max(6 - len(data), 0))
        head, flags, stream = data[:2], data[2:6], data[6:]
        magic = b"\x21\xe4\x1c\x71" if b"\x21\xe4\x1c\x71" in stream else b"\x25\x60\x95\x13"
        at = stream.find(magic)
        options, requests = (stream, b"") if at < 0 else (stream[:at], stream[at:])
        what = random.randrange(10)
        if what == 0:
            head = (havoc(head, random) + bytes(2))[:2]
        elif what == 1:
            flags = random.choice((b"\0\0\0\3", b"\0\0\0\1", b"\0\0\0\2", bytes(4), b"\0\0\0\7"))
        elif what <= 4:
            options = fuzz_handshake.mutate_options(options, random)
        else:
            requests = fuzz_requests.mutate_requests(requests, random, magic[0] == 0x21)
        return head + flags + options[:4000] + requests[:8000]
