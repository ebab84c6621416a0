"""Receiver: one connection's bytes, received into the parser's buffer, out as requests.

How it receives depends on what has come lately:

- usually it waits in recv for as much as there is;
- the rest of a large payload is received in one go;
- what has come of the next request while a large payload was received is received before that one
  is run (`_take_along`): so the client goes on sending while we store;
- where few requests come at a time, soon after the reply before, and no other connection is busy,
  it looks again and again for a moment (`POLL_FOR`) before it waits: on both sides a sleep costs
  more than all the rest.
"""

from __future__ import annotations

import socket
from struct import Struct
from time import perf_counter

from ..processors import usable
from ..protocol.requests import RequestParser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from ..protocol.requests import Request

WORTH_WAITING: Final = 16 << 10
"""When more of a write's payload is missing, it is received in one go, not as it trickles in."""
LARGE_PAYLOAD: Final = 64 << 10
"""To store so many bytes takes long enough for a client to fill the socket meanwhile, and sleep."""
LARGEST_PAYLOAD: Final = 1 << 20
"""Beyond that, what a socket takes meanwhile is little, and a second buffer is much."""
LONG_SILENCE: Final = 5.0
"""Seconds after which a client that sends nothing is idle: it needs no large buffer."""
POLL_FOR: Final = 60e-6
"""Seconds of looking for the next request: about what a client needs to wake up and send it."""
FEW: Final = 4
"""So many requests come at a time, at most, where it pays to poll: more share a sleep's cost."""
IN_TURN: Final = 8
"""So often in turn few requests have come, before it pays to poll."""
MAX_REST: Final = 4096
"""Requests that are waited for without polling, at most, after polling that found nothing."""
TIMEVAL: Final = Struct("ll")
_SEVERAL_CPUS: Final = usable() > 1


class Disconnect(Exception):
    """The client has gone, or asked to end (its text: why; "" where it did as it should)."""


class Receiver:
    """Receives for one connection; one thread at a time uses it."""

    def __init__(self, sock: socket.socket, leftover: bytes, extended: bool) -> None:
        """`leftover`: bytes that came with the end of the handshake; `extended`: its headers."""
        self._sock = sock
        self.parser = RequestParser(leftover, extended=extended)
        self.plain = type(sock) is socket.socket
        """Whether the kernel's own calls receive (no TLS, no pipes)."""
        self.stopping = False
        """Set, from any thread: nothing more is received."""
        self.alone = True
        """Whether no other connection is busy: polling would take the interpreter from it."""
        self.ahead = bool(leftover)
        """Whether the parser has bytes that it has not looked at."""
        self._timed = False  # silence is noticed: the parser has a large buffer to give back
        self._few = 0  # how often in turn few requests came
        self._rest = 0  # requests to wait for without polling
        self._missed = 0  # how often in turn polling found nothing
        self._polls = _SEVERAL_CPUS and (self.plain or getattr(sock, "pollable", False))

    def receive(self) -> list[Request]:
        """The next requests: at least one. Raises Disconnect at the end, OSError."""
        parser = self.parser
        while True:
            if self.ahead:
                self.ahead = False
            else:
                self._may_go_on()
                space, missing = parser.space(), parser.missing
                if parser.large is not self._timed:
                    self._timed = self._note_silence(parser.large)
                try:
                    if missing > WORTH_WAITING:
                        count = self._sock.recv_into(space, missing, socket.MSG_WAITALL)
                    elif self._few < IN_TURN or not (count := self._poll(space)):
                        count = self._sock.recv_into(space)
                except BlockingIOError:  # it has been silent for long
                    parser.shrink()
                    continue
                if not count:
                    self._gone()
                parser.received(count)
            requests = parser.requests()
            if requests:
                if len(requests) > FEW:
                    self._few = 0
                elif self._polls:
                    self._few = self._few + 1 if self.alone else 0
                if LARGE_PAYLOAD <= requests[-1][4] <= LARGEST_PAYLOAD:
                    self._take_along(requests[-1][5])
                return requests

    def receive_what_is_there(self) -> list[Request]:
        """The requests that are complete by now, perhaps none, without waiting.

        Raises Disconnect at the end, OSError. For a `plain` socket.
        """
        parser = self.parser
        if self.ahead:
            self.ahead = False
            return parser.requests()
        self._may_go_on()
        try:
            count = self._sock.recv_into(parser.space(), 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not count:
            self._gone()
        parser.received(count)
        requests = parser.requests()
        if not requests:
            self._may_go_on()  # no more will come, where they cannot be understood
        return requests

    def _take_along(self, payload: memoryview | None) -> None:
        """Receive what has come behind a large payload, if there is one, which stays valid.

        A client that has filled the socket is woken when most of it was taken out; it would sleep
        through all that we do before.
        """
        parser = self.parser
        if payload is None or not self.plain or not self.alone:
            return
        if parser.partial or parser.broken:
            return
        try:
            parser.turn_over()
            count = self._sock.recv_into(parser.space(), 0, socket.MSG_DONTWAIT)
        except (OSError, MemoryError):
            return  # nothing has come; or it is for the next one who receives to say
        parser.received(count)
        self.ahead = count > 0

    def shrink(self) -> None:
        """Nothing comes: give the large buffer back."""
        self.parser.shrink()
        self.parser.space()

    def _may_go_on(self) -> None:
        if self.parser.broken:
            raise Disconnect(self.parser.broken)
        if self.stopping:
            raise Disconnect("")

    def _gone(self) -> None:
        raise Disconnect("client has gone within a request" if self.parser.partial else "")

    def _poll(self, space: memoryview) -> int:
        """Receive what comes within a moment; 0 if nothing does, or the client has gone.

        After polling in vain it is left alone for a while, twice as long each time: a client that
        thinks between its requests costs no processor time.
        """
        if self._rest:
            self._rest -= 1
            return 0
        receive = self._sock.recv_into
        end = perf_counter() + POLL_FOR
        while True:
            try:
                count = receive(space, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if perf_counter() < end:
                    continue
                self._missed += 1
                self._rest = min(1 << self._missed, MAX_REST)
                return 0
            self._missed = 0
            return count

    def _note_silence(self, wanted: bool) -> bool:
        """Whether receiving is to end with BlockingIOError after a long silence."""
        if self.plain:
            seconds = LONG_SILENCE if wanted else 0.0
            limit = TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        return wanted
