"""The server's side of the handshake as a state machine: bytes in, bytes out, no I/O.

Theory. The server speaks first (`ServerHandshake.greeting`). After that the client leads:

    state         awaits                        then
    ------------  ----------------------------  ---------------------------------------------
    CLIENT_FLAGS  4 bytes of client flags       OPTIONS; CLOSED if a flag was not offered
    OPTIONS       16 bytes of option header,    the option's row in the table below; CLOSED on
                  then the option's payload     a bad magic, an absurd length, too many options
    STARTTLS      `tls_started`: the caller     OPTIONS, with all forgotten that was learnt
                  runs TLS on the socket        before
    TRANSMISSION  nothing: handshake is over    what came after it is in `leftover`
    CLOSED        nothing: drop the connection  the reason is in `error`, None after an ABORT

    option             payload       success               refusal
    -----------------  ------------  --------------------  ----------------------------------
    EXPORT_NAME        name          TRANSMISSION          CLOSED (it knows no error reply);
                                                           also once headers are extended
    ABORT              ignored       REP_ACK, CLOSED       -
    LIST               none          REP_SERVER..., ACK    error reply, OPTIONS
    STARTTLS           none          ACK, STARTTLS         UNSUP without TLS, INVALID twice
    INFO               name, infos   REP_INFO..., ACK      error reply, OPTIONS
    GO                 name, infos   the same, then        error reply, OPTIONS
                                     TRANSMISSION
    STRUCTURED_REPLY   none          ACK                   error reply, OPTIONS
    EXTENDED_HEADERS   none          ACK                   error reply, OPTIONS
    *_META_CONTEXT     name, queries REP_META_CONTEXT...,  error reply, OPTIONS
                                     ACK
    anything else      skipped       -                     UNSUP, OPTIONS

TLS: the specification's modes NOTLS, SELECTIVETLS and FORCEDTLS are ``tls="off"``, ``"on"`` and
``"require"``. Under the last, until TLS runs, every option but STARTTLS and ABORT is TLS_REQD, and
neither its payload nor an export is looked at. What comes in one piece with STARTTLS, but behind
it, was sent in the clear by whoever could: it is TLS's to judge (`leftover`), never an option.

A refused option never desynchronizes the stream: its payload is always read to the end, and is
never stored when it cannot be used. So a connection holds at most one payload of the longest
option that makes sense, and the replies of one `receive` stop at `MAX_REPLY_BATCH`.
"""

from __future__ import annotations

from .constants import (
    CONTEXT_BASE_ALLOCATION,
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_HAS_FLAGS,
    FLAG_NO_ZEROES,
    FLAG_SEND_DF,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_NAME,
    MAX_PAYLOAD,
    MAX_STRING,
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
    REP_ACK,
    REP_ERR_EXT_HEADER_REQD,
    REP_ERR_INVALID,
    REP_ERR_POLICY,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_TOO_BIG,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    ZEROES_LENGTH,
    name_of,
)
from .errors import HandshakeError
from .negotiated import ExportInfo, Negotiated
from .options import (
    OPTION_HEADER,
    decode_context_query,
    decode_export_query,
    decode_string,
    encode_context,
    encode_display,
    encode_info_block_size,
    encode_info_export,
    encode_info_string,
    encode_reply,
    encode_server,
    encode_string,
    match_contexts,
)

TYPE_CHECKING = False  # Spares the import of typing at start-up, see constants.
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Final, Protocol
else:
    Protocol = object

__all__ = [
    "ExportInfo",
    "ExportSource",
    "HandshakeError",
    "Negotiated",
    "ServerHandshake",
    "oldstyle",
    "oldstyle_negotiated",
]

CLIENT_FLAGS: Final = "CLIENT_FLAGS"
OPTIONS: Final = "OPTIONS"
STARTTLS: Final = "STARTTLS"
TRANSMISSION: Final = "TRANSMISSION"
CLOSED: Final = "CLOSED"

