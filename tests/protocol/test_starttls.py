"""TLS in the server's handshake: who may ask for it, what it forgets, what may not leak before it.

No TLS runs here: `tls_started` stands for it.
"""

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
    EXTENDED,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META,
    META,
    POLICY,
    REP_INFO,
    SERVER,
    SET_META,
    SHUTDOWN,
    STARTTLS,
    STRUCTURED,
    TLS_REQD,
    UNKNOWN,
    UNSUP,
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

SIZE = 0x5EC2E75EC2E7
SECRETS = (b"hidden", b"classified", SIZE.to_bytes(8, "big"))


class Exports(hs.ExportSource):
    """Writes down what it is asked, and has names and a size that are found in any output."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def list_exports(self) -> Sequence[tuple[str, str]]:
        self.asked.append(("list",))
        return [("hidden", "classified")]

    def open(self, name: str) -> ExportInfo:
        self.asked.append(("open", name))
        if name not in ("", "hidden"):
            raise HandshakeError(UNKNOWN, f"no export {name!r}, but 'hidden'")
        return ExportInfo("hidden", SIZE, 1, "classified")

    def contexts(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        self.asked.append(("contexts", name))
        return ("base:allocation", "x-classified:all")

    def forget(self) -> None:
        self.asked.append(("forget",))


def make(tls: str, **switches: Any) -> tuple[ServerHandshake, Exports]:
    exports = Exports()
    return ServerHandshake(exports, tls=tls, **switches), exports


def secured(tls: str = "require") -> tuple[ServerHandshake, Exports]:
    """A machine whose client has asked for TLS at once."""
    server, exports = make(tls)
    assert kinds(talk(server, option(STARTTLS))) == [ACK]
    server.tls_started()
    return server, exports


# --- Granted and refused -----------------------------------------------------------------------


@pytest.mark.parametrize("tls", ["on", "require"])
def test_starttls(tls: str) -> None:
    server, exports = make(tls)
    assert talk(server, option(STARTTLS)) == [(STARTTLS, ACK, b"")]
    assert server.state == hs.STARTTLS
    assert server.leftover == b""
    assert not server.secure
    assert exports.asked == [("forget",)]
    server.tls_started()
    assert server.secure
    assert server.state == hs.OPTIONS
    replies = split(drain(server, option(LIST) + option(GO, go(b"hidden"))))
    assert kinds(replies) == [SERVER, ACK, REP_INFO, ACK]
    assert server.negotiated.export.size == SIZE


def test_export_name_behind_tls() -> None:
    server, _exports = secured()
    assert drain(server, option(EXPORT_NAME, b"hidden")) == struct.pack(">QH", SIZE, 1)
    assert server.state == hs.TRANSMISSION


REFUSED: dict[str, tuple[str, bytes, int, int]] = {
    "no TLS here": ("off", option(STARTTLS), 3, UNSUP),
    "no TLS here, and data": ("off", option(STARTTLS, b"x"), 3, UNSUP),
    "data": ("on", option(STARTTLS, b"x"), 3, INVALID),
    "data, TLS required": ("require", option(STARTTLS, b"x" * 999), 3, INVALID),
    "not fixed newstyle": ("on", option(STARTTLS), 0, INVALID),
    "not fixed newstyle, TLS required": ("require", option(STARTTLS), 2, INVALID),
}


@pytest.mark.parametrize("name", REFUSED)
def test_starttls_refused(name: str) -> None:
    tls, data, client_flags, code = REFUSED[name]
    server, exports = make(tls)
    replies = talk(server, data, option(ABORT), client_flags=client_flags)
    assert [reply[:2] for reply in replies] == [(STARTTLS, code), (ABORT, ACK)]
    assert replies[0].data.decode()
    assert exports.asked == []


@pytest.mark.parametrize("tls", ["on", "require"])
def test_starttls_twice(tls: str) -> None:
    server, exports = secured(tls)
    asked = len(exports.asked)
    replies = split(drain(server, option(STARTTLS) + option(LIST)))
    assert kinds(replies) == [INVALID, SERVER, ACK]
    assert server.state == hs.OPTIONS
    assert exports.asked[asked:] == [("list",)]


def test_starttls_without_fixed_newstyle_on_offer() -> None:
    server, _exports = make("require", fixed=False)
    assert drain(server, flags(2) + option(STARTTLS)) == b""
    assert server.state == hs.CLOSED


def test_starttls_while_the_server_stops() -> None:
    server, exports = make("require")
    server.begin_shutdown()
    assert kinds(talk(server, option(STARTTLS), option(ABORT))) == [SHUTDOWN, ACK]
    assert exports.asked == []
    server, _exports = make("on")
    talk(server, option(STARTTLS))
    server.begin_shutdown()
    server.tls_started()
    assert kinds(split(drain(server, option(LIST)))) == [SHUTDOWN]


def test_an_export_that_cannot_be_forgotten_refuses_tls() -> None:
    class Stubborn(Exports):
        def forget(self) -> None:
            raise HandshakeError(POLICY, "no")

    server = ServerHandshake(Stubborn(), tls="on")
    assert kinds(talk(server, option(STARTTLS), option(LIST))) == [POLICY, SERVER, ACK]


def test_forget_does_nothing_unless_a_source_does_it() -> None:
    class Plain(hs.ExportSource):
        def list_exports(self) -> Sequence[tuple[str, str]]:
            return ()

        def open(self, name: str) -> ExportInfo:
            return ExportInfo(name, 0, 1)

    assert kinds(talk(ServerHandshake(Plain(), tls="on"), option(STARTTLS))) == [ACK]


@pytest.mark.parametrize("data", [b"", flags(), flags() + option(GO, go(b"")), flags(4)])
def test_tls_that_was_not_agreed_on(data: bytes) -> None:
    server, _exports = make("on")
    drain(server, data)
    with pytest.raises(RuntimeError, match="state is"):
        server.tls_started()
    server, _exports = secured()
    with pytest.raises(RuntimeError, match="state is OPTIONS"):
        server.tls_started()


def test_a_mode_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="'required'"):
        ServerHandshake(Exports(), tls="required")


# --- TLS required --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [*range(2, 12), 77])
@pytest.mark.parametrize("data", [b"", b"x", go(b"hidden"), meta(b"hidden", b"base:")])
def test_every_other_option_is_refused(number: int, data: bytes) -> None:
    server, exports = make("require")
    refusal, *rest = talk(server, option(number, data), option(STARTTLS))
    if number == ABORT:
        assert (refusal.kind, rest) == (ACK, [])
        return
    code = TLS_REQD if number != STARTTLS else INVALID if data else ACK
    assert (refusal.option, refusal.kind) == (number, code)
    assert kinds(rest) == ([] if code == ACK else [ACK])
    assert server.state == hs.STARTTLS
    assert exports.asked == [("forget",)]


def test_export_name_ends_it() -> None:
    server, exports = make("require")
    assert drain(server, flags() + option(EXPORT_NAME, b"hidden")) == b""
    assert server.state == hs.CLOSED
    assert server.error == "NBD_OPT_EXPORT_NAME: the server requires TLS"
    assert exports.asked == []


def test_a_client_without_fixed_newstyle_cannot_be_asked_for_tls() -> None:
    # "The server MUST operate in NOTLS mode unless": so no TLS_REQD, and nothing else either.
    server, exports = make("require")
    replies = talk(server, option(LIST), option(GO, go(b"hidden")), client_flags=0)
    assert kinds(replies) == [INVALID, INVALID]
    assert drain(server, option(EXPORT_NAME, b"hidden")) == b""
    assert server.state == hs.CLOSED
    assert exports.asked == []


def test_a_refused_payload_is_not_kept() -> None:
    server, _exports = make("require")
    server.receive(flags() + option(GO, length=2**20))
    for _ in range(15):
        assert server.receive(bytes(65536)) == b""
        assert len(server._input) == 0
    assert kinds(split(server.receive(bytes(65536)))) == [TLS_REQD]


# --- TLS for some exports ------------------------------------------------------------------------


class TlsOnly(Exports):
    """Every question is answered by TLS_REQD."""

    def list_exports(self) -> Sequence[tuple[str, str]]:
        raise HandshakeError(TLS_REQD, "TLS first")

    def open(self, name: str) -> ExportInfo:
        raise HandshakeError(TLS_REQD, "TLS first")

    def contexts(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        raise HandshakeError(TLS_REQD, "TLS first")


QUESTIONS = (
    option(STRUCTURED)
    + option(LIST)
    + option(LIST_META, meta(b"x"))
    + option(SET_META, meta(b"x", b"base:allocation"))
    + option(INFO, go(b"x"))
    + option(GO, go(b"x"))
)


def test_an_export_may_require_tls() -> None:
    server = ServerHandshake(TlsOnly(), tls="on")
    expected = [ACK, POLICY, POLICY, POLICY, TLS_REQD, TLS_REQD]
    assert kinds(talk(server, QUESTIONS)) == expected
    assert drain(server, option(EXPORT_NAME, b"x")) == b""
    assert server.error == "NBD_OPT_EXPORT_NAME: TLS first"


def test_tls_is_not_asked_for_where_it_runs_or_cannot_run() -> None:
    server = ServerHandshake(TlsOnly(), tls="off")
    assert kinds(talk(server, QUESTIONS)) == [ACK] + [POLICY] * 5
    for tls in ("on", "require"):
        server = ServerHandshake(TlsOnly(), tls=tls)
        talk(server, option(STARTTLS))
        server.tls_started()
        assert kinds(split(drain(server, QUESTIONS))) == [ACK] + [POLICY] * 5


# --- What comes behind STARTTLS in the clear, and what was said before it ------------------------


def test_everything_is_forgotten() -> None:
    select = option(SET_META, meta(b"hidden", b"base:allocation"))
    for extended in (b"", option(EXTENDED)):
        server, exports = make("on")
        before = option(STRUCTURED) + extended + select + option(INFO, go(b"hidden"))
        assert INVALID not in kinds(talk(server, before, option(STARTTLS)))
        assert exports.asked[-1] == ("forget",)
        server.tls_started()
        replies = split(drain(server, select + option(GO, go(b"hidden"))))
        assert kinds(replies) == [INVALID, REP_INFO, ACK]  # Replies are not structured any more.
        assert server.negotiated.export.flags == 1
        assert server.negotiated[1:] == (False, True, (), False)


def test_contexts_are_selected_anew() -> None:
    server, _exports = make("on")
    select = option(SET_META, meta(b"hidden", b"base:allocation"))
    talk(server, option(STRUCTURED), select, option(STARTTLS))
    server.tls_started()
    drain(server, option(STRUCTURED) + option(GO, go(b"hidden")))
    assert server.negotiated.contexts == ()


def test_options_are_counted_anew() -> None:
    server, _exports = make("on")
    server.receive(flags())
    for _ in range(hs.MAX_OPTIONS - 1):
        server.receive(option(77))
    assert kinds(split(server.receive(option(STARTTLS)))) == [ACK]
    server.tls_started()
    for _ in range(hs.MAX_OPTIONS):
        assert server.receive(option(77)) != b""
    assert server.receive(option(77)) == b""
    assert server.state == hs.CLOSED


names = st.sampled_from([b"hidden", b"hidden", b"", b"nope"])
queries = st.lists(
    st.sampled_from([b"base:allocation", b"x-classified:all", b"base:", b"no"]), max_size=3
)
exports_data = st.builds(lambda name, infos: go(name, *infos), names, st.lists(st.integers(0, 4)))
contexts_data = st.builds(lambda name, wanted: meta(name, *wanted), names, queries)
FITTING = {
    EXPORT_NAME: names,
    INFO: exports_data,
    GO: exports_data,
    LIST_META: contexts_data,
    SET_META: contexts_data,
}
anything = st.one_of(st.binary(max_size=20), exports_data, contexts_data)


def options(*numbers: int) -> st.SearchStrategy[bytes]:
    """Sequences of these options, most of them with data that fits."""

    def build(number: int, odd: int) -> st.SearchStrategy[bytes]:
        data = anything if odd == 0 else FITTING.get(number, st.just(b""))
        return st.builds(option, st.just(number), data)

    each = st.tuples(st.sampled_from(numbers), st.integers(0, 7)).flatmap(lambda pair: build(*pair))
    return st.lists(each, max_size=6).map(b"".join)


STAYING = (LIST, INFO, STRUCTURED, LIST_META, SET_META, EXTENDED, 77)  # None ends the handshake.
STATEFUL = (INFO, STRUCTURED, SET_META, EXTENDED)
ANY = (*range(1, 12), 77)


@given(
    tls=st.sampled_from(["on", "require"]),
    before=options(*STAYING),
    injected=st.one_of(options(*ANY), st.binary(max_size=60)),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_plaintext_behind_starttls_is_never_acted_on(
    tls: str, before: bytes, injected: bytes, cuts: list[int]
) -> None:
    honest, honest_exports = make(tls)
    expected = drain(honest, flags() + before + option(STARTTLS))
    assert honest.state == hs.STARTTLS
    server, exports = make(tls)
    data = flags() + before + option(STARTTLS) + injected
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    output = b"".join(drain(server, data[start:end]) for start, end in itertools.pairwise(places))
    assert output == expected
    assert server.state == hs.STARTTLS
    assert server.leftover == injected
    assert exports.asked == honest_exports.asked
    server.tls_started()
    assert server.leftover == b""
    assert drain(server, b"") == b""
    assert exports.asked == honest_exports.asked


@given(
    tls=st.sampled_from(["on", "require"]),
    before=options(*STATEFUL),
    injected=options(*ANY),
    after=options(*STAYING),
    end=options(EXPORT_NAME, GO, ABORT),
)
def test_behind_tls_it_is_as_on_a_fresh_connection(
    tls: str, before: bytes, injected: bytes, after: bytes, end: bytes
) -> None:
    server, exports = make(tls)
    drain(server, flags() + before + option(STARTTLS) + injected)
    server.tls_started()
    asked = len(exports.asked)
    fresh, fresh_exports = make("off")  # It has never heard of TLS.
    fresh.receive(flags())
    assert drain(server, after + end) == drain(fresh, after + end)
    assert exports.asked[asked:] == fresh_exports.asked
    assert (server.state, server.error) == (fresh.state, fresh.error)
    assert server.leftover == fresh.leftover
    if fresh.state == hs.TRANSMISSION:
        assert server.negotiated == fresh.negotiated


@given(
    client_flags=st.sampled_from([3, 3, 3, 1, 0, 2, 4]),
    data=st.tuples(options(*STAYING), options(*ANY), st.binary(max_size=30)).map(b"".join),
)
def test_nothing_of_exports_leaks_where_tls_is_required(client_flags: int, data: bytes) -> None:
    server, exports = make("require")
    output = server.greeting() + drain(server, flags(client_flags) + data)
    assert not any(secret in output for secret in SECRETS)
    assert not any(secret in (server.error or "").encode() for secret in SECRETS)
    assert set(exports.asked) <= {("forget",)}
    assert server.state in (hs.OPTIONS, hs.STARTTLS, hs.CLOSED)


def test_the_secrets_are_found_where_they_are_told() -> None:
    server, _exports = make("on")
    told = drain(server, flags() + option(LIST) + option(INFO, go(b"nope")))
    told += drain(server, option(LIST_META, meta(b"")) + option(EXPORT_NAME, b""))
    assert all(secret in told for secret in SECRETS)
    assert META in kinds(split(told[:-10]))
