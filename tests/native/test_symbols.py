"""What plugins import from their server, read from the files themselves: all of it is there.

Two lists, of nbdkit as Debian has it and of a newer one: what its server offers (its symbol
table), and what its plugins take (theirs). Neither binutils nor a compiler is needed.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import support
from pynbdkit import LoadError, places
from pynbdkit.native import library

FOR_FILTERS = {
    "nbdkit_context_get_backend": "a filter's own way to what is below it",
    "nbdkit_context_set_next": "a filter's own way to what is below it",
    "nbdkit_next_context_close": "a filter opens and closes what is below it",
    "nbdkit_next_context_open": "a filter opens and closes what is below it",
    "nbdkit_extents_aligned": "takes the layer below, which only a filter has",
    "nbdkit_extents_full": "takes the layer below, which only a filter has",
}
"""nbdkit-plugin.h declares none of these, nbdkit-filter.h does; filters in C are not loaded."""
OF_THE_SERVER = "nbdkit_debug_"
"""Variables of nbdkit's that -D nbdkit.NAME sets: a plugin's own are in the plugin."""

DYNSYM = 11


class Symbols(NamedTuple):
    """The names in a file's dynamic symbol table."""

    defined: frozenset[str]
    undefined: frozenset[str]


@cache
def symbols(path: Path) -> Symbols:
    """Read a file of this machine's kind (elf(5)): sections, and of them the dynamic symbols."""
    data = path.read_bytes()
    assert data[:4] == b"\x7fELF"
    order = "<" if data[5] == 1 else ">"
    wide = data[4] == 2
    section = struct.Struct(order + ("IIQQQQIIQQ" if wide else "10I"))
    (table,) = struct.unpack_from(order + ("Q" if wide else "I"), data, 40 if wide else 32)
    _, number = struct.unpack_from(order + "HH", data, 58 if wide else 46)
    sections = [section.unpack_from(data, table + section.size * i) for i in range(number)]
    found: tuple[set[str], set[str]] = (set(), set())
    for entry in sections:
        if entry[1] != DYNSYM:
            continue
        offset, size, link = entry[4], entry[5], entry[6]
        strings = sections[link][4]
        symbol = struct.Struct(order + ("IBBHQQ" if wide else "IIIBBH"))
        for at in range(offset + symbol.size, offset + size, symbol.size):
            fields = symbol.unpack_from(data, at)
            where = fields[3] if wide else fields[5]
            end = data.index(b"\0", strings + fields[0])
            found[where == 0].add(data[strings + fields[0] : end].decode())
    return Symbols(frozenset(found[0]), frozenset(found[1]))


@cache
def ours() -> frozenset[str]:
    path = library.find()
    assert path is not None, "the part in C was not built"
    return symbols(Path(path)).defined


def server_and_plugins(release: str) -> tuple[Path, list[Path]]:
    """The files of one nbdkit."""
    if release == "debian":
        memory = places.find("memory")
        if memory is None:
            support.missing("nbdkit")
        return Path(support.program("nbdkit")), sorted(Path(memory).parent.glob("*.so"))
    root = Path(support.next_peer("nbdkit")).parent.parent
    return root / "usr/bin/nbdkit", sorted(root.glob("usr/lib/*/nbdkit/plugins/*.so"))


def of_nbdkit(names: frozenset[str]) -> set[str]:
    return {name for name in names if name.startswith("nbdkit_")}


@pytest.mark.parametrize("release", ["debian", "newer"])
def test_everything_that_nbdkit_offers_to_plugins(release: str) -> None:
    server, _ = server_and_plugins(release)
    offered = of_nbdkit(symbols(server).defined)
    assert len(offered) > 40, "the table was not read"
    assert FOR_FILTERS.keys() <= offered
    wanted = {name for name in offered if not name.startswith(OF_THE_SERVER)}
    assert wanted - ours() == FOR_FILTERS.keys()


@pytest.mark.parametrize("release", ["debian", "newer"])
def test_everything_that_its_plugins_take(release: str) -> None:
    _, plugins = server_and_plugins(release)
    taken = {name for path in plugins for name in of_nbdkit(symbols(path).undefined)}
    assert len(plugins) > 20
    assert len(taken) > 20, "the tables were not read"
    assert taken <= ours()


def test_nothing_else_is_to_be_seen() -> None:
    """Every plugin finds these names, wanted or not: they are nbdkit's or begin with ours."""
    theirs: set[str] = set()
    for release in ("debian", "newer"):
        theirs |= of_nbdkit(symbols(server_and_plugins(release)[0]).defined)
    for name in ours():
        assert name.startswith("pynbdkit_") or name in theirs, name


def test_the_header_declares_nothing_more() -> None:
    """Each function of nbdkit-plugin.h is there, as its text names them."""
    header = Path("/usr/include/nbdkit-common.h")
    if not header.exists():
        support.missing("nbdkit-plugin-dev")
    declared = set()
    for name in ("nbdkit-common.h", "nbdkit-plugin.h"):
        text = re.sub(r"/\*.*?\*/", "", (header.parent / name).read_text(), flags=re.DOTALL)
        text = re.sub(r"^ *#.*(?:\\\n.*)*$", "", text, flags=re.MULTILINE)
        declared |= set(re.findall(r"NBDKIT_EXTERN_DECL *\([^,]+, *(nbdkit_\w+)", text))
    assert len(declared) > 30, declared
    assert {name for name in declared if name.islower()} - FOR_FILTERS.keys() <= ours()


def test_the_loader_finds_them(tmp_path: Path) -> None:
    """A name in a table is not yet one that a plugin gets: here by the loader itself."""
    names = sorted(name for name in ours() if name.startswith("nbdkit_"))
    script = f"""
import ctypes
from pynbdkit.native import library
library.load("a test")
everything = ctypes.CDLL(None)
for name in {names!r}:
    assert ctypes.cast(getattr(everything, name), ctypes.c_void_p).value, name
print("found")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ}
    )
    assert done.stdout == "found\n", done.stderr


def test_a_part_in_c_of_another_version() -> None:
    """One that an older installation has left behind lacks what is new: one line says so."""
    import _ctypes

    with pytest.raises(LoadError, match=r"of another version, it has no pynbdkit_\w+: install"):
        library.Library(_ctypes.__file__)
