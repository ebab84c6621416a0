"""The client's handshake: against our server machine, and against servers made of raw bytes."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit.protocol import handshake_client as hc
from pynbdkit.protocol import options
from pynbdkit.protocol.errors import HandshakeError, ProtocolError
from pynbdkit.protocol.handshake_client import ClientHandshake, ExportInfo
from pynbdkit.protocol.handshake_server import ExportSource, ServerHandshake
from pynbdkit.protocol.options import BlockSize

EXPORT_NAME, ABORT, LIST, _, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = range(
    1, 12
)
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, SHUTDOWN = (2**31 + n for n in (1, 2, 3, 5, 6, 7))
SEND_DF = 1 << 7
PAYLOAD = 1 << 12


class Exports(ExportSource):
    """The exports of the server that the client is wired to."""

    names = ("", "disk", "größe")

    def list_exports(self) -> Sequence[tuple[str, str]]:
        return [(name, f"about {name}") for name in self.names]

    def open(self, name: str) -> ExportInfo:
        if name not in self.names:
            raise HandshakeError(UNKNOWN, f"no export {name!r}")
        return ExportInfo(name or "disk", 12345, 0b101, "text", BlockSize(1, 4096, 2**25))

    def contexts(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        return ("base:allocation", "x-test:one")


def wire(client: ClientHandshake, server: ServerHandshake) -> None:
    """Carry bytes between the two until nothing moves; the server's end is told to the client."""
    to_client = server.greeting()
    while to_client:
        to_server = client.receive(to_client)
        if client.state == hc.STARTTLS:
            assert (server.state, server.leftover) == ("STARTTLS", b"")
            server.tls_started()
            to_server = client.tls_started()
        to_client = answer = server.receive(to_server)
        while answer:
            answer = server.receive(b"")
            to_client += answer
    if server.state == "CLOSED" and client.state not in (hc.CLOSED, hc.TRANSMISSION):
        client.receive_eof()


@pytest.mark.parametrize("export", [None, "", "disk", "größe", "nope"])
@pytest.mark.parametrize("enter", [True, False])
@pytest.mark.parametrize("list_exports", [True, False])
@pytest.mark.parametrize("server_fixed", [True, False])
@pytest.mark.parametrize("client_fixed", [True, False])
def test_every_combination_of_wishes_and_offers(
    export: str | None, enter: bool, list_exports: bool, server_fixed: bool, client_fixed: bool
) -> None:
    fixed = server_fixed and client_fixed
    for structured, contexts, offer, no_zeroes, list_contexts, extended in itertools.product(
        (True, False),
        ((), ("base:allocation", "x-no:x")),
        (True, False),
        range(4),
        (True, False),
        range(4),
    ):
        server = ServerHandshake(
            Exports(),
            structured_replies=offer,
            extended_headers=bool(extended & 1),
            fixed=server_fixed,
            no_zeroes=bool(no_zeroes & 1),
        )
        client = ClientHandshake(
            export,
            enter=enter,
            list_exports=list_exports,
            structured_replies=structured,
            extended_headers=bool(extended & 2),
            contexts=contexts,
            list_contexts=list_contexts,
            fixed=client_fixed,
            no_zeroes=bool(no_zeroes & 2),
        )
        wire(client, server)
        assert client.protocol == ("newstyle-fixed" if fixed else "newstyle")
        listed = [(name, f"about {name}") for name in Exports.names]
        assert client.exports == (listed if list_exports and fixed else None)
        granted = fixed and structured and offer
        assert client.structured_replies is granted
        headers = granted and extended == 3
        assert client.extended_headers is headers
        if fixed and offer and list_contexts and export is not None:
            assert client.available_contexts == ("base:allocation", "x-test:one")
        else:
            assert client.available_contexts is None
        possible = export in Exports.names and (fixed or enter)
        if not possible:
            assert client.state == hc.CLOSED
            assert (client.refusal is None) is (export is None and fixed)
            assert client.export is None
            continue
        assert client.refusal is None
        assert client.export is not None
        assert client.export.size == 12345
        flags = 0b101 | (SEND_DF if granted else 0) | (PAYLOAD if headers and contexts else 0)
        assert client.export.flags == flags
        if fixed:
            assert client.export.name == (export or "disk")
            assert client.export.description == "text"
            assert client.export.block_size == BlockSize(1, 4096, 2**25)
        selected = ((1, "base:allocation"),) if granted and contexts else ()
        assert client.contexts == selected
        if enter:
            assert client.state == hc.TRANSMISSION
            mine, its = client.negotiated, server.negotiated
            assert mine[1:] == its[1:]
            assert mine.export[1:3] == its.export[1:3]
            assert mine.no_zeroes is (no_zeroes == 3)
            assert (client.leftover, server.leftover) == (b"", b"")
        else:
            assert client.state == hc.CLOSED
            assert server.error is None