MAX_OPTION_DATA: Final = 4 + MAX_STRING + 2 + 2 * 0xFFFF
"""Longest payload that is stored: the longest INFO or GO that the specification can express."""

MAX_OPTION_SKIP: Final = MAX_PAYLOAD
"""Longest payload that is read and thrown away; whoever announces more is dropped."""

MAX_OPTIONS: Final = 256
"""Options that a client may send without choosing an export, before it is dropped."""

MAX_REPLY_BATCH: Final = 256 * 1024
"""When one `receive` has gathered this many bytes of replies, it takes up no further option."""


class ExportSource(Protocol):
    """Where a handshake gets its exports from. Each method may raise `HandshakeError`.

    REP_ERR_TLS_REQD (from `open`, for an export that is served over TLS alone) is sent where the
    specification allows it, before TLS and for INFO and GO; elsewhere it becomes REP_ERR_POLICY.
    """

    def list_exports(self) -> Sequence[tuple[str, str]]:
        """Return name and description of each export, for LIST.

        A name that cannot be sent (over 4096 bytes, NUL, not Unicode) is left out of the reply.
        """

    def open(self, name: str) -> ExportInfo:
        """Open the export that a client asks for by INFO, GO or EXPORT_NAME.

        ``""`` is the default export. Called once for each such option: the last one opened
        before TRANSMISSION is the one to serve, what was opened before it is to be closed.
        Raises HandshakeError with REP_ERR_UNKNOWN if there is no such export.
        """

    def contexts(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        """Return the metadata contexts to choose from for an export.

        For LIST_META_CONTEXT and SET_META_CONTEXT, whose queries say what is worth looking for (no
        query at all, in a listing: everything). An explicit subclass inherits the answer
        ``base:allocation`` for every name. Raises HandshakeError with REP_ERR_UNKNOWN where there
        is no such export and that is cheap to know.
        """
        del name, queries
        return (CONTEXT_BASE_ALLOCATION,)

    def forget(self) -> None:
        """Close whatever is open: TLS begins, and what was asked before it may be an attacker's.

        Called when STARTTLS is granted. An explicit subclass inherits that there is nothing to do.
        """
        return


class ServerHandshake:
    """One connection's handshake; feed it what the client sends, send what it returns.

    Arguments:
        exports: the exports to offer.
        structured_replies: whether to grant them (``--no-sr`` clears it; metadata contexts and
            extended headers, which imply them, then go as well).
        meta_contexts: whether to know LIST_ and SET_META_CONTEXT (``--no-mc`` clears it).
        extended_headers: whether to grant them (``--no-eh`` clears it).
        fixed: whether to offer fixed newstyle (``--mask-handshake``). Without it EXPORT_NAME is
            the only option that exists.
        no_zeroes: whether to offer NO_ZEROES (``--mask-handshake``).
        tls: ``"off"``, ``"on"`` or ``"require"``; anything else is a ValueError, because a slip of
            the pen must not serve in the clear. TLS needs ``fixed``.

    Attributes:
        state: CLIENT_FLAGS, OPTIONS, STARTTLS, TRANSMISSION or CLOSED.
        secure: whether TLS runs (`tls_started` was called).
        error: why the machine itself ended the connection, one line for the log, else None.
    """

    def __init__(
        self,
        exports: ExportSource,
        *,
        structured_replies: bool = True,
        meta_contexts: bool = True,
        extended_headers: bool = True,
        fixed: bool = True,
        no_zeroes: bool = True,
        tls: str = "off",
    ) -> None:
        if tls not in ("off", "on", "require"):
            raise ValueError(f"tls is {tls!r} instead of 'off', 'on' or 'require'")
        self.state = CLIENT_FLAGS
        self.secure = False
        self.error: str | None = None
        self._exports = exports
        self._tls = tls
        self._switched_off = _switched_off(structured_replies, meta_contexts, extended_headers)
        self._offer_flags = fixed * FLAG_FIXED_NEWSTYLE | no_zeroes * FLAG_NO_ZEROES
        self._client_flags = 0
        self._shutting_down = False

        self._forget()
        self._negotiated: Negotiated | None = None

        self._input = bytearray()
        self._option: int | None = None  # The option whose payload is awaited.
        self._left = 0  # Bytes of that payload which have not come or been skipped yet.
        self._refusal: HandshakeError | None = None  # Decided by the option's header alone.

    def _forget(self) -> None:
        """Go back to the start of the options: what TLS begins with, as a fresh connection does."""
        self._structured = False
        self._extended = False
        self._contexts_for = ""
        self._contexts: list[str] = []
        self._options_seen = 0

    @property
    def negotiated(self) -> Negotiated:
        """What was agreed on; raises RuntimeError before the state is TRANSMISSION."""
        if self._negotiated is None:
            raise RuntimeError(f"nothing is negotiated yet, the state is {self.state}")
        return self._negotiated

    @property
    def leftover(self) -> bytes:
        """Bytes received behind the handshake's end: the head of the transmission phase.

        In the state STARTTLS: bytes received behind the option. They belong to TLS, which is to be
        fed with them before anything else; as options they are never looked at.
        """
        return bytes(self._input) if self.state in (TRANSMISSION, STARTTLS) else b""

    def greeting(self) -> bytes:
        """Return what the server sends before anything else ("Newstyle negotiation")."""
        return (NBDMAGIC << 80 | IHAVEOPT << 16 | self._offer_flags).to_bytes(18, "big")

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take bytes from the client and return the bytes to send to it, perhaps none.

        How the input is split makes no difference. After a non-empty answer has been sent, call
        again with ``b""`` until nothing is returned: a client that sends options without
        awaiting the replies is answered in pieces of bounded size.
        """
        if self.state == CLOSED:
            return b""
        self._input += data
        output = bytearray()
        while len(output) < MAX_REPLY_BATCH:
            reply = self._step()
            if reply is None:
                break
            output += reply
        return bytes(output)

    def tls_started(self) -> None:
        """TLS runs on the connection: from now on `receive` takes what comes out of it.

        Everything that the client has negotiated is forgotten ("NBD_OPT_STARTTLS"), and
        `leftover`, which was TLS's. Raises RuntimeError in any state but STARTTLS.
        """
        if self.state != STARTTLS:
            raise RuntimeError(f"TLS was not agreed on, the state is {self.state}")
        self._input.clear()
        self._forget()
        self.secure = True
        self.state = OPTIONS

    def begin_shutdown(self) -> None:
        """Refuse every option from now on with REP_ERR_SHUTDOWN; ABORT is still honoured."""
        self._shutting_down = True

    # --- The machine ---------------------------------------------------------------------

    def _step(self) -> bytes | None:
        """Do one step and return its reply, or return None if nothing can be done yet."""
        if self.state == CLIENT_FLAGS and len(self._input) >= 4:
            return self._on_client_flags(int.from_bytes(self._take(4), "big"))
        if self.state != OPTIONS:
            return None
        if self._option is None:
            if len(self._input) < OPTION_HEADER.size:
                return None
            return self._on_option_header(*OPTION_HEADER.unpack(self._take(OPTION_HEADER.size)))
        if self._is_skipping():
            skipped = min(self._left, len(self._input))
            del self._input[:skipped]
            self._left -= skipped
            return self._on_option(b"") if self._left == 0 else None
        if len(self._input) < self._left:
            return None
        return self._on_option(self._take(self._left))

    def _take(self, count: int) -> bytes:
        data = bytes(self._input[:count])
        del self._input[:count]
        return data

    def _close(self, reason: str | None) -> bytes:
        self.state = CLOSED
        self.error = reason
        self._input.clear()
        return b""

    def _on_client_flags(self, flags: int) -> bytes:
        if flags & ~self._offer_flags:  # The flags' bits are the same in both directions.
            return self._close(f"client flags 0x{flags:x}, offered 0x{self._offer_flags:x}")
        self._client_flags = flags
        self.state = OPTIONS
        return b""

    def _on_option_header(self, magic: int, option: int, length: int) -> bytes:
        name = name_of("OPT_", option)
        self._options_seen += 1
        if magic != IHAVEOPT:
            return self._close(f"option with magic 0x{magic:016x} instead of 0x{IHAVEOPT:016x}")
        if self._options_seen > MAX_OPTIONS:
            return self._close(f"client sent {MAX_OPTIONS} options without choosing an export")
        if length > MAX_OPTION_SKIP:
            return self._close(f"{name}: payload of {length} bytes is too long")
        if option == OPT_SET_META_CONTEXT:
            # "Issuing this command replaces all previously-set metadata contexts (including
            # when this command fails)."
            self._contexts = []
        if option == OPT_EXPORT_NAME:
            if length > MAX_STRING:
                return self._close(f"{name}: export name of {length} bytes is too long")
            if self._shutting_down:
                return self._close(f"{name}: the server is shutting down")
            if self._needs_tls():
                return self._close(f"{name}: the server requires TLS")
            if self._extended:
                return self._close(f"{name}: not allowed with extended headers")
        elif not self._offer_flags & FLAG_FIXED_NEWSTYLE:
            return self._close(f"{name}: not allowed without fixed newstyle")
        self._option = option
        self._left = length
        self._refusal = self._judge_header(option, length)
        return b""

    def _judge_header(self, option: int, length: int) -> HandshakeError | None:
        """Return why an option is refused whatever its payload says, or None."""
        name = name_of("OPT_", option)
        if option in (OPT_EXPORT_NAME, OPT_ABORT):
            return None
        if self._shutting_down:
            return HandshakeError(REP_ERR_SHUTDOWN, "the server is shutting down")
        if not self._client_flags & FLAG_C_FIXED_NEWSTYLE:
            # Such a client may know the error replies or not: it was offered them. Keep it.
            message = f"{name}: the client did not agree to fixed newstyle"
            return HandshakeError(REP_ERR_INVALID, message)
        if self._needs_tls() and option != OPT_STARTTLS:
            return HandshakeError(REP_ERR_TLS_REQD, f"{name}: the server requires TLS")
        if option not in self._HANDLERS:
            return HandshakeError(REP_ERR_UNSUP, f"{name} is not supported")
        if option in self._switched_off:
            message = f"{self._switched_off[option]} are switched off"
            return HandshakeError(REP_ERR_UNSUP, message)
        if option == OPT_STARTTLS and self._tls == "off":
            return HandshakeError(REP_ERR_UNSUP, "this server has no TLS")
        if option in self._WITHOUT_DATA and length:
            return HandshakeError(REP_ERR_INVALID, f"{name} takes no data, {length} bytes came")
        if length > MAX_OPTION_DATA:
            message = f"{name}: {length} bytes of data, the server takes {MAX_OPTION_DATA}"
            return HandshakeError(REP_ERR_TOO_BIG, message)
        return None

    def _needs_tls(self) -> bool:
        return self._tls == "require" and not self.secure

    def _may_ask_for_tls(self, option: int) -> bool:
        """Whether TLS_REQD is allowed, also when an `ExportSource` raises it ("TLS support")."""
        if self._tls == "on" and not self.secure:
            return option in (OPT_INFO, OPT_GO)  # "only in respect of a TLS-only export"
        return self._needs_tls()

    def _is_skipping(self) -> bool:
        return self._refusal is not None or self._option == OPT_ABORT

    def _on_option(self, data: bytes) -> bytes:
        """Answer the awaited option, now that its payload is complete (or skipped)."""
        option, refusal = self._option, self._refusal
        assert option is not None
        self._option, self._refusal = None, None
        try:
            if refusal is not None:
                raise refusal
            return self._HANDLERS[option](self, option, data)
        except HandshakeError as error:
            if option == OPT_EXPORT_NAME:
                return self._close(f"NBD_OPT_EXPORT_NAME: {error.message}")
            code = error.code
            if code == REP_ERR_TLS_REQD and not self._may_ask_for_tls(option):
                code = REP_ERR_POLICY
            return encode_reply(option, code, encode_display(error.message))

    # --- The options ---------------------------------------------------------------------

    def _on_export_name(self, _option: int, data: bytes) -> bytes:
        name = decode_string(data, "export name")
        export = self._exports.open(name)
        self._enter_transmission(name, export)
        reply = export.size.to_bytes(8, "big") + self._flags(name, export).to_bytes(2, "big")
        if self._client_flags & FLAG_C_NO_ZEROES:
            return reply
        return reply + bytes(ZEROES_LENGTH)

    def _on_abort(self, option: int, _data: bytes) -> bytes:
        self._close(None)
        return encode_reply(option, REP_ACK)

    def _on_list(self, option: int, _data: bytes) -> bytes:
        replies = []
        for name, description in self._exports.list_exports():
            try:
                payload = encode_server(name, description)
            except ValueError:
                continue  # No client could ask for such a name.
            replies.append(encode_reply(option, REP_SERVER, payload))
        replies.append(encode_reply(option, REP_ACK))
        return b"".join(replies)

    def _on_info_or_go(self, option: int, data: bytes) -> bytes:
        query = decode_export_query(data)
        export = self._exports.open(query.name)
        infos = [encode_info_export(export.size, self._flags(query.name, export))]
        if INFO_NAME in query.infos:
            try:
                name = encode_string(export.name, "export name")
            except ValueError:  # Nothing that a client could use; the info is optional.
                pass
            else:
                infos.append(encode_info_string(INFO_NAME, name))
        if INFO_DESCRIPTION in query.infos and export.description:
            description = encode_display(export.description)
            infos.append(encode_info_string(INFO_DESCRIPTION, description))
        if INFO_BLOCK_SIZE in query.infos and export.block_size is not None:
            infos.append(encode_info_block_size(export.block_size))
        if option == OPT_GO:
            self._enter_transmission(query.name, export)
        replies = [encode_reply(option, REP_INFO, info) for info in infos]
        return b"".join([*replies, encode_reply(option, REP_ACK)])

    def _on_starttls(self, option: int, _data: bytes) -> bytes:
        if self.secure:
            raise HandshakeError(REP_ERR_INVALID, "TLS runs already")
        self._exports.forget()
        self.state = STARTTLS
        return encode_reply(option, REP_ACK)

    def _on_structured_reply(self, option: int, _data: bytes) -> bytes:
        if self._extended:
            raise HandshakeError(REP_ERR_EXT_HEADER_REQD, "headers are extended already")
        self._structured = True
        return encode_reply(option, REP_ACK)

    def _on_extended_headers(self, option: int, _data: bytes) -> bytes:
        self._structured = self._extended = True
        return encode_reply(option, REP_ACK)

    def _on_meta_context(self, option: int, data: bytes) -> bytes:
        setting = option == OPT_SET_META_CONTEXT
        if setting and not self._structured:
            raise HandshakeError(REP_ERR_INVALID, "structured replies must be negotiated first")
        query = decode_context_query(data)
        available = self._exports.contexts(query.name, query.queries)
        if setting:
            contexts = match_contexts(available, query.queries, wildcards=False)
            self._contexts_for, self._contexts = query.name, contexts
        elif query.queries:
            contexts = match_contexts(available, query.queries, wildcards=True)
        else:
            contexts = list(available)
        replies = [
            # The ID means something in the reply to SET alone; in a listing it "SHOULD be zero".
            encode_reply(option, REP_META_CONTEXT, encode_context(number if setting else 0, name))
            for number, name in enumerate(contexts, 1)
        ]
        return b"".join([*replies, encode_reply(option, REP_ACK)])

    def _contexts_of(self, name: str) -> list[str]:
        """Return the contexts that were selected for this very export."""
        return self._contexts if name == self._contexts_for else []

    def _flags(self, name: str, export: ExportInfo) -> int:
        flags = export.flags & ~(FLAG_SEND_DF | FLAG_BLOCK_STATUS_PAYLOAD) | FLAG_HAS_FLAGS
        if self._structured:
            flags |= FLAG_SEND_DF
        if self._extended and self._contexts_of(name):
            flags |= FLAG_BLOCK_STATUS_PAYLOAD
        return flags

    def _enter_transmission(self, name: str, export: ExportInfo) -> None:
        self.state = TRANSMISSION
        self._negotiated = Negotiated(
            export=export._replace(flags=self._flags(name, export)),
            structured_replies=self._structured,
            no_zeroes=bool(self._client_flags & FLAG_C_NO_ZEROES),
            contexts=tuple(enumerate(self._contexts_of(name), 1)),
            extended_headers=self._extended,
        )

    _WITHOUT_DATA: Final = (OPT_LIST, OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS)
    _HANDLERS: Final[dict[int, Callable[[ServerHandshake, int, bytes], bytes]]] = {
        OPT_EXPORT_NAME: _on_export_name,
        OPT_ABORT: _on_abort,
        OPT_LIST: _on_list,
        OPT_STARTTLS: _on_starttls,
        OPT_INFO: _on_info_or_go,
        OPT_GO: _on_info_or_go,
        OPT_STRUCTURED_REPLY: _on_structured_reply,
        OPT_LIST_META_CONTEXT: _on_meta_context,
        OPT_SET_META_CONTEXT: _on_meta_context,
        OPT_EXTENDED_HEADERS: _on_extended_headers,
    }


def _switched_off(structured: bool, contexts: bool, extended: bool) -> dict[int, str]:
    """Return the options that the server is not to know, each with the feature's name."""
    names: dict[int, str] = {}
    if not extended:
        names[OPT_EXTENDED_HEADERS] = "extended headers"
    if not contexts:
        names[OPT_LIST_META_CONTEXT] = names[OPT_SET_META_CONTEXT] = "metadata contexts"
    if not structured:
        for option in (
            OPT_STRUCTURED_REPLY,
            OPT_LIST_META_CONTEXT,
            OPT_SET_META_CONTEXT,
            OPT_EXTENDED_HEADERS,
        ):
            names[option] = "structured replies"
    return names


# --- Oldstyle ----------------------------------------------------------------------------------


def oldstyle(export: ExportInfo) -> bytes:
    """Return all of the oldstyle handshake, 152 bytes ("Oldstyle negotiation"; ``-o``).

    The server sends it, the client nothing; transmission begins behind it.
    """
    flags = oldstyle_negotiated(export).export.flags  # The upper half, handshake flags, is empty.
    head = NBDMAGIC << 64 | OLDSTYLE_MAGIC
    return b"".join(
        [
            head.to_bytes(16, "big"),
            export.size.to_bytes(8, "big"),
            flags.to_bytes(4, "big"),
            bytes(ZEROES_LENGTH),
        ]
    )


def oldstyle_negotiated(export: ExportInfo) -> Negotiated:
    """Return what an oldstyle handshake settles: simple replies, no contexts."""
    flags = export.flags & ~(FLAG_SEND_DF | FLAG_BLOCK_STATUS_PAYLOAD) | FLAG_HAS_FLAGS
    return Negotiated(
        export=export._replace(flags=flags),
        structured_replies=False,
        no_zeroes=False,
        contexts=(),
    )
