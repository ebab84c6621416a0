"""The server's handshake, fed with bytes that are packed by hand."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packing import (
    ABORT,
    ACK,
    EXPORT_NAME,
    EXT_HEADER_REQD,
    EXTENDED,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META,
    META,
    PEEK,
    REP_INFO,
    SEND_DF,
    SERVER,
    SET_META,
    SHUTDOWN,
    STARTTLS,
    STATUS_PAYLOAD,
    STRUCTURED,
    TOO_BIG,
    UNKNOWN,
    UNSUP,
    counted,
    drain,
    flags,
    go,
    kinds,
    meta,
    option,
    split,
    talk,
)
from pynbdkit.protocol import handshake_server as hs
from pynbdkit.protocol.errors import HandshakeError
from pynbdkit.protocol.handshake_server import ExportInfo, ServerHandshake
from pynbdkit.protocol.options import BlockSize


class Exports(hs.ExportSource):
    """Two exports; ``opened`` has the names that were asked for, in order."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.queries: list[tuple[str, ...]] = []
        self.exports = {
            "": ExportInfo("disk", 2**40 + 1, 0b101, "the first disk", BlockSize(1, 4096, 2**25)),
            "disk": ExportInfo("disk", 2**40 + 1, 0b101, "the first disk"),
            "other": ExportInfo("other", 0, 0b1 | SEND_DF),
        }
        self.listing: list[tuple[str, str]] = [("disk", "the first disk"), ("other", "")]

    def list_exports(self) -> Sequence[tuple[str, str]]:
        return self.listing

    def open(self, name: str) -> ExportInfo:
        self.opened.append(name)
        if name not in self.exports:
            raise HandshakeError(UNKNOWN, f"no export {name!r}")
        return self.exports[name]

    def contexts(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        self.queries.append(tuple(queries))
        if name not in self.exports:
            raise HandshakeError(UNKNOWN, f"no export {name!r}")
        return ("base:allocation", "x-test:one", "x-test:two")


def machine(**switches: Any) -> ServerHandshake:
    return ServerHandshake(Exports(), **switches)


# --- What a good client meets ------------------------------------------------------------------


@pytest.mark.parametrize(("fixed", "no_zeroes", "number"), [(1, 1, 3), (1, 0, 1), (0, 0, 0)])
def test_greeting(fixed: int, no_zeroes: int, number: int) -> None:
    server = machine(fixed=bool(fixed), no_zeroes=bool(no_zeroes))
    assert server.greeting() == b"NBDMAGICIHAVEOPT" + struct.pack(">H", number)
    assert server.state == hs.CLIENT_FLAGS


@pytest.mark.parametrize(("client_flags", "padding"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name(client_flags: int, padding: int) -> None:
    server = machine()
    answer = drain(server, flags(client_flags) + option(EXPORT_NAME, b"disk") + b"request")
    assert answer == struct.pack(">QH", 2**40 + 1, 0b101) + bytes(padding)
    assert server.state == hs.TRANSMISSION
    assert server.leftover == b"request"
    assert server.negotiated.no_zeroes is (padding == 0)
    assert not server.negotiated.structured_replies
    assert server.negotiated.contexts == ()


def test_list() -> None:
    server = machine()
    assert talk(server, option(LIST)) == [
        (LIST, SERVER, counted(b"disk") + b"the first disk"),
        (LIST, SERVER, counted(b"other")),
        (LIST, ACK, b""),
    ]
    assert server.state == hs.OPTIONS


def test_list_leaves_out_names_that_no_client_could_send() -> None:
    exports = Exports()
    exports.listing = [("a\0b", ""), ("x" * 4097, ""), ("\udcff", ""), ("fine", "\udcff\0")]
    server = ServerHandshake(exports)
    assert talk(server, option(LIST))[:-1] == [(LIST, SERVER, counted(b"fine") + b"??")]


def test_long_descriptions_are_cut_between_characters() -> None:
    exports = Exports()
    exports.listing = [("long", "x" * 4095 + "é")]
    (server, _ack) = talk(ServerHandshake(exports), option(LIST))
    assert server.data == counted(b"long") + b"x" * 4095


@pytest.mark.parametrize("number", [INFO, GO])
def test_info_and_go_give_every_info_that_is_asked_for(number: int) -> None:
    server = machine()
    assert talk(server, option(number, go(b"", 3, 2, 1, 0, 77))) == [
        (number, REP_INFO, struct.pack(">HQH", 0, 2**40 + 1, 0b101)),
        (number, REP_INFO, struct.pack(">H", 1) + b"disk"),
        (number, REP_INFO, struct.pack(">H", 2) + b"the first disk"),
        (number, REP_INFO, struct.pack(">HIII", 3, 1, 4096, 2**25)),
        (number, ACK, b""),
    ]
    assert server.state == (hs.TRANSMISSION if number == GO else hs.OPTIONS)


def test_infos_that_are_not_asked_for_or_not_known_are_not_sent() -> None:
    assert len(talk(machine(), option(INFO, go(b"")))) == 2
    replies = talk(machine(), option(INFO, go(b"other", 1, 2, 3)))  # It has a name alone.
    assert [reply.data[:2] for reply in replies] == [b"\0\0", b"\0\1", b""]


def test_a_canonical_name_that_cannot_be_sent_is_left_out() -> None:
    exports = Exports()
    exports.exports["other"] = ExportInfo("x" * 5000, 5, 1)
    assert len(talk(ServerHandshake(exports), option(INFO, go(b"other", 1)))) == 2


def test_go_ends_the_handshake_without_padding() -> None:
    server = machine()
    tail = struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512)
    drain(server, flags(1) + option(GO, go(b"disk")) + tail)
    assert server.leftover == tail
    assert server.negotiated.export.name == "disk"
    assert server.negotiated.export.flags == 0b101


def test_structured_replies_bring_df_and_its_absence_takes_it() -> None:
    server = machine()
    answers = talk(server, option(STRUCTURED), option(INFO, go(b"disk")), option(GO, go(b"disk")))
    with_df = struct.pack(">HQH", 0, 2**40 + 1, 0b101 | SEND_DF)
    assert [answers[1].data, answers[3].data] == [with_df, with_df]
    assert server.negotiated.structured_replies
    assert server.negotiated.export.flags == 0b101 | SEND_DF
    (info, _ack) = talk(machine(), option(INFO, go(b"other")))
    assert info.data == struct.pack(">HQH", 0, 0, 0b1)


def test_has_flags_is_always_set() -> None:
    exports = Exports()
    exports.exports["disk"] = ExportInfo("disk", 7, 0)
    (info, _ack) = talk(ServerHandshake(exports), option(INFO, go(b"disk")))
    assert info.data == struct.pack(">HQH", 0, 7, 1)


def test_abort_is_answered_and_then_nothing_more_is_heard() -> None:
    server = machine()
    replies = talk(server, option(ABORT, b"data that is ignored"), option(LIST))
    assert replies == [(ABORT, ACK, b"")]
    assert server.state == hs.CLOSED
    assert server.error is None
    assert server.receive(option(LIST)) == b""
    assert server.leftover == b""


def test_negotiated_is_an_error_before_the_end() -> None:
    with pytest.raises(RuntimeError):
        _ = machine().negotiated


# --- Metadata contexts ---------------------------------------------------------------------------


def chosen(*options: bytes) -> tuple[tuple[int, str], ...]:
    server = machine()
    talk(server, option(STRUCTURED), *options)
    return server.negotiated.contexts


def test_set_meta_context_selects_for_its_export() -> None:
    server = machine()
    query = meta(b"disk", b"x-test:two", b"base:allocation", b"base:allocation", b"x-none:x")
    replies = talk(server, option(STRUCTURED), option(SET_META, query), option(GO, go(b"disk")))
    assert replies[1:4] == [
        (SET_META, META, struct.pack(">I", 1) + b"base:allocation"),
        (SET_META, META, struct.pack(">I", 2) + b"x-test:two"),
        (SET_META, ACK, b""),
    ]
    assert server.negotiated.contexts == ((1, "base:allocation"), (2, "x-test:two"))


def test_contexts_serve_export_name_as_well() -> None:
    select = option(SET_META, meta(b"disk", b"base:allocation"))
    server = machine()
    drain(server, flags() + option(STRUCTURED) + select + option(EXPORT_NAME, b"disk"))
    assert server.negotiated.contexts == ((1, "base:allocation"),)


@pytest.mark.parametrize("last", [option(GO, go(b"other")), option(EXPORT_NAME, b"other")])
def test_contexts_of_another_export_are_dropped(last: bytes) -> None:
    server = machine()
    select = option(SET_META, meta(b"disk", b"base:allocation"))
    drain(server, flags() + option(STRUCTURED) + select + last)
    assert server.negotiated.contexts == ()


@pytest.mark.parametrize(
    "second",
    [
        meta(b"disk"),
        meta(b"disk", b"base:"),  # A wildcard selects nothing.
        meta(b"disk", b"nocolon"),
        meta(b"nope", b"base:allocation"),
        b"lies",
        b"\0" * (hs.MAX_OPTION_DATA + 1),
    ],
)
def test_a_second_set_replaces_the_first_even_if_it_fails(second: bytes) -> None:
    first = option(SET_META, meta(b"disk", b"base:allocation"))
    assert chosen(first, option(GO, go(b"disk"))) != ()
    assert chosen(first, option(SET_META, second), option(GO, go(b"disk"))) == ()


def test_an_info_or_list_in_between_does_not_harm_the_selection() -> None:
    first = option(SET_META, meta(b"disk", b"base:allocation"))
    between = [option(INFO, go(b"other")), option(LIST_META, meta(b"other"))]
    assert chosen(first, *between, option(GO, go(b"disk"))) == ((1, "base:allocation"),)


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ([], [b"base:allocation", b"x-test:one", b"x-test:two"]),
        ([b"base:"], [b"base:allocation"]),
        ([b"x-test:"], [b"x-test:one", b"x-test:two"]),
        ([b"x-test:two", b"qemu:dirty-bitmap:b", b"base:x"], [b"x-test:two"]),
    ],
)
def test_list_meta_context(queries: list[bytes], names: list[bytes]) -> None:
    # Like the peer, the server answers this one before structured replies, too ("MAY").
    for before in ([], [option(STRUCTURED)]):
        replies = talk(machine(), *before, option(LIST_META, meta(b"", *queries)))[len(before) :]
        expected = [(LIST_META, META, bytes(4) + name) for name in names]
        assert replies == [*expected, (LIST_META, ACK, b"")]