def test_negotiated_is_an_error_before_the_end() -> None:
    with pytest.raises(RuntimeError):
        _ = ClientHandshake().negotiated


@pytest.mark.parametrize("name", ["a\0b", "x" * 4097, "\udcff"])
def test_names_that_cannot_be_sent(name: str) -> None:
    with pytest.raises(ValueError, match="export name"):
        ClientHandshake(name)
    with pytest.raises(ValueError, match="metadata context"):
        ClientHandshake(contexts=[name])


# --- Servers made of bytes -----------------------------------------------------------------------


def greeting(flags: int = 3) -> bytes:
    return b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def counted(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


EXPORT = struct.pack(">HQH", 0, 2**50, 0b1)
NO_EXTENDED = reply(EXTENDED, UNSUP)
GO_OK = reply(GO, REP_INFO, EXPORT) + reply(GO, ACK)


def sent(data: bytes) -> list[int]:
    """The options in what a client sent."""
    numbers = []
    while data:
        assert data[:8] == b"IHAVEOPT"
        number, length = struct.unpack_from(">II", data, 8)
        numbers.append(number)
        data = data[16 + length :]
    return numbers


def test_first_words_of_a_client() -> None:
    client = ClientHandshake("disk")
    assert client.receive(greeting()) == struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(
        ">II", EXTENDED, 0
    )
    assert client.receive(NO_EXTENDED) == b"IHAVEOPT" + struct.pack(">II", STRUCTURED, 0)
    assert client.receive(reply(STRUCTURED, ACK)) == b"IHAVEOPT" + struct.pack(
        ">II", SET_META, 4 + 4 + 4 + 4 + 15
    ) + counted(b"disk") + struct.pack(">I", 1) + counted(b"base:allocation")
    assert client.receive(reply(SET_META, ACK)) == b"IHAVEOPT" + struct.pack(
        ">II", GO, 4 + 4 + 2 + 6
    ) + counted(b"disk") + struct.pack(">HHHH", 3, 1, 2, 3)
    assert client.receive(GO_OK + b"reply") == b""
    assert client.state == hc.TRANSMISSION
    assert client.leftover == b"reply"


def test_unknown_handshake_flags_are_ignored() -> None:
    assert ClientHandshake().receive(greeting(0xFFFF))[:4] == struct.pack(">I", 3)


def test_go_falls_back_to_export_name() -> None:
    client = ClientHandshake("disk", structured_replies=False)
    client.receive(greeting(1))
    # Whatever came before the refusal does not count.
    answer = client.receive(reply(GO, REP_INFO, b"\0\1other") + reply(GO, UNSUP, b"what is this"))
    assert answer == b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 4) + b"disk"
    assert client.receive(struct.pack(">QH", 77, 1) + bytes(123)) == b""
    assert client.state == hc.OPTIONS
    client.receive(b"\0" + b"reply")
    assert client.negotiated.export == ExportInfo("disk", 77, 1)
    assert client.leftover == b"reply"


