"""Every number of the NBD specification (doc/proto.md of the reference implementation).

The names are the specification's without the leading ``NBD_``, so ``NBD_OPT_GO`` is ``OPT_GO``.
Error numbers keep the prefix (``NBD_EIO``): the protocol's values are fixed, while the ``errno``
module's differ between operating systems.

Theory in four lines: the handshake haggles by *options* that the server answers with *replies*
(some of them *infos*); then the client sends *commands* with *command flags*, allowed by the
export's *transmission flags*, and the server answers each with one simple reply or with chunks of
a structured reply, each chunk having a *type*; *contexts* give block status its meaning.
"""

from __future__ import annotations

TYPE_CHECKING = False  # Spares the import of typing at start-up; type checkers know this idiom.
if TYPE_CHECKING:
    from typing import Final

# --- Magic numbers ---------------------------------------------------------------------------

NBDMAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC", the first eight bytes of every server.
IHAVEOPT: Final = 0x49484156454F5054  # "IHAVEOPT", newstyle greeting and head of every option.
OLDSTYLE_MAGIC: Final = 0x00420281861253  # In the place of IHAVEOPT: an oldstyle server.
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# --- Limits ----------------------------------------------------------------------------------

DEFAULT_PORT: Final = 10809  # Assigned by IANA.
MAX_STRING: Final = 4096  # Bytes of UTF-8 in any string: export names, messages, contexts.
MAX_PAYLOAD: Final = 64 * 1024 * 1024  # Bytes in one read or write; the same limit as the peer's.
ZEROES_LENGTH: Final = 124  # Reserved bytes after EXPORT_NAME's reply, unless NO_ZEROES.

# --- Handshake flags (server, 16 bits) and client flags (32 bits) ------------------------------

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1

FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_C_NO_ZEROES: Final = 1 << 1

# --- Transmission flags (16 bits) ----------------------------------------------------------------

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_ROTATIONAL: Final = 1 << 4
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_RESIZE: Final = 1 << 9  # Experimental extension.
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11
FLAG_BLOCK_STATUS_PAYLOAD: Final = 1 << 12  # Needs extended headers.

# --- Options (client to server) --------------------------------------------------------------

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_PEEK_EXPORT: Final = 4  # Withdrawn; the number stays reserved.
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

# --- Option replies (server to client) -------------------------------------------------------

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4

REP_FLAG_ERROR: Final = 1 << 31  # Set in every reply that refuses an option.
REP_ERR_UNSUP: Final = REP_FLAG_ERROR + 1
REP_ERR_POLICY: Final = REP_FLAG_ERROR + 2
REP_ERR_INVALID: Final = REP_FLAG_ERROR + 3
REP_ERR_PLATFORM: Final = REP_FLAG_ERROR + 4
REP_ERR_TLS_REQD: Final = REP_FLAG_ERROR + 5
REP_ERR_UNKNOWN: Final = REP_FLAG_ERROR + 6
REP_ERR_SHUTDOWN: Final = REP_FLAG_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_FLAG_ERROR + 8
REP_ERR_TOO_BIG: Final = REP_FLAG_ERROR + 9
REP_ERR_EXT_HEADER_REQD: Final = REP_FLAG_ERROR + 10

# --- Infos (asked for in OPT_INFO and OPT_GO, answered in REP_INFO) ------------------------------

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

# --- Metadata contexts and the status bits of base:allocation ----------------------------------

CONTEXT_BASE: Final = "base:"  # The wildcard query of the base namespace.
CONTEXT_BASE_ALLOCATION: Final = "base:allocation"

STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1

# --- Commands and command flags (16 bits each) -------------------------------------------------

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7
CMD_RESIZE: Final = 8  # Experimental extension.

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5  # Needs extended headers.

# --- Structured reply chunks ---------------------------------------------------------------------

REPLY_FLAG_DONE: Final = 1 << 0

REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6  # Needs extended headers.

REPLY_TYPE_FLAG_ERROR: Final = 1 << 15  # Set in every chunk type that reports an error.
REPLY_TYPE_ERROR: Final = REPLY_TYPE_FLAG_ERROR + 1
REPLY_TYPE_ERROR_OFFSET: Final = REPLY_TYPE_FLAG_ERROR + 2

# --- Errors ----------------------------------------------------------------------------------

NBD_SUCCESS: Final = 0
NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108


def name_of(prefix: str, value: int) -> str:
    """Return the specification's name of a number, for logs and messages.

    ``prefix`` is a family as spelled in this module (``"OPT_"``, ``"REP_"``, ``"INFO_"``,
    ``"CMD_"``, ``"REPLY_TYPE_"``, ``"NBD_E"``). A value that the specification does not have is
    returned as ``"NBD_OPT 99"``. Not for the hot path: it looks through the whole module.
    """
    family = "NBD_" + prefix.removeprefix("NBD_").rstrip("_")
    for name, number in globals().items():
        if number == value and name.startswith(prefix) and "FLAG" not in name:
            return name if name.startswith("NBD_") else f"NBD_{name}"
    return f"{family} {value}"