def test_set_meta_context_needs_structured_replies() -> None:
    query = meta(b"", b"base:allocation")
    assert kinds(talk(machine(), option(SET_META, query))) == [INVALID]


def test_the_source_is_told_the_queries() -> None:
    exports = Exports()
    options = option(LIST_META, meta(b"")), option(SET_META, meta(b"", b"base:", b"x-test:one"))
    talk(ServerHandshake(exports), option(STRUCTURED), *options)
    assert exports.queries == [(), ("base:", "x-test:one")]


def test_contexts_of_an_unknown_export() -> None:
    query = meta(b"nope", b"base:allocation")
    replies = talk(machine(), option(STRUCTURED), option(LIST_META, query), option(SET_META, query))
    assert kinds(replies) == [ACK, UNKNOWN, UNKNOWN]


def test_no_sr_knows_neither_structured_replies_nor_contexts() -> None:
    server = machine(structured_replies=False)
    query = meta(b"", b"base:allocation")
    options = option(STRUCTURED), option(LIST_META, query), option(SET_META, query)
    assert kinds(talk(server, *options)) == [UNSUP] * 3
    talk_on = drain(server, option(GO, go(b"disk")))
    assert kinds(split(talk_on)) == [REP_INFO, ACK]
    assert not server.negotiated.structured_replies


