"""Old binaries: a structure of any size and version is read as far as it goes, and no further.

`life.c` is compiled against the installed header for each version, and then says that it has only
so many bytes: those up to a field. Behind them lies a page that nobody may read, so that one byte
too many ends the process, or pointers to a function that does. Every field is the last one once;
the releases of nbdkit since 1.0 (`LAST`) are among these.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit.errors import LoadError
from pynbdkit.native.structure import SMALLEST, Structure, read

LAST = {
    "1.0": "trim_1",
    "1.2": "dump_plugin",
    "1.4": "zero",
    "1.8": "magic_config_key",
    "1.10": "can_multi_conn",
    "1.12": "extents",
    "1.14": "thread_model_function",
    "1.16": "can_fast_zero",
    "1.18": "get_ready",
    "1.22": "after_fork",
    "1.24": "export_description",
    "1.26": "cleanup",
    "1.30": "block_size",
}
"""The last field of the structure in each release that added some."""

FIELDS = [field[0] for field in Structure._fields_]
FIRST = {1: FIELDS.index("trim_1"), 2: FIELDS.index("zero")}
"""The last field of the first header that had the version."""

Built = Callable[..., Path]


def size_up_to(field: str) -> int:
    """The bytes of a structure whose last field this is."""
    place = getattr(Structure, field)
    return int(-(-(place.offset + place.size) // 8) * 8)


def compiled(built: Built, version: int) -> str:
    return str(built("life", f"-DNBDKIT_API_VERSION={version}"))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """told(): what the plugin was called with since the last time."""
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("LIFE_LOG", str(log))
    stream = log.open()
    return lambda: stream.read().splitlines()


def check_served(
    path: str, version: int, last: str, nbd: Any, told: Callable[[], list[str]]
) -> None:
    """The plugin can what its fields say, on the wire, and nothing else is called."""
    fields = FIELDS[: FIELDS.index(last) + 1]
    old = "_1" if version == 1 else ""
    has = {name: name in fields for name in FIELDS}
    plugin = pynbdkit.load_plugin(path)
    with pynbdkit.serve(plugin) as server:
        client = nbd.NBD()
        client.set_strict_mode(0)
        client.set_full_info(True)
        client.add_meta_context("base:allocation")
        client.connect_uri(server.uri)
        # The life: which of its steps were there to be called.
        life = told()
        for step in ("load", "open", "get_size", "preconnect", "get_ready", "after_fork"):
            assert any(line.split()[0] == step for line in life) == has[step], step
        assert ("thread_model" in life) == has["thread_model_function"]
        assert ("default_export readonly=0 tls=0" in life) == has["default_export"]
        assert client.get_size() == 65536
        if has["export_description"]:
            assert client.get_export_description() == "about it"
        # What is offered.
        assert client.is_read_only() != has[f"pwrite{old}"]
        writable = has[f"pwrite{old}"]
        flushes = has[f"flush{old}"]
        fua = writable and flushes
        assert client.can_flush() == flushes
        assert client.can_trim() == (writable and has[f"trim{old}"])
        assert client.can_fua() == fua
        assert client.can_multi_conn() == has["can_multi_conn"]
        assert client.can_cache() == has["can_cache"]
        zeroes = has[f"zero{old}"]
        assert client.can_fast_zero() == (writable and zeroes and has["can_fast_zero"])
        # Content and flags.
        word = "" if version == 1 else " 0"
        assert client.pread(4096, 0) == bytes(4096)
        assert told() == [f"pread 4096 0{word}"]
        if writable:
            client.pwrite(b"\x5a" * 512, 1024)
            assert told() == [f"pwrite 512 1024{word}"]
            assert client.pread(1024, 512) == bytes(512) + b"\x5a" * 512
            told()
            client.zero(512, 1024)
            assert told() == [f"{'zero' if zeroes else 'pwrite'} 512 1024" + (
                " 1" if zeroes else word
            )]  # fmt: skip
            assert client.pread(512, 1024) == bytes(512)
            told()
        if writable and has[f"trim{old}"]:
            client.trim(512, 0)
            assert told() == [f"trim 512 0{word}"]
        if fua:
            client.pwrite(b"\xa5" * 512, 0, nbd.CMD_FLAG_FUA)
            native = version == 2 and has["can_fua"]
            assert told() == (
                ["pwrite 512 0 2"] if native else [f"pwrite 512 0{word}", f"flush{word}"]
            )
        if flushes:
            client.flush()
            assert told() == [f"flush{word}"]
        extents: list[int] = []
        client.block_status(1024, 0, lambda name, offset, entries, error: extents.extend(entries))
        called = told()
        assert called == (["extents 1024 0 0"] if has["extents"] else [])
        assert extents == [1024, 2] if has["extents"] else extents[1:] == [0]
        client.shutdown()
    assert [line.split()[0] for line in told()] == [
        name for name in ("close", "cleanup", "unload") if has[name]
    ]


@pytest.mark.parametrize("last", FIELDS[FIRST[1] :])
@pytest.mark.parametrize("trap", ["", "1"], ids=["unreadable", "trap"])
def test_version_1(
    built: Built,
    nbd: Any,
    told: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    last: str,
    trap: str,
) -> None:
    """Of version 1, with each field as the last one."""
    monkeypatch.setenv("LIFE_STRUCT_SIZE", str(size_up_to(last)))
    if trap:
        monkeypatch.setenv("LIFE_TRAP", trap)
    check_served(compiled(built, 1), 1, last, nbd, told)


@pytest.mark.parametrize("last", FIELDS[FIRST[2] :])
@pytest.mark.parametrize("trap", ["", "1"], ids=["unreadable", "trap"])
def test_version_2(
    built: Built,
    nbd: Any,
    told: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    last: str,
    trap: str,
) -> None:
    """Of version 2, with each field that came after it as the last one."""
    monkeypatch.setenv("LIFE_STRUCT_SIZE", str(size_up_to(last)))
    if trap:
        monkeypatch.setenv("LIFE_TRAP", trap)
    check_served(compiled(built, 2), 2, last, nbd, told)


def test_a_newer_header(
    built: Built, nbd: Any, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More fields than we know: they are somebody else's."""
    monkeypatch.setenv("LIFE_STRUCT_SIZE", str(ctypes.sizeof(Structure) + 80))
    check_served(compiled(built, 2), 2, FIELDS[-1], nbd, told)


