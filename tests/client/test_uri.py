from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit.client.uri import Tls, Uri, UriError, parse_uri


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
        # TLS: the examples of libnbd's manual, and each of its parameters.
        ("nbds://example.com", Uri("", None, "example.com", tls=Tls())),
        (
            "nbds+unix://alice@/?socket=/tmp/nbd.sock&tls-certificates=certs",
            Uri("", "/tmp/nbd.sock", tls=Tls("certs", user="alice")),
        ),
        ("nbds+unix:///x?socket=s&x-mine=1", Uri("x", "s", tls=Tls())),
        (
            "nbds://al%40ice@h:99/x?tls-psk-file=%2Fkeys&tls-certificates=c%20d",
            Uri("x", None, "h", 99, Tls("c d", "/keys", "al@ice")),
        ),
        (
            "nbds://h/?tls-hostname=other.example.com&tls-type=x509",
            Uri("", None, "h", tls=Tls(hostname="other.example.com")),
        ),
        ("nbds://h/?tls-verify-peer=false", Uri("", None, "h", tls=Tls(verify_peer=False))),
        ("nbds://h/?tls-verify-peer=0", Uri("", None, "h", tls=Tls(verify_peer=False))),
        ("nbds://h/?tls-verify-peer=1", Uri("", None, "h", tls=Tls())),
        ("nbd://h/?tls-verify-peer=maybe", Uri("", None, "h")),  # It has no meaning there.
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
        ("nbd+unix://user@/?socket=s", "no host"),
        ("nbds+unix:///x", "socket=PATH"),
        ("nbds+unix://host/?socket=s", "no host"),
        ("nbds+unix://user@host/?socket=s", "no host"),
        ("nbds://localhost/?socket=s", "'socket'"),
        ("nbds://localhost/?tls-frobnicate=1", "'tls-frobnicate'"),
        ("nbds://localhost/?tls-certificates=", "tls-certificates is empty"),
        ("nbds://localhost/?tls-hostname=", "tls-hostname is empty"),
        ("nbds://localhost/?tls-verify-peer=maybe", "true or false"),
        ("nbds://localhost/?tls-type=anon", "x509 or psk"),
        ("nbds://localhost/?tls-type=psk", "tls-psk-file=FILE"),
        ("nbds://localhost/?tls-type=x509&tls-psk-file=f", "x509 or psk"),
        ("nbds://%ff@localhost/", "utf-8"),
        ("nbd+unix:///x", "socket=PATH"),
        ("nbd+unix:///x?socket=", "socket=PATH"),
        ("nbd+unix://tmp/sock?socket=s", "no host"),
        ("nbd://localhost/?socket=s", "'socket'"),
        ("nbd+unix:///?socket=s&sokcet=t", "'sokcet'"),
        ("nbd://localhost:port/", "port"),
        ("nbd://localhost:65536/", "ort"),
        ("nbd://[::1/", "IPv6"),
        ("nbd://fe80%3a%3a1/", "brackets"),
        ("nbd://[fe80::1%a&b]/", "no IPv6"),
        ("nbd://[fe80::1%55]/", "no IPv6"),
        ("nbd://%ff/", "utf-8"),
        ("nbd://localhost/a#b", "%23"),
        ("nbd://localhost/%ff", "utf-8"),
        ("nbd://localhost/\udcff", "UTF-8"),  # a byte of a command line
    ],
)
def test_what_cannot_be_understood_is_named(text: str, word: str) -> None:
    with pytest.raises(UriError) as caught:
        parse_uri(text)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


texts = st.none() | names.filter(bool)
settings = st.none() | st.builds(Tls, texts, texts, texts, texts, st.booleans())


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("nbd://A%2fB/", "a/b"),  # no host's name, but it must not become part of the export's
        ("nbd://%4A/", "j"),
        ("nbd://[FE80::1%25Eth0]/", "fe80::1%Eth0"),
        ("nbd://[::1]@%25J/", "%j"),  # brackets of a user, not of the host
    ],
)
def test_hosts_are_written_as_they_are_read(text: str, host: str) -> None:
    uri = parse_uri(text)
    assert uri.host == host
    assert parse_uri(str(uri)) == uri


@given(export=names, socket=names.filter(bool), tls=settings)
def test_unix_round_trip(export: str, socket: str, tls: Tls | None) -> None:
    uri = Uri(export, socket, tls=tls)
    assert parse_uri(str(uri)) == uri


@given(
    export=names,
    host=st.sampled_from(["localhost", "192.0.2.1", "::1", "fe80::1%eth0", "example.com"]),
    port=st.integers(0, 65535),
    tls=settings,
)
def test_tcp_round_trip(export: str, host: str, port: int, tls: Tls | None) -> None:
    uri = Uri(export, None, host, port, tls)
    assert parse_uri(str(uri)) == uri
