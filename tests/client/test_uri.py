from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit.client.uri import Uri, UriError, parse_uri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        # The examples of the URI specification.
        ("nbd://example.com:10809/export", Uri("export", None, "example.com", 10809)),
        ("nbd+unix:///export?socket=nbd.sock", Uri("export", "nbd.sock")),
        ("nbd://example.com/", Uri("", None, "example.com")),
        ("nbd://example.com", Uri("", None, "example.com")),
        ("nbd://example.com//disk", Uri("/disk", None, "example.com")),
        ("nbd://example.com/hello%20world", Uri("hello world", None, "example.com")),
        ("nbd+unix:///?socket=%00/abstract", Uri("", "\0/abstract")),
        # And more of the same.
        ("nbd:///x", Uri("x", None, "localhost", 10809)),
        ("nbd://[::1]:99/x", Uri("x", None, "::1", 99)),
        ("nbd://[fe80::1%25eth0]/", Uri("", None, "fe80::1%eth0")),
        ("nbd://user@host:0/", Uri("", None, "host", 0)),
        ("nbd+unix://?socket=/tmp/nbdkitXXXX/socket", Uri("", "/tmp/nbdkitXXXX/socket")),
        ("nbd+unix:///a%2Fb/c?socket=/a%20b&x-mine=1", Uri("a/b/c", "/a b")),
        ("nbd+unix:///gr%C3%B6%C3%9Fe?socket=s&tls-type=x509", Uri("größe", "s")),
    ],
)
def test_parse(text: str, uri: Uri) -> None:
    assert parse_uri(text) == uri


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "nbd://HOST"),
        ("localhost:10809", "nbd://HOST"),
        ("http://localhost/", "nbd://HOST"),
        ("nbds://localhost/", "TLS"),
        ("nbds+unix:///?socket=s", "TLS"),
        ("nbd+unix:///x", "socket=PATH"),
        ("nbd+unix:///x?socket=", "socket=PATH"),
        ("nbd+unix://tmp/sock?socket=s", "no host"),
        ("nbd://localhost/?socket=s", "'socket'"),
        ("nbd+unix:///?socket=s&sokcet=t", "'sokcet'"),
        ("nbd://localhost:port/", "port"),
        ("nbd://localhost:65536/", "ort"),
        ("nbd://[::1/", "IPv6"),
        ("nbd://localhost/a#b", "%23"),
        ("nbd://localhost/%ff", "utf-8"),
    ],
)
def test_what_cannot_be_understood_is_named(text: str, word: str) -> None:
    with pytest.raises(UriError) as caught:
        parse_uri(text)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(export=names, socket=names.filter(bool))
def test_unix_round_trip(export: str, socket: str) -> None:
    uri = Uri(export, socket)
    assert parse_uri(str(uri)) == uri


@given(
    export=names,
    host=st.sampled_from(["localhost", "192.0.2.1", "::1", "fe80::1%eth0", "example.com"]),
    port=st.integers(0, 65535),
)
def test_tcp_round_trip(export: str, host: str, port: int) -> None:
    uri = Uri(export, None, host, port)
    assert parse_uri(str(uri)) == uri
