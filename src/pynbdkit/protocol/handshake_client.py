"""The client's side of the handshake as a state machine: bytes in, bytes out, no I/O.

Theory. The caller says what it wants when it makes a `ClientHandshake`; from that follows a plan,
the options to send one after the other. Each reply of the server moves the plan on.

    state         awaits                         then
    ------------  -----------------------------  --------------------------------------------
    GREETING      the server's greeting          OPTIONS; TRANSMISSION if it is oldstyle
    OPTIONS       the replies to one option      the next option of the plan
    STARTTLS      `tls_started`                  OPTIONS: the next option of the plan, encrypted
    TRANSMISSION  nothing: handshake is over     what came after it is in `leftover`
    ABORTING      the reply to ABORT, or an end  CLOSED
    CLOSED        nothing: close the connection  `refusal` says whether the server said no

    option of the plan   sent if                  when the server refuses it
    -------------------  -----------------------  -------------------------------------------
    STARTTLS             ``tls`` is not "off"     go on in the clear if ``tls`` is "on", else ABORT
    LIST                 ``list_exports``         go on (a refusal, if nothing else is wanted)
    EXTENDED_HEADERS     ``extended_headers`` **  go on with the next
    STRUCTURED_REPLY     ``structured_replies`` + go on with simple replies
    LIST_META_CONTEXT    ``list_contexts``        go on, no context is known
    SET_META_CONTEXT     ``contexts`` *           go on without contexts
    GO                   ``enter``                EXPORT_NAME if it is unsupported, else ABORT
    INFO                 not ``enter``            ABORT
    EXPORT_NAME          GO is not supported      the server closes the connection
    ABORT                nothing is left to ask
                         (* and structured replies were granted; ** and structured replies are
                         wanted, which extended headers include; + and the former were refused)

A server that breaks the rules, with a length or a number that cannot be, is a `ProtocolError`;
one that refuses what was wanted is a `refusal`, and the connection ends politely by ABORT.
STARTTLS is the first option, so that nothing is learnt in the clear; bytes that come behind its ACK
without being encrypted are a breach, never taken for something that the server said over TLS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .constants import (
    CONTEXT_BASE_ALLOCATION,
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_HAS_FLAGS,
    FLAG_SEND_DF,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_NAME,
    NBDMAGIC,
    OLDSTYLE_MAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_FLAG_ERROR,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    ZEROES_LENGTH,
    name_of,
)
from .errors import HandshakeError, ProtocolError
from .negotiated import ExportInfo, Negotiated
from .options import (
    REPLY_HEADER,
    BlockSize,
    ContextQuery,
    ExportQuery,
    decode_context,
    decode_display,
    decode_info,
    decode_info_block_size,
    decode_info_export,
    decode_server,
    decode_string,
    encode_context_query,
    encode_export_query,
    encode_option,
    encode_string,
    shorten,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ClientHandshake", "ExportInfo", "HandshakeError", "Negotiated", "ProtocolError"]

GREETING: Final = "GREETING"
OPTIONS: Final = "OPTIONS"
STARTTLS: Final = "STARTTLS"
TRANSMISSION: Final = "TRANSMISSION"
ABORTING: Final = "ABORTING"
CLOSED: Final = "CLOSED"

MAX_REPLY_DATA: Final = 64 * 1024
"""Longest payload of one option reply that a client takes; no reply that is known needs 10 KiB."""

MAX_REPLIES: Final = 16384
"""Most replies to one option that a client takes, so most exports in a listing."""

_GREETING_LENGTH: Final = 18
_OLDSTYLE_LENGTH: Final = 28 + ZEROES_LENGTH


class ClientHandshake:
    """One connection's handshake; feed it what the server sends, send what it returns.

    Arguments:
        export: name of the export to open or ask about, ``""`` for the default one; None to open
            none (with ``list_exports``).
        enter: whether to open the export for transmission (GO); else only ask about it (INFO).
        list_exports: whether to ask for the list of exports.
        structured_replies: whether to ask for structured replies.
        extended_headers: whether to ask for extended headers first, which include them.
        contexts: names of the metadata contexts to select.
        list_contexts: whether to ask which contexts the export has.
        infos: what to ask about the export, ``INFO_*``.
        fixed: whether to agree to fixed newstyle; if not, only EXPORT_NAME can be sent.
        no_zeroes: whether to agree to leave out the padding after EXPORT_NAME's answer.
        tls: ``"off"``; ``"on"`` to use TLS if the server has it (whoever sits between the two
            can make it seem that it has not); ``"require"`` to go no further without it.

    Raises ValueError for a name that the protocol cannot carry.

    Attributes (complete when the state is TRANSMISSION or CLOSED):
        state: GREETING, OPTIONS, STARTTLS, TRANSMISSION, ABORTING or CLOSED.
        protocol: ``"oldstyle"``, ``"newstyle"`` or ``"newstyle-fixed"``; ``""`` before GREETING.
        tls: whether the connection is encrypted.
        structured_replies: whether they were granted.
        extended_headers: whether they were granted.
        exports: name and description of each export, or None if the server gave no list.
        available_contexts: names of the contexts that the export has, or None if not told.
        contexts: ID and name of each selected context.
        export: what is known of the export, or None.
        refusal: why what was wanted cannot be had, or None.
    """

    def __init__(
        self,
        export: str | None = "",
        *,
        enter: bool = True,
        list_exports: bool = False,
        structured_replies: bool = True,
        extended_headers: bool = True,
        contexts: Sequence[str] = (CONTEXT_BASE_ALLOCATION,),
        list_contexts: bool = False,
        infos: Sequence[int] = (INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE),
        fixed: bool = True,
        no_zeroes: bool = True,
        tls: str = "off",
    ) -> None:
        if tls not in ("off", "on", "require"):
            raise ValueError(f"tls is off, on or require, not {tls!r}")
        self.state = GREETING
        self.protocol = ""
        self.tls = False
        self.structured_replies = False
        self.extended_headers = False
        self.exports: list[tuple[str, str]] | None = None
        self.available_contexts: tuple[str, ...] | None = None
        self.contexts: tuple[tuple[int, str], ...] = ()
        self.export: ExportInfo | None = None
        self.refusal: HandshakeError | None = None

        self._accept_flags = fixed * FLAG_C_FIXED_NEWSTYLE | no_zeroes * FLAG_C_NO_ZEROES
        self._client_flags = 0
        self._name = export
        self._tls = tls
        self._plan: list[tuple[int, bytes]] = []
        if tls != "off":
            self._plan.append((OPT_STARTTLS, b""))
        if list_exports:
            self._plan.append((OPT_LIST, b""))
        if structured_replies:
            if extended_headers:
                self._plan.append((OPT_EXTENDED_HEADERS, b""))
            self._plan.append((OPT_STRUCTURED_REPLY, b""))
        if export is not None:
            if list_contexts:
                payload = encode_context_query(ContextQuery(export, ()))
                self._plan.append((OPT_LIST_META_CONTEXT, payload))
            if contexts:
                payload = encode_context_query(ContextQuery(export, tuple(dict.fromkeys(contexts))))
                self._plan.append((OPT_SET_META_CONTEXT, payload))
            payload = encode_export_query(ExportQuery(export, tuple(infos)))
            self._plan.append((OPT_GO if enter else OPT_INFO, payload))

        self._input = bytearray()
        self._option = 0  # The option whose replies are awaited.
        self._servers: list[tuple[str, str]] = []
        self._infos: dict[int, bytes] = {}
        self._found_contexts: list[tuple[int, str]] = []
        self._replies = 0

    @property
    def negotiated(self) -> Negotiated:
        """What was agreed on; raises RuntimeError unless the state is TRANSMISSION."""
        if self.state != TRANSMISSION or self.export is None:
            raise RuntimeError(f"nothing is negotiated, the state is {self.state}")
        return Negotiated(
            export=self.export,
            structured_replies=self.structured_replies,
            no_zeroes=bool(self._client_flags & FLAG_C_NO_ZEROES),
            contexts=self.contexts,
            extended_headers=self.extended_headers,
        )

    @property
    def leftover(self) -> bytes:
        """Bytes received after the handshake's end: the head of the transmission phase."""
        return bytes(self._input) if self.state == TRANSMISSION else b""

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take bytes from the server and return the bytes to send to it, perhaps none.

        Raises ProtocolError, with the state CLOSED, if the server breaks the protocol.
        """
        if self.state == CLOSED:
            return b""
        self._input += data
        output = bytearray()
        try:
            while (answer := self._step()) is not None:
                output += answer
        except HandshakeError as error:  # From a decoder: the server sent a bad payload.
            self._close()
            name = name_of("OPT_", self._option)
            raise ProtocolError(f"bad reply to {name}: {error.message}") from None
        except ProtocolError:
            self._close()
            raise
        return bytes(output)

    def tls_started(self) -> bytes:
        """Take note that TLS is up, and return the bytes to send over it first.

        What comes over TLS is handed to `receive` as before. Raises RuntimeError unless the state
        is STARTTLS.
        """
        if self.state != STARTTLS:
            raise RuntimeError(f"the server has not agreed to TLS, the state is {self.state}")
        self.tls = True
        self.state = OPTIONS
        return self._send_next()

    def receive_eof(self) -> None:
        """Take note that the server closed the connection.

        Raises ProtocolError if it may not do so here.
        """
        state = self.state
        if state == OPTIONS and self._option == OPT_EXPORT_NAME:
            message = f"the server closed the connection: no export {shorten(self._name or '')}"
            self.refusal = HandshakeError(REP_ERR_UNKNOWN, message)
        self._close()
        if state == GREETING:
            raise ProtocolError("the server closed the connection without a greeting")
        if state == STARTTLS:
            raise ProtocolError("the server closed the connection before TLS began")
        if state == OPTIONS and self.refusal is None:
            name = name_of("OPT_", self._option)
            raise ProtocolError(f"the server closed the connection instead of answering {name}")

    # --- The machine ---------------------------------------------------------------------

    def _step(self) -> bytes | None:
        """Do one step and return what to send, or return None if nothing can be done yet."""
        if self.state == GREETING:
            return self._on_greeting()
        if self.state == STARTTLS and self._input:
            raise ProtocolError("the server sent plain data after it had agreed to TLS")
        if self.state not in (OPTIONS, ABORTING):
            return None
        if self._option == OPT_EXPORT_NAME:
            no_zeroes = self._client_flags & FLAG_C_NO_ZEROES
            if len(self._input) < (length := 10 if no_zeroes else 10 + ZEROES_LENGTH):
                return None
            return self._on_export_name(self._take(length))
        if len(self._input) < REPLY_HEADER.size:
            return None
        magic, option, reply, length = REPLY_HEADER.unpack_from(self._input)
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError(f"option reply with magic 0x{magic:016x}")
        if option != self._option:
            names = name_of("OPT_", option), name_of("OPT_", self._option)
            raise ProtocolError(f"reply to {names[0]} where one to {names[1]} was due")
        if length > MAX_REPLY_DATA:
            raise ProtocolError(f"reply to {name_of('OPT_', option)} with {length} bytes of data")
        if len(self._input) < REPLY_HEADER.size + length:
            return None
        return self._on_reply(reply, self._take(REPLY_HEADER.size + length)[REPLY_HEADER.size :])

    def _take(self, count: int) -> bytes:
        data = bytes(self._input[:count])
        del self._input[:count]
        return data

    def _close(self) -> None:
        self.state = CLOSED
        self._input.clear()

    def _send_next(self) -> bytes:
        """Send the next option of the plan, or ABORT when there is none."""
        self._replies = 0
        while self._plan:
            self._option, payload = self._plan.pop(0)
            if self._option == OPT_SET_META_CONTEXT:
                wanted = self.structured_replies
            else:  # Structured replies that came with extended headers are not asked for again.
                wanted = self._option != OPT_STRUCTURED_REPLY or not self.extended_headers
            if wanted:
                return encode_option(self._option, payload)
        self.state = ABORTING
        self._option = OPT_ABORT
        return encode_option(OPT_ABORT)

    def _refuse(self, refusal: HandshakeError) -> bytes:
        """Give up what is wanted, and part politely where the protocol allows it."""
        self.refusal = refusal
        self._plan.clear()
        if self._client_flags & FLAG_C_FIXED_NEWSTYLE:
            return self._send_next()
        self._close()
        return b""

    def _on_greeting(self) -> bytes | None:
        if len(self._input) < _GREETING_LENGTH:
            if not NBDMAGIC.to_bytes(8, "big").startswith(self._input[:8]):
                raise ProtocolError("the server does not speak NBD")
            return None
        password, magic = (int.from_bytes(self._input[i : i + 8], "big") for i in (0, 8))
        if password != NBDMAGIC or magic not in (IHAVEOPT, OLDSTYLE_MAGIC):
            raise ProtocolError("the server does not speak NBD")
        if magic == OLDSTYLE_MAGIC:
            return self._on_oldstyle()
        server_flags = int.from_bytes(self._take(_GREETING_LENGTH)[16:], "big")
        # The flags' bits are the same in both directions; those not known "SHOULD be ignored".
        self._client_flags = self._accept_flags & server_flags
        self.state = OPTIONS
        answer = self._client_flags.to_bytes(4, "big")
        if self._client_flags & FLAG_FIXED_NEWSTYLE:
            self.protocol = "newstyle-fixed"
            return answer + self._send_next()
        self.protocol = "newstyle"
        if self._tls == "require":
            message = "the server has no TLS: it speaks no fixed newstyle"
            return answer + self._refuse(HandshakeError(REP_ERR_UNSUP, message))
        wanted = self._plan[-1][0] if self._plan else None
        if wanted != OPT_GO:
            message = "the server has neither LIST nor INFO: it speaks no fixed newstyle"
            return answer + self._refuse(HandshakeError(REP_ERR_UNSUP, message))
        return answer + self._send_export_name()

    def _on_oldstyle(self) -> bytes | None:
        if len(self._input) < _OLDSTYLE_LENGTH:
            return None
        data = self._take(_OLDSTYLE_LENGTH)
        self.protocol = "oldstyle"
        if self._tls == "require":
            message = "the server has no TLS: it speaks oldstyle"
            return self._refuse(HandshakeError(REP_ERR_UNSUP, message))
        if self._name is None:
            message = "the server cannot list exports: it speaks oldstyle"
            return self._refuse(HandshakeError(REP_ERR_UNSUP, message))
        # There is one export, whatever its name. Flags are 32 bits, the upper half for handshake.
        self._set_export(int.from_bytes(data[16:24], "big"), int.from_bytes(data[26:28], "big"))
        self.state = TRANSMISSION
        return b""

    def _send_export_name(self) -> bytes:
        assert self._name is not None
        self._infos.clear()
        self._option = OPT_EXPORT_NAME
        return encode_option(OPT_EXPORT_NAME, encode_string(self._name, "export name"))

    def _on_export_name(self, data: bytes) -> bytes:
        self._set_export(int.from_bytes(data[:8], "big"), int.from_bytes(data[8:10], "big"))
        self.state = TRANSMISSION
        return b""

    def _on_reply(self, reply: int, data: bytes) -> bytes:
        name = name_of("OPT_", self._option)
        self._replies += 1
        if self._replies > MAX_REPLIES:
            raise ProtocolError(f"more than {MAX_REPLIES} replies to {name}")
        if reply & REP_FLAG_ERROR:
            return self._on_error(HandshakeError(reply, decode_display(data)))
        if reply == REP_ACK and not data:
            return self._on_ack(name)
        kind, keep = self._ITEMS.get(self._option, (None, None))
        if keep is None or reply != kind:
            raise ProtocolError(f"reply {name_of('REP_', reply)} to {name}")
        keep(self, data)
        return b""

    def _on_error(self, error: HandshakeError) -> bytes:
        if self._option == OPT_ABORT:  # What it refuses is of no interest any more.
            self._close()
            return b""
        if error.code == REP_ERR_TLS_REQD:
            return self._refuse(HandshakeError(error.code, "the server requires TLS"))
        if error.code == REP_ERR_SHUTDOWN:
            return self._refuse(HandshakeError(error.code, "the server is shutting down"))
        if self._option == OPT_STARTTLS and self._tls == "require":
            reason = error.message or name_of("REP_", error.code)
            return self._refuse(HandshakeError(error.code, f"the server refused TLS: {reason}"))
        if self._option == OPT_GO and error.code == REP_ERR_UNSUP and not self.extended_headers:
            return self._send_export_name()
        self._found_contexts = []  # "The client MUST disregard any context replies."
        if self._option in (OPT_GO, OPT_INFO) or (self._option == OPT_LIST and self._name is None):
            subject = "list" if self._name is None else f"export {shorten(self._name)}"
            reason = error.message or name_of("REP_", error.code)
            message = f"the server refused the {subject}: {reason}"
            return self._refuse(HandshakeError(error.code, message))
        return self._send_next()

    def _on_ack(self, name: str) -> bytes:
        if self._option == OPT_ABORT:
            self._close()
            return b""
        if self._option == OPT_STARTTLS:
            self.state = STARTTLS
            return b""
        if self._option == OPT_LIST:
            self.exports = self._servers
        elif self._option in (OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS):
            self.structured_replies = True
            self.extended_headers = self._option == OPT_EXTENDED_HEADERS
        elif self._option == OPT_LIST_META_CONTEXT:
            self.available_contexts = tuple(context for _, context in self._found_contexts)
        elif self._option == OPT_SET_META_CONTEXT:
            self.contexts = tuple(self._found_contexts)
            if len(dict(self.contexts)) != len(self.contexts):
                raise ProtocolError("the server gave two metadata contexts the same ID")
        else:
            if INFO_EXPORT not in self._infos:
                raise ProtocolError(f"{name} was granted without NBD_INFO_EXPORT")
            self._set_export(*decode_info_export(self._infos[INFO_EXPORT]))
            if self._option == OPT_GO:
                self.state = TRANSMISSION
                return b""
        self._found_contexts = []
        return self._send_next()

    def _set_export(self, size: int, flags: int) -> None:
        if not flags & FLAG_HAS_FLAGS:
            raise ProtocolError(f"transmission flags 0x{flags:x} lack NBD_FLAG_HAS_FLAGS")
        if not self.structured_replies:
            flags &= ~FLAG_SEND_DF  # It would mean nothing.
        if not self.extended_headers:
            flags &= ~FLAG_BLOCK_STATUS_PAYLOAD
        name, description = self._name or "", ""
        block_size: BlockSize | None = None
        if INFO_NAME in self._infos:
            name = decode_string(self._infos[INFO_NAME], "export name")
        if INFO_DESCRIPTION in self._infos:
            description = decode_display(self._infos[INFO_DESCRIPTION])
        if INFO_BLOCK_SIZE in self._infos:
            block_size = decode_info_block_size(self._infos[INFO_BLOCK_SIZE])
        self.export = ExportInfo(name, size, flags, description, block_size)

    # --- Replies that come in numbers: what to keep of each ----------------------------------

    def _keep_server(self, data: bytes) -> None:
        self._servers.append(decode_server(data))

    def _keep_info(self, data: bytes) -> None:
        info, payload = decode_info(data)
        if info in (INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE):
            self._infos[info] = payload

    def _keep_context(self, data: bytes) -> None:
        self._found_contexts.append(decode_context(data))

    _ITEMS: Final[dict[int, tuple[int, Callable[[ClientHandshake, bytes], None]]]] = {
        OPT_LIST: (REP_SERVER, _keep_server),
        OPT_INFO: (REP_INFO, _keep_info),
        OPT_GO: (REP_INFO, _keep_info),
        OPT_LIST_META_CONTEXT: (REP_META_CONTEXT, _keep_context),
        OPT_SET_META_CONTEXT: (REP_META_CONTEXT, _keep_context),
    }
