"""What a handshake settles, in the same words for server and client."""

from __future__ import annotations

from .options import BlockSize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from ._record import NamedTuple


class ExportInfo(NamedTuple):
    """What a client learns of an export when it opens it.

    ``name`` is the canonical name (INFO_NAME), ``size`` is in bytes, ``flags`` are the
    transmission flags. On the server's side the handshake adds HAS_FLAGS, and sets or clears
    SEND_DF. ``block_size`` is None where the export has no constraints to tell.
    """

    name: str
    size: int
    flags: int
    description: str = ""
    block_size: BlockSize | None = None


class Negotiated(NamedTuple):
    """What client and server agreed on, for the transmission phase.

    ``contexts`` has ID and name of each metadata context selected for this very export.
    """

    export: ExportInfo
    structured_replies: bool
    no_zeroes: bool
    contexts: tuple[tuple[int, str], ...]
    extended_headers: bool = False