def test_no_mc_knows_no_contexts_but_the_rest() -> None:
    server = machine(meta_contexts=False)
    query = meta(b"disk", b"base:allocation")
    options = option(EXTENDED), option(LIST_META, query), option(SET_META, query)
    replies = talk(server, *options, option(LIST_META), option(GO, go(b"disk")))
    assert kinds(replies) == [ACK, UNSUP, UNSUP, UNSUP, REP_INFO, ACK]
    assert server.negotiated.extended_headers
    assert server.negotiated.contexts == ()
    assert server.negotiated.export.flags == 0b101 | SEND_DF
    assert kinds(talk(machine(meta_contexts=False), option(STRUCTURED))) == [ACK]


def test_the_inherited_source_has_base_allocation() -> None:
    class Source(hs.ExportSource):
        def list_exports(self) -> Sequence[tuple[str, str]]:
            return ()

        def open(self, name: str) -> ExportInfo:
            return ExportInfo(name, 0, 1)

    assert list(Source().contexts("any", ())) == ["base:allocation"]


# --- Extended headers --------------------------------------------------------------------------


def test_extended_headers_imply_structured_replies() -> None:
    server = machine()
    replies = talk(server, option(EXTENDED), option(EXTENDED), option(GO, go(b"disk")))
    assert kinds(replies) == [ACK, ACK, REP_INFO, ACK]
    assert replies[2].data == struct.pack(">HQH", 0, 2**40 + 1, 0b101 | SEND_DF)
    assert server.negotiated.extended_headers
    assert server.negotiated.structured_replies