@pytest.mark.parametrize(
    ("version", "release"), [(1, "1.0"), (1, "1.18"), (2, "1.4"), (2, "1.18"), (2, "1.26")]
)
def test_the_peer_sees_the_same(
    built: Built,
    peer: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: int,
    release: str,
) -> None:
    """What nbdinfo is told, and what is called for it, differs in nothing but the order.

    Nbdinfo asks about an export before it opens it: the peer opens it for each.
    """
    monkeypatch.setenv("LIFE_STRUCT_SIZE", str(size_up_to(LAST[release])))
    path = compiled(built, version)
    answers = []
    for number, server in enumerate(([sys.executable, "-m", "pynbdkit"], [peer])):
        log = tmp_path / str(number)
        monkeypatch.setenv("LIFE_LOG", str(log))
        told = support.run(*server, "-U", "-", path, "a=1", "--run", "nbdinfo --json $nbd").stdout
        [export] = json.loads(told)["exports"]
        before, opened, after = log.read_text().partition("get_size\n")
        calls = {*after.splitlines()} - {"close 2", "get_size"}
        answers.append((export, before + opened, calls))
    ours, theirs = answers
    # A fast zero without a zero callback would fail at once: the peer offers it all the same.
    for answer, _, calls in answers:
        answer.pop("can_fast_zero", None)
        del answer["uri"]
        calls -= {call for call in calls if call.startswith(("open ", "default_export "))}
    assert ours == theirs


def test_releases_are_among_them() -> None:
    """The table names fields, in the order in which they came."""
    places = [FIELDS.index(field) for field in LAST.values()]
    assert places == sorted(set(places))
    assert places[0] == FIRST[1]
    assert places[-1] == len(FIELDS) - 1


def test_the_layout_is_the_headers(built: Built, tmp_path: Path) -> None:
    """Every field is where the installed header has it."""
    names = {name: name.removesuffix("_function") for name in FIELDS if not name.endswith("_1")} | {
        name: f"_{name.removesuffix('_1')}_v1" for name in FIELDS if name.endswith("_1")
    }
    names |= {name: f"_{name}" for name in ("struct_size", "api_version", "thread_model")}
    lines = "".join(
        f'  printf ("{ours} %zu %zu\\n", offsetof (struct nbdkit_plugin, {theirs}),'
        f" sizeof ((struct nbdkit_plugin *) 0)->{theirs});\n"
        for ours, theirs in names.items()
    )
    source = tmp_path / "layout.c"
    source.write_text(
        "#define NBDKIT_API_VERSION 2\n#include <stddef.h>\n#include <stdio.h>\n"
        f"#include <nbdkit-plugin.h>\nint main (void)\n{{\n{lines}"
        '  printf ("all 0 %zu\\n", sizeof (struct nbdkit_plugin));\n}\n'
    )
    built("life")  # says what lacks
    support.run("cc", "-o", tmp_path / "layout", source)
    found = {
        name: (int(offset), int(size))
        for name, offset, size in map(
            str.split, support.run(tmp_path / "layout").stdout.splitlines()
        )
    }
    assert found.pop("all") == (0, ctypes.sizeof(Structure))
    assert found == {
        name: (getattr(Structure, name).offset, getattr(Structure, name).size) for name in FIELDS
    }


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "has 0 bytes"),
        (16, "has 16 bytes"),
        (SMALLEST - 8, f"has {SMALLEST - 8} bytes; the smallest has {SMALLEST}"),
        (SMALLEST + 4, f"has {SMALLEST + 4} bytes"),
        (1 << 16, f"has {1 << 16} bytes"),
    ],
)
def test_no_size_at_all(size: int, words: str) -> None:
    """Too short, too long, or half a field: it is no structure."""
    found = Structure(struct_size=size, api_version=2)
    with pytest.raises(LoadError) as caught:
        read(ctypes.addressof(found), "file.so")
    assert str(caught.value).startswith("file.so: not a plugin: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("version", [-1, 0, 3, 99])
def test_unknown_version(version: int) -> None:
    """Refused by file and number; the versions there are come with it."""
    found = Structure(struct_size=ctypes.sizeof(Structure), api_version=version)
    with pytest.raises(LoadError) as caught:
        read(ctypes.addressof(found), "file.so")
    assert str(caught.value) == (
        f"file.so: the plugin wants API version {version}; supported are 1 and 2"
    )