def test_refusals_on_the_way_do_not_end_it() -> None:
    client = ClientHandshake("disk", list_exports=True, list_contexts=True)
    assert sent(client.receive(greeting())[4:]) == [LIST]
    assert sent(client.receive(reply(LIST, POLICY))) == [EXTENDED]
    assert sent(client.receive(reply(EXTENDED, UNSUP))) == [STRUCTURED]
    assert sent(client.receive(reply(STRUCTURED, ACK))) == [LIST_META]
    meta = struct.pack(">I", 1) + b"base:allocation"
    refused = reply(LIST_META, META, meta) + reply(LIST_META, INVALID)
    assert sent(client.receive(refused)) == [SET_META]
    # Contexts that came before an error are to be disregarded, in the next option as well.
    other = struct.pack(">I", 2) + b"base:allocation"
    assert sent(client.receive(reply(SET_META, META, other) + reply(SET_META, ACK))) == [GO]
    client.receive(GO_OK)
    assert client.negotiated.contexts == ((2, "base:allocation"),)
    assert client.available_contexts is None
    assert client.exports is None


def test_contexts_are_not_kept_if_set_fails() -> None:
    client = ClientHandshake("disk")
    client.receive(greeting() + NO_EXTENDED + reply(STRUCTURED, ACK))
    meta = struct.pack(">I", 1) + b"base:allocation"
    client.receive(reply(SET_META, META, meta) + reply(SET_META, INVALID) + GO_OK)
    assert client.negotiated.contexts == ()


def test_each_context_is_asked_for_once() -> None:
    once, twice = (ClientHandshake("disk", contexts=["x:y"] * times) for times in (1, 2))
    start = greeting() + NO_EXTENDED + reply(STRUCTURED, ACK)
    assert once.receive(start) == twice.receive(start)


@pytest.mark.parametrize("code", [TLS_REQD, SHUTDOWN])
def test_refusals_that_end_it_wherever_they_come(code: int) -> None:
    client = ClientHandshake("disk")
    client.receive(greeting())
    assert sent(client.receive(reply(EXTENDED, code))) == [ABORT]
    assert client.refusal is not None
    assert client.refusal.code == code
    assert "the server" in str(client.refusal)


# --- Extended headers ----------------------------------------------------------------------------

INFO_PAYLOAD = struct.pack(">HQH", 0, 2**50, 1 | SEND_DF | PAYLOAD)


def test_extended_headers_include_structured_replies() -> None:
    client = ClientHandshake("disk")
    client.receive(greeting())
    # STRUCTURED_REPLY would now be an error (EXT_HEADER_REQD).
    assert sent(client.receive(reply(EXTENDED, ACK))) == [SET_META]
    meta = struct.pack(">I", 1) + b"base:allocation"
    assert sent(client.receive(reply(SET_META, META, meta) + reply(SET_META, ACK))) == [GO]
    client.receive(reply(GO, REP_INFO, INFO_PAYLOAD) + reply(GO, ACK))
    agreed = client.negotiated
    assert (agreed.extended_headers, agreed.structured_replies) == (True, True)
    assert agreed.export.flags == 1 | SEND_DF | PAYLOAD


@pytest.mark.parametrize("code", [UNSUP, POLICY, INVALID])
def test_without_extended_headers_nothing_is_lost(code: int) -> None:
    client = ClientHandshake("disk")
    client.receive(greeting())
    assert sent(client.receive(reply(EXTENDED, code))) == [STRUCTURED]
    client.receive(reply(STRUCTURED, ACK) + reply(SET_META, ACK))
    # The flag means nothing without them.
    client.receive(reply(GO, REP_INFO, INFO_PAYLOAD) + reply(GO, ACK))
    agreed = client.negotiated
    assert (agreed.extended_headers, agreed.structured_replies) == (False, True)
    assert agreed.export.flags == 1 | SEND_DF


