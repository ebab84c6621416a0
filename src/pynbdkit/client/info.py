"""What `pynbd info` tells: gathered from a server without opening an export where that can be.

Theory: one connection asks LIST, and INFO with the contexts of one export; it is left by ABORT.
Each further export of a listing gets a connection of its own, because servers limit how many
options one connection may send. A server without INFO is asked by entering the transmission
phase, which is left at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..protocol import constants as nbd
from ..protocol.errors import HandshakeError
from ..protocol.handshake_client import ClientHandshake
from ..protocol.options import shorten
from .connection import Client, negotiate
from .uri import Uri, parse_uri

if TYPE_CHECKING:
    from ..protocol.negotiated import ExportInfo

_CAN = (
    ("can_block_status_payload", nbd.FLAG_BLOCK_STATUS_PAYLOAD),
    ("can_cache", nbd.FLAG_SEND_CACHE),
    ("can_df", nbd.FLAG_SEND_DF),
    ("can_fast_zero", nbd.FLAG_SEND_FAST_ZERO),
    ("can_flush", nbd.FLAG_SEND_FLUSH),
    ("can_fua", nbd.FLAG_SEND_FUA),
    ("can_multi_conn", nbd.FLAG_CAN_MULTI_CONN),
    ("can_trim", nbd.FLAG_SEND_TRIM),
    ("can_zero", nbd.FLAG_SEND_WRITE_ZEROES),
)


class ExportReport(NamedTuple):
    """One export: where it is, what the server says of it, and its metadata contexts."""

    uri: Uri
    export: ExportInfo
    contexts: tuple[str, ...]


class ServerReport(NamedTuple):
    """A server: its protocol, and each export that was asked about.

    ``listing`` has name and description of every export that the server names, or is None if
    the server gives no list.
    """

    protocol: str
    tls: bool
    structured_replies: bool
    extended_headers: bool
    listing: list[tuple[str, str]] | None
    exports: list[ExportReport]


def gather(uri: str | Uri, *, list_all: bool = False, timeout: float | None = None) -> ServerReport:
    """Ask a server about the export in ``uri``, or with ``list_all`` about each that it lists.

    ``timeout`` is in seconds, for each wait. Raises UriError, OSError (nobody answers; TlsError),
    HandshakeError (the server refuses) and ProtocolError (it breaks the protocol). An export
    that is listed and gone, or refused, when it is asked about is left out.
    """
    target = parse_uri(uri) if isinstance(uri, str) else uri
    if not list_all:
        return _ask(target, timeout)
    handshake = ClientHandshake(None, list_exports=True, tls=_tls(target))
    negotiate(target, handshake, timeout).close()
    exports = []
    for name, description in handshake.exports or []:
        try:
            (report,) = _ask(target._replace(export=name), timeout).exports
        except HandshakeError:
            continue
        if description and not report.export.description:
            export = report.export._replace(description=description)
            report = report._replace(export=export)
        exports.append(report)
    return _report(handshake, exports)


def _tls(uri: Uri) -> str:
    return "off" if uri.tls is None else "require"


def _report(handshake: ClientHandshake, exports: list[ExportReport]) -> ServerReport:
    return ServerReport(
        handshake.protocol,
        handshake.tls,
        handshake.structured_replies,
        handshake.extended_headers,
        handshake.exports,
        exports,
    )


def _ask(uri: Uri, timeout: float | None) -> ServerReport:
    """Ask about one export."""
    handshake = ClientHandshake(
        uri.export,
        enter=False,
        list_exports=True,
        list_contexts=True,
        contexts=(),
        tls=_tls(uri),
    )
    try:
        sock = negotiate(uri, handshake, timeout)
    except HandshakeError as refusal:
        if refusal.code != nbd.REP_ERR_UNSUP:
            raise _with_listing(refusal, handshake.exports) from None
    else:
        if handshake.export is not None and handshake.protocol == "oldstyle":
            Client(sock, handshake).close()
        sock.close()
    if handshake.export is None:  # The server has no INFO.
        listing = handshake.exports
        handshake = ClientHandshake(uri.export, list_contexts=True, tls=_tls(uri))
        Client(negotiate(uri, handshake, timeout), handshake).close()
        handshake.exports = listing
    assert handshake.export is not None
    export = ExportReport(uri, handshake.export, handshake.available_contexts or ())
    return _report(handshake, [export])


def _with_listing(refusal: HandshakeError, listing: list[tuple[str, str]] | None) -> HandshakeError:
    """Return a refusal that also tells which exports could be had."""
    if not listing:
        return refusal
    names = ", ".join([shorten(name) for name, _ in listing[:5]])
    more = f" and {len(listing) - 5} more" if len(listing) > 5 else ""
    return HandshakeError(refusal.code, f"{refusal.message}; it lists {names}{more}")


def as_json(report: ServerReport) -> str:
    """Return the report as JSON, with the keys of libnbd's nbdinfo (1.22)."""
    import json

    document = {
        "protocol": report.protocol,
        "TLS": report.tls,
        "structured": report.structured_replies,
        "extended": report.extended_headers,
        "exports": [_fields(export) for export in report.exports],
        "listing": None
        if report.listing is None
        else [{"export-name": name, "description": text} for name, text in report.listing],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def as_text(report: ServerReport) -> str:
    """Return the report as lines for people, in the form of libnbd's nbdinfo (1.22)."""
    packets = "structured" if report.structured_replies else "simple"
    packets = "extended" if report.extended_headers else packets
    tls = "with" if report.tls else "without"
    lines = [f"protocol: {report.protocol} {tls} TLS, using {packets} packets"]
    for export in report.exports:
        fields = _fields(export)
        lines.append(f'export="{_printable(export.export.name)}":')
        if "description" in fields:
            lines.append(f"\tdescription: {_printable(export.export.description)}")
        lines.append(f"\texport-size: {_size(export.export.size)}")
        lines.append(f"\turi: {export.uri}")
        if export.contexts:
            lines.append("\tcontexts:")
            lines += [f"\t\t{_printable(context)}" for context in export.contexts]
        for key, value in fields.items():
            if key.startswith(("is_", "can_")):
                lines.append(f"\t{key}: {str(value).lower()}")
        if export.export.block_size is not None:
            for key, value in export.export.block_size._asdict().items():
                lines.append(f"\tblock_size_{key}: {_size(value)}")
    shown = {export.uri.export for export in report.exports}
    shown |= {export.export.name for export in report.exports}
    others = [item for item in report.listing or [] if item[0] not in shown]
    if others:
        lines.append("also listed:")
    for name, description in others:
        about = f": {_printable(description)}" if description else ""
        lines.append(f'\texport="{_printable(name)}"{about}')
    return "\n".join(lines)


def _fields(report: ExportReport) -> dict[str, object]:
    export = report.export
    fields: dict[str, object] = {"export-name": export.name}
    if export.description:
        fields["description"] = export.description
    fields["uri"] = str(report.uri)
    if report.contexts:
        fields["contexts"] = list(report.contexts)
    fields["is_rotational"] = bool(export.flags & nbd.FLAG_ROTATIONAL)
    fields["is_read_only"] = bool(export.flags & nbd.FLAG_READ_ONLY)
    for key, flag in _CAN:
        fields[key] = bool(export.flags & flag)
    if export.block_size is not None:
        minimum, preferred, maximum = export.block_size
        fields["block_size_minimum"] = minimum
        fields["block_size_preferred"] = preferred
        fields["block_size_maximum"] = maximum
    fields["export-size"] = export.size
    fields["export-size-str"] = human_size(export.size)
    return fields


def _size(size: int) -> str:
    """Return a size in bytes, and for people if that is another number."""
    human = human_size(size)
    return f"{size}" if human == f"{size}" else f"{size} ({human})"


def human_size(size: int) -> str:
    """Return a size in bytes with the largest unit of 1024 that divides it: ``1536K``."""
    units = iter(("", "K", "M", "G", "T", "P", "E"))
    unit = next(units)
    while size and size % 1024 == 0:
        size //= 1024
        unit = next(units)
    return f"{size}{unit}"


def _printable(text: str) -> str:
    """Return a server's text without the control characters that would move the cursor."""
    return "".join([char if char.isprintable() else "?" for char in text])