def test_extended_headers_take_precedence() -> None:
    server = machine()
    options = option(STRUCTURED), option(EXTENDED), option(STRUCTURED), option(GO, go(b"disk"))
    assert kinds(talk(server, *options)) == [ACK, ACK, EXT_HEADER_REQD, REP_INFO, ACK]
    assert server.negotiated.extended_headers
    assert server.negotiated.structured_replies


def test_who_does_not_ask_for_extended_headers_has_none() -> None:
    exports = Exports()
    exports.exports["disk"] = ExportInfo("disk", 7, 1 | STATUS_PAYLOAD)
    server = ServerHandshake(exports)
    select = option(SET_META, meta(b"disk", b"base:allocation"))
    (_ack, _context, _done, info, _end) = talk(
        server, option(STRUCTURED), select, option(GO, go(b"disk"))
    )
    assert info.data == struct.pack(">HQH", 0, 7, 1 | SEND_DF)
    assert not server.negotiated.extended_headers


@pytest.mark.parametrize("name", [b"disk", b"other"])
def test_a_filter_of_block_status_is_offered_where_contexts_are_selected(name: bytes) -> None:
    server = machine()
    select = option(SET_META, meta(b"disk", b"base:allocation", b"x-test:two"))
    replies = talk(server, select, option(EXTENDED), select, option(INFO, go(name)))
    assert kinds(replies) == [INVALID, ACK, META, META, ACK, REP_INFO, ACK]
    drain(server, option(GO, go(name)))
    shown = struct.unpack(">HQH", replies[5].data)[2]
    assert bool(shown & STATUS_PAYLOAD) is (name == b"disk")
    assert server.negotiated.export.flags == shown
    assert len(server.negotiated.contexts) == (2 if name == b"disk" else 0)


def test_a_filter_is_not_offered_once_no_context_is_selected() -> None:
    server = machine()
    select = [option(SET_META, meta(b"disk", query)) for query in (b"base:allocation", b"x-no:x")]
    talk(server, option(EXTENDED), *select, option(GO, go(b"disk")))
    assert server.negotiated.export.flags == 0b101 | SEND_DF


def test_extended_headers_forbid_export_name() -> None:
    exports = Exports()
    server = ServerHandshake(exports)
    assert kinds(talk(server, option(EXTENDED), option(EXPORT_NAME, b"disk"))) == [ACK]
    assert server.state == hs.CLOSED
    assert server.error == "NBD_OPT_EXPORT_NAME: not allowed with extended headers"
    assert exports.opened == []