@pytest.mark.parametrize(
    ("structured", "extended", "first"),
    [(True, False, STRUCTURED), (False, True, GO), (False, False, GO)],
)
def test_extended_headers_are_not_asked_for(structured: bool, extended: bool, first: int) -> None:
    client = ClientHandshake("disk", structured_replies=structured, extended_headers=extended)
    assert sent(client.receive(greeting())[4:]) == [first]


def test_export_name_does_not_follow_extended_headers() -> None:
    client = ClientHandshake("disk", contexts=())
    client.receive(greeting() + reply(EXTENDED, ACK))
    assert sent(client.receive(reply(GO, UNSUP))) == [ABORT]
    assert client.refusal is not None


# --- STARTTLS ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["on", "require"])
@pytest.mark.parametrize("offer", ["on", "require"])
def test_tls_comes_first_and_the_rest_over_it(mode: str, offer: str) -> None:
    server = ServerHandshake(Exports(), tls=offer)
    client = ClientHandshake("disk", list_exports=True, list_contexts=True, tls=mode)
    wire(client, server)
    assert (client.tls, server.secure) == (True, True)
    assert client.negotiated == server.negotiated._replace(export=client.negotiated.export)
    assert client.negotiated.export.name == "disk"
    assert client.negotiated.extended_headers
    assert client.exports is not None


def test_starttls_step_by_step() -> None:
    client = ClientHandshake("disk", list_exports=True, tls="require")
    with pytest.raises(RuntimeError):
        client.tls_started()
    assert sent(client.receive(greeting())[4:]) == [STARTTLS]
    assert client.receive(reply(STARTTLS, ACK)) == b""
    assert client.state == hc.STARTTLS
    assert client.tls is False
    assert sent(client.tls_started()) == [LIST]
    assert client.state == hc.OPTIONS
    assert client.tls is True
    assert sent(client.receive(reply(LIST, ACK))) == [EXTENDED]
    with pytest.raises(RuntimeError):
        client.tls_started()


@pytest.mark.parametrize("apart", [True, False])
def test_what_is_injected_behind_the_ack_is_not_taken_for_protocol(apart: bool) -> None:
    client = ClientHandshake("disk", list_exports=True, tls="require")
    client.receive(greeting())
    injected = reply(LIST, SERVER, counted(b"evil")) + reply(LIST, ACK)
    with pytest.raises(ProtocolError, match="plain data"):
        if apart:
            client.receive(reply(STARTTLS, ACK))
            client.receive(injected[:1])
        else:
            client.receive(reply(STARTTLS, ACK) + injected)
    assert client.state == hc.CLOSED
    assert client.exports is None


@pytest.mark.parametrize("code", [UNSUP, POLICY, INVALID])
def test_a_server_without_tls(code: int) -> None:
    client = ClientHandshake("disk", tls="on")
    client.receive(greeting())
    assert sent(client.receive(reply(STARTTLS, code))) == [EXTENDED]
    assert client.tls is False
    client = ClientHandshake("disk", tls="require")
    client.receive(greeting())
    assert sent(client.receive(reply(STARTTLS, code, b"no such thing"))) == [ABORT]
    assert client.refusal is not None
    assert str(client.refusal) == "the server refused TLS: no such thing"
    assert client.refusal.code == code


@pytest.mark.parametrize("name", ["not fixed", "oldstyle"])
@pytest.mark.parametrize("mode", ["on", "require"])
def test_a_server_too_old_for_tls(mode: str, name: str) -> None:
    client = ClientHandshake("disk", tls=mode)
    client.receive(OLDSTYLE if name == "oldstyle" else greeting(2) + struct.pack(">QH", 77, 1))
    if mode == "on":
        assert client.negotiated.export.name == "disk"
    else:
        assert client.state == hc.CLOSED
        assert client.export is None
        assert "no TLS" in str(client.refusal)


def test_a_server_that_goes_away_before_tls() -> None:
    client = ClientHandshake("disk", tls="require")
    client.receive(greeting() + reply(STARTTLS, ACK))
    with pytest.raises(ProtocolError, match="before TLS"):
        client.receive_eof()


def test_there_is_no_other_way_to_use_tls() -> None:
    with pytest.raises(ValueError, match="'yes'"):
        ClientHandshake("disk", tls="yes")


# --- Ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [
        reply(ABORT, ACK),
        reply(ABORT, UNSUP),
        reply(ABORT, SHUTDOWN),  # no reason to send another ABORT, and so on for ever
        reply(ABORT, TLS_REQD),
        None,
    ],
    ids=["ack", "error", "shutdown", "tls", "eof"],
)
def test_a_refused_export_ends_by_abort(end: bytes | None) -> None:
    client = ClientHandshake("disk", structured_replies=False)
    client.receive(greeting())
    assert sent(client.receive(reply(GO, UNKNOWN, b"it is\nnot\x1b[31m here"))) == [ABORT]
    assert client.state == hc.ABORTING
    if end is None:
        client.receive_eof()
    else:
        assert client.receive(end) == b""
    assert client.state == hc.CLOSED
    assert client.refusal is not None
    assert client.refusal.code == UNKNOWN
    assert str(client.refusal) == "the server refused the export 'disk': it is not [31m here"


def test_a_refusal_without_a_text_names_its_code() -> None:
    client = ClientHandshake("disk", structured_replies=False)
    client.receive(greeting())
    client.receive(reply(GO, UNKNOWN))
    assert "NBD_REP_ERR_UNKNOWN" in str(client.refusal)


def test_a_server_that_closes_after_export_name_has_no_such_export() -> None:
    client = ClientHandshake("disk")
    client.receive(greeting(0))
    client.receive_eof()
    assert client.refusal is not None
    assert client.refusal.code == UNKNOWN
    assert "'disk'" in client.refusal.message


def test_unknown_infos_are_ignored() -> None:
    client = ClientHandshake("disk", structured_replies=False)
    client.receive(greeting() + reply(GO, REP_INFO, b"\0\x09anything") + GO_OK)
    assert client.negotiated.export == ExportInfo("disk", 2**50, 1)


def test_df_means_nothing_without_structured_replies() -> None:
    client = ClientHandshake("disk", structured_replies=False)
    info = struct.pack(">HQH", 0, 1, 1 | SEND_DF)
    client.receive(greeting() + reply(GO, REP_INFO, info) + reply(GO, ACK))
    assert client.negotiated.export.flags == 1


OLDSTYLE = b"NBDMAGIC" + struct.pack(">QQI", 0x420281861253, 2**40, 0b101) + bytes(124)


def test_oldstyle_server() -> None:
    client = ClientHandshake("whatever")
    assert client.receive(OLDSTYLE + b"reply") == b""
    assert client.protocol == "oldstyle"
    assert client.negotiated.export == ExportInfo("whatever", 2**40, 0b101)
    assert client.leftover == b"reply"


def test_oldstyle_server_has_no_list() -> None:
    client = ClientHandshake(None, list_exports=True)
    client.receive(OLDSTYLE)
    assert client.state == hc.CLOSED
    assert client.refusal is not None


# --- Servers that lie ---------------------------------------------------------------------------


def info(*values: int, layout: str) -> bytes:
    return reply(GO, REP_INFO, struct.pack(layout, *values))