@pytest.mark.parametrize("switch", ["extended_headers", "structured_replies"])
def test_extended_headers_switched_off(switch: str) -> None:
    server = machine(**{switch: False})
    options = option(EXTENDED), option(EXTENDED, b"x"), option(GO, go(b"disk"))
    assert kinds(talk(server, *options)) == [UNSUP, UNSUP, REP_INFO, ACK]
    assert not server.negotiated.extended_headers
    assert not server.negotiated.structured_replies


# --- Oldstyle ----------------------------------------------------------------------------------


def test_oldstyle() -> None:
    export = ExportInfo("disk", 2**40 + 1, 0b100 | SEND_DF | STATUS_PAYLOAD, "the first disk")
    greeting = hs.oldstyle(export)
    assert greeting[:16] == b"NBDMAGIC" + bytes.fromhex("0000420281861253")
    assert greeting[16:] == struct.pack(">QI", 2**40 + 1, 0b101) + bytes(124)
    negotiated = hs.oldstyle_negotiated(export)
    assert negotiated.export == export._replace(flags=0b101)
    assert negotiated[1:] == (False, False, (), False)


# --- What a bad client meets: refused, and the connection goes on ------------------------------

REFUSED = {
    "unknown option": (option(77, b"payload"), UNSUP),
    "withdrawn option": (option(PEEK), UNSUP),
    "no TLS here": (option(STARTTLS), UNSUP),
    "unknown option of 1 MiB": (option(77, bytes(2**20)), UNSUP),
    "LIST with data": (option(LIST, b"x"), INVALID),
    "STRUCTURED_REPLY with data": (option(STRUCTURED, b"x"), INVALID),
    "EXTENDED_HEADERS with data": (option(EXTENDED, b"x"), INVALID),
    "INFO without data": (option(INFO), INVALID),
    "INFO: name longer than the data": (option(INFO, struct.pack(">I", 99) + bytes(2)), INVALID),
    "INFO: no room for the count": (option(INFO, counted(b"disk")), INVALID),
    "INFO: count too high": (option(INFO, counted(b"disk") + b"\0\2\0\0"), INVALID),
    "INFO: data after its end": (option(INFO, go(b"disk") + b"\0"), INVALID),
    "INFO: name of 4 GiB": (option(INFO, b"\xff" * 10), INVALID),
    "INFO: unknown export": (option(INFO, go(b"nope")), UNKNOWN),
    "GO: unknown export": (option(GO, go(b"nope")), UNKNOWN),
    "GO: name of 4097 bytes": (option(GO, go(b"x" * 4097)), TOO_BIG),
    "GO: NUL in the name": (option(GO, go(b"di\0sk")), INVALID),
    "GO: name not UTF-8": (option(GO, go(b"\xff")), INVALID),
    "GO: surrogate in the name": (option(GO, go(b"\xed\xa0\x80")), INVALID),
    "GO: longer than any that is right": (option(GO, bytes(hs.MAX_OPTION_DATA + 1)), TOO_BIG),
    "GO: 1 MiB": (option(GO, bytes(2**20)), TOO_BIG),
    "META: no data": (option(LIST_META), INVALID),
    "META: name lies": (option(LIST_META, struct.pack(">I", 500)), INVALID),
    "META: count lies": (option(LIST_META, counted(b"") + b"\xff\xff\xff\xff"), INVALID),
    "META: query lies": (option(LIST_META, meta(b"", b"base:")[:-1]), INVALID),
    "META: data after its end": (option(LIST_META, meta(b"") + b"\0"), INVALID),
    "META: query of 4097 bytes": (option(LIST_META, meta(b"", b"b:" + b"x" * 4095)), TOO_BIG),
    "META: query without colon": (option(LIST_META, meta(b"", b"base")), INVALID),
    "META: query without namespace": (option(LIST_META, meta(b"", b":leaf")), INVALID),
    "META: NUL in the query": (option(LIST_META, meta(b"", b"base:\0")), INVALID),
    "META: name of 4097 bytes": (option(LIST_META, meta(b"x" * 4097)), TOO_BIG),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_connection_kept(name: str) -> None:
    data, code = REFUSED[name]
    server = machine()
    refusal, info, ack = talk(server, data, option(GO, go(b"disk")))
    assert (refusal.option, refusal.kind) == (struct.unpack_from(">I", data, 8)[0], code)
    refusal.data.decode()  # A text for people, as the specification has it.
    assert (info.kind, ack.kind) == (REP_INFO, ACK)
    assert server.state == hs.TRANSMISSION
    assert server.error is None


def test_the_longest_name_is_taken() -> None:
    exports = Exports()
    exports.exports["x" * 4096] = ExportInfo("", 5, 1)
    server = ServerHandshake(exports)
    assert kinds(talk(server, option(GO, go(b"x" * 4096)))) == [REP_INFO, ACK]


def test_the_longest_go_is_taken() -> None:
    exports = Exports()
    exports.exports["x" * 4096] = ExportInfo("", 5, 1)
    server = ServerHandshake(exports)
    data = go(b"x" * 4096, *range(65535))
    assert len(data) == hs.MAX_OPTION_DATA
    assert kinds(talk(server, option(GO, data)))[-1] == ACK


def test_a_client_that_did_not_agree_to_fixed_newstyle_has_export_name_alone() -> None:
    server = machine()
    replies = talk(server, option(LIST), option(GO, go(b"disk")), option(77, b"x"), client_flags=0)
    assert kinds(replies) == [INVALID] * 3
    assert len(drain(server, option(EXPORT_NAME, b"disk"))) == 134
    server = machine()
    assert kinds(talk(server, option(ABORT), client_flags=0)) == [ACK]


def test_shutdown_refuses_everything_but_abort() -> None:
    server = machine()
    server.receive(flags())
    server.begin_shutdown()
    options = option(LIST), option(GO, go(b"disk")), option(77), option(ABORT)
    assert kinds(split(drain(server, b"".join(options)))) == [SHUTDOWN] * 3 + [ACK]
    server = machine()
    server.begin_shutdown()
    assert drain(server, flags() + option(EXPORT_NAME, b"disk")) == b""
    assert server.state == hs.CLOSED


# --- What a bad client meets: the end ----------------------------------------------------------

ENDED = {
    "unknown client flag": (flags(0x83), "0x83"),
    "no IHAVEOPT": (flags() + bytes(16), "magic 0x0000000000000000"),
    "a request instead of an option": (flags() + struct.pack(">IHHQQI", 0x25609513, *[0] * 5), ""),
    "option of 64 MiB and a byte": (flags() + option(77, length=2**26 + 1), "67108865 bytes"),
    "option of 4 GiB": (flags() + option(GO, length=2**32 - 1), "4294967295 bytes"),
    "ABORT of 4 GiB": (flags() + option(ABORT, length=2**32 - 1), "4294967295 bytes"),
    "EXPORT_NAME of 4097 bytes": (flags() + option(EXPORT_NAME, length=4097), "4097 bytes"),
    "EXPORT_NAME: unknown": (flags() + option(EXPORT_NAME, b"nope"), "no export 'nope'"),
    "EXPORT_NAME: NUL": (flags() + option(EXPORT_NAME, b"a\0"), "NUL"),
    "EXPORT_NAME: not UTF-8": (flags() + option(EXPORT_NAME, b"\xff"), "UTF-8"),
}


@pytest.mark.parametrize("name", ENDED)
def test_ended(name: str) -> None:
    data, text = ENDED[name]
    server = machine()
    assert drain(server, data) == b""
    assert server.state == hs.CLOSED
    assert server.error is not None
    assert text in server.error
    assert "\n" not in server.error
    assert server.receive(option(ABORT)) == b""


@pytest.mark.parametrize(("fixed", "no_zeroes", "client"), [(0, 1, 1), (1, 0, 2), (0, 0, 3)])
def test_flags_that_were_not_offered(fixed: int, no_zeroes: int, client: int) -> None:
    server = machine(fixed=bool(fixed), no_zeroes=bool(no_zeroes))
    drain(server, flags(client))
    assert server.state == hs.CLOSED


def test_without_fixed_newstyle_export_name_is_the_only_option() -> None:
    server = machine(fixed=False)
    assert len(drain(server, flags(2) + option(EXPORT_NAME, b"disk"))) == 10
    server = machine(fixed=False)
    assert drain(server, flags(2) + option(LIST)) == b""
    assert server.state == hs.CLOSED


def test_options_without_end() -> None:
    server = machine()
    server.receive(flags())
    for _ in range(hs.MAX_OPTIONS):
        assert server.receive(option(77)) != b""
    assert server.receive(option(77)) == b""
    assert server.state == hs.CLOSED
    assert server.error is not None


# --- Memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [77, LIST, GO, SET_META, ABORT])
def test_a_payload_that_is_skipped_is_not_kept(number: int) -> None:
    server = machine()
    server.receive(flags() + option(number, length=2**24))
    for _ in range(255):
        assert server.receive(bytes(65536)) == b""
        assert len(server._input) == 0
    assert len(split(server.receive(bytes(65536)))) == 1
    server.receive(b"more")
    assert len(server._input) == (0 if number == ABORT else 4)


def test_a_closed_machine_holds_nothing() -> None:
    server = machine()
    server.receive(flags() + bytes(16) + bytes(100_000))
    assert len(server._input) == 0


def test_pipelined_options_are_answered_in_bounded_pieces() -> None:
    exports = Exports()
    exports.listing = [(f"{number:04}", "") for number in range(1000)]
    server = ServerHandshake(exports)
    answer = server.receive(flags() + option(LIST) * 200)
    total = 0
    while answer:
        assert len(answer) < hs.MAX_REPLY_BATCH + 1000 * 28 + 20
        total += len(answer)
        answer = server.receive(b"")
    assert total == 200 * (1000 * 28 + 20)


# --- Any split gives the same ------------------------------------------------------------------

names = st.sampled_from([b"", b"disk", b"other", b"nope", b"\xff"])
queries = st.sampled_from([b"base:", b"base:allocation", b"x-test:one", b"q:x", b"nocolon"])
infos = st.lists(st.integers(0, 5), max_size=4)
payloads = st.one_of(
    st.just(b""),
    st.binary(max_size=30),
    st.builds(lambda name, wanted: go(name, *wanted), names, infos),
    st.builds(lambda name, wanted: meta(name, *wanted), names, st.lists(queries, max_size=3)),
    names,
)
options = st.builds(option, st.integers(1, 12), payloads)
conversations = st.tuples(
    st.sampled_from([flags(0), flags(1), flags(2), flags(3), flags(3), flags(3), flags(4)]),
    st.lists(options, max_size=8).map(b"".join),
    st.binary(max_size=40),
).map(b"".join)


def outcome(server: ServerHandshake, output: bytes) -> tuple[object, ...]:
    negotiated = server.negotiated if server.state == hs.TRANSMISSION else None
    return output, server.state, server.error, server.leftover, negotiated


@given(
    tls=st.sampled_from(["off", "on", "require"]),
    data=conversations,
    cuts=st.lists(st.integers(0, 300), max_size=20),
)
def test_any_split_gives_the_same(tls: str, data: bytes, cuts: list[int]) -> None:
    at_once = machine(tls=tls)
    expected = outcome(at_once, drain(at_once, data))
    by_byte = machine(tls=tls)
    output = b"".join(drain(by_byte, data[at : at + 1]) for at in range(len(data)))
    assert outcome(by_byte, output) == expected
    in_pieces = machine(tls=tls)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[start:end] for start, end in itertools.pairwise(places)]
    output = b"".join(drain(in_pieces, piece) for piece in pieces)
    assert outcome(in_pieces, output) == expected


@given(st.binary(max_size=200))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    for head in (b"", flags(), flags() + option(STRUCTURED)):
        server = machine()
        drain(server, head + data)
        drain(server, option(INFO, data))
        drain(server, option(SET_META, data))