SET_META_TWICE = b"".join(
    [
        greeting(),
        NO_EXTENDED,
        reply(STRUCTURED, ACK),
        reply(SET_META, META, struct.pack(">I", 7) + b"base:allocation"),
        reply(SET_META, META, struct.pack(">I", 7) + b"x-test:one"),
        reply(SET_META, ACK),
    ]
)
AFTER_STRUCTURED = greeting() + NO_EXTENDED + reply(STRUCTURED, ACK)
BEFORE_GO = greeting() + NO_EXTENDED + reply(STRUCTURED, UNSUP)
LIES = {
    "a web server": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a line and no more": b"SSH-2.0\r\n",
    "half NBD": b"NBDMAGICIHAVEOPX\0\3",
    "bad reply magic": greeting() + bytes(20),
    "reply to another option": greeting() + reply(LIST, ACK),
    "reply of 4 GiB": greeting() + reply(EXTENDED, ACK)[:16] + b"\xff" * 4,
    "ACK with data": greeting() + reply(EXTENDED, ACK, b"x"),
    "unknown reply": greeting() + reply(EXTENDED, 55),
    "reply of another option's kind": BEFORE_GO + reply(GO, SERVER, counted(b"")),
    "GO without export info": BEFORE_GO + reply(GO, ACK),
    "info without type": BEFORE_GO + reply(GO, REP_INFO, b"\0"),
    "export info too short": BEFORE_GO + info(0, 1, layout=">HQ") + reply(GO, ACK),
    "export info too long": BEFORE_GO + info(0, 1, 1, 0, layout=">HQHB") + reply(GO, ACK),
    "no HAS_FLAGS": BEFORE_GO + info(0, 1, 0, layout=">HQH") + reply(GO, ACK),
    "name not UTF-8": BEFORE_GO + reply(GO, REP_INFO, b"\0\1\xff") + GO_OK,
    "name too long": BEFORE_GO + reply(GO, REP_INFO, b"\0\1" + b"x" * 4097) + GO_OK,
    "block size info too short": BEFORE_GO + info(3, 1, 1, layout=">HII") + GO_OK,
    "minimum not a power of 2": BEFORE_GO + info(3, 3, 4096, 8192, layout=">HIII") + GO_OK,
    "minimum of 0": BEFORE_GO + info(3, 0, 4096, 8192, layout=">HIII") + GO_OK,
    "minimum over 64 KiB": BEFORE_GO + info(3, 2**17, 2**17, 2**20, layout=">HIII") + GO_OK,
    "preferred below minimum": BEFORE_GO + info(3, 4096, 512, 2**20, layout=">HIII") + GO_OK,
    "maximum below minimum": BEFORE_GO + info(3, 4096, 4096, 512, layout=">HIII") + GO_OK,
    "two contexts with one ID": SET_META_TWICE,
    "context without ID": AFTER_STRUCTURED + reply(SET_META, META, b"x"),
    "EXPORT_NAME without HAS_FLAGS": greeting(2) + struct.pack(">QH", 5, 0),
    "oldstyle without HAS_FLAGS": OLDSTYLE[:27] + b"\0" + OLDSTYLE[28:],
}


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_lies(name: str) -> None:
    client = ClientHandshake("disk")
    with pytest.raises(ProtocolError) as caught:
        client.receive(LIES[name])
    assert "\n" not in str(caught.value)
    assert client.state == hc.CLOSED
    assert client.receive(b"more") == b""


@pytest.mark.parametrize(
    "data", [reply(LIST, SERVER, b"\0\0\0\x05disk"), reply(LIST, SERVER, counted(b"a\0b"))]
)
def test_a_listing_that_lies(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="NBD_OPT_LIST"):
        ClientHandshake(None, list_exports=True).receive(greeting() + data)


def test_a_listing_without_end() -> None:
    client = ClientHandshake(None, list_exports=True)
    client.receive(greeting())
    one = reply(LIST, SERVER, counted(b"a"))
    client.receive(one * hc.MAX_REPLIES)
    with pytest.raises(ProtocolError, match="replies"):
        client.receive(one)


def test_a_long_listing_does_not_count_for_the_next_option() -> None:
    client = ClientHandshake("disk", list_exports=True, structured_replies=False)
    listing = reply(LIST, SERVER, counted(b"a")) * (hc.MAX_REPLIES - 1) + reply(LIST, ACK)
    client.receive(greeting() + listing + GO_OK)
    assert client.state == hc.TRANSMISSION


@pytest.mark.parametrize("data", [b"", b"NBDMA", greeting(), greeting() + reply(EXTENDED, ACK)])
def test_a_server_that_goes_away(data: bytes) -> None:
    client = ClientHandshake("disk")
    client.receive(data)
    with pytest.raises(ProtocolError, match="closed the connection"):
        client.receive_eof()
    assert client.state == hc.CLOSED


# --- Any split gives the same ------------------------------------------------------------------

replies = st.builds(
    reply,
    st.sampled_from([EXTENDED, STRUCTURED, SET_META, GO, ABORT]),
    st.sampled_from([ACK, ACK, META, REP_INFO, UNSUP, UNKNOWN, 9]),
    st.sampled_from([b"", b"", EXPORT, struct.pack(">I", 1) + b"base:allocation", b"\0\1name"]),
)
good = greeting() + NO_EXTENDED + reply(STRUCTURED, ACK) + reply(SET_META, ACK) + GO_OK + b"reply"
extended = greeting() + reply(EXTENDED, ACK) + reply(SET_META, ACK) + GO_OK + b"reply"
streams = st.one_of(
    st.just(good),
    st.just(extended),
    st.just(OLDSTYLE),
    st.binary(max_size=40),
    st.lists(replies, max_size=6).map(lambda items: greeting() + b"".join(items)),
    st.builds(lambda at, byte: good[:at] + byte + good[at + 1 :], st.integers(0, 170), st.binary()),
)


def outcome(data: bytes, pieces: Sequence[bytes]) -> tuple[object, ...]:
    assert b"".join(pieces) == data
    client = ClientHandshake("disk")
    output = bytearray()
    error = None
    try:
        for piece in pieces:
            output += client.receive(piece)
    except ProtocolError as caught:
        # What was to be sent before the lie is of no interest: the connection is dropped.
        return str(caught), client.state
    refusal = client.refusal and client.refusal.message
    headers = client.extended_headers
    return bytes(output), error, client.state, client.export, client.leftover, refusal, headers


@given(data=streams, cuts=st.lists(st.integers(0, 200), max_size=20))
def test_any_split_gives_the_same(data: bytes, cuts: list[int]) -> None:
    expected = outcome(data, [data])
    assert outcome(data, [data[at : at + 1] for at in range(len(data))]) == expected
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    assert outcome(data, [data[a:b] for a, b in itertools.pairwise(places)]) == expected


# --- What one side encodes the other decodes -----------------------------------------------------

strings = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50)
u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)


@given(name=strings, infos=st.lists(u16, max_size=5))
def test_export_query_round_trip(name: str, infos: list[int]) -> None:
    query = options.ExportQuery(name, tuple(infos))
    assert options.decode_export_query(options.encode_export_query(query)) == query


@given(name=strings, leaves=st.lists(strings, max_size=5))
def test_context_query_round_trip(name: str, leaves: list[str]) -> None:
    query = options.ContextQuery(name, tuple("x-ns:" + leaf for leaf in leaves))
    assert options.decode_context_query(options.encode_context_query(query)) == query


@given(name=strings, description=st.text("printable é", max_size=50))
def test_server_round_trip(name: str, description: str) -> None:
    assert options.decode_server(options.encode_server(name, description)) == (name, description)


@given(context_id=u32, name=strings)
def test_context_round_trip(context_id: int, name: str) -> None:
    data = options.encode_context(context_id, name)
    assert options.decode_context(data) == (context_id, name)


@given(size=st.integers(0, 2**64 - 1), flags=u16)
def test_export_info_round_trip(size: int, flags: int) -> None:
    kind, payload = options.decode_info(options.encode_info_export(size, flags))
    assert (kind, *options.decode_info_export(payload)) == (0, size, flags)


@given(minimum=st.integers(0, 16), more=st.integers(0, 15), maximum=u32)
def test_block_size_round_trip(minimum: int, more: int, maximum: int) -> None:
    sizes = BlockSize(1 << minimum, 1 << (minimum + more), max(maximum, 1 << minimum))
    kind, payload = options.decode_info(options.encode_info_block_size(sizes))
    assert kind == 3
    assert options.decode_info_block_size(payload) == sizes
