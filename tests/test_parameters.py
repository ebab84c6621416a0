"""Declared parameters: from a text to a value, an error, a help line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pynbdkit import ConfigError, Filter, Plugin, parameters
from pynbdkit.parameters import Configurable, Parameter


class Disk(Plugin):
    name = "disk"

    size = parameters.size("How large", required=True, magic=True)
    level = parameters.integer("How deep", low=0, high=9, default=5)
    slow = parameters.boolean("Whether to dawdle", default=False)
    read_only = parameters.boolean("Refuse writes")
    label = parameters.text("A name", key="disk-label", metavar="NAME")
    file = parameters.path("Where")
    kind = parameters.enum("Which", ("thick", "thin"), default="thin")
    header = parameters.text("More", multiple=True)
    secret = parameters.password("Key")
    rate = parameters.probability("How often", default=0.0)
    wait = parameters.delay("How long")
    both = parameters.integer("Sets two", sets=("level", "other"))
    other = parameters.integer("Another", default=1)


KEYS = ["size", "level", "slow", "read-only", "disk-label", "file", "kind", "header", "secret"]
KEYS += ["rate", "wait", "both", "other"]


def test_declaration_order_and_keys() -> None:
    """An attribute's "_" is "-" on the command line, unless `key` says otherwise."""
    assert list(Disk._declared) == KEYS


def test_defaults() -> None:
    disk = Disk()
    assert (disk.size, disk.level, disk.slow, disk.read_only) == (None, 5, False, None)
    assert (disk.kind, disk.header, disk.rate) == ("thin", [], 0.0)


@pytest.mark.parametrize(
    ("key", "text", "attribute", "value"),
    [
        ("size", "1K", "size", 1024),
        ("level", "0x7", "level", 7),
        ("slow", "yes", "slow", True),
        ("read-only", "0", "read_only", False),
        ("read_only", "1", "read_only", True),
        ("disk-label", " a=b ", "label", " a=b "),
        ("disk-label", "", "label", ""),
        ("kind", "thick", "kind", "thick"),
        ("secret", "xyz", "secret", "xyz"),
        ("rate", "10%", "rate", 0.1),
        ("wait", "100ms", "wait", 0.1),
    ],
)
def test_texts_become_values(key: str, text: str, attribute: str, value: object) -> None:
    disk = Disk()
    disk.config(key, text)
    assert getattr(disk, attribute) == value
    assert getattr(Disk(), attribute) != value or value is None


def test_the_last_one_counts() -> None:
    disk = Disk()
    disk.config("level", "1")
    disk.config("level", "2")
    assert disk.level == 2


def test_multiple_gathers() -> None:
    """In order; each plugin has a list of its own."""
    disk, other = Disk(), Disk()
    assert disk.header == []
    for text in ("a: 1", "b: 2", "a: 1"):
        disk.config("header", text)
    assert disk.header == ["a: 1", "b: 2", "a: 1"]
    assert other.header == []


def test_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: a server in the background changes to "/"."""
    monkeypatch.chdir(tmp_path)
    disk = Disk()
    disk.config("file", "sub/../disk.img")
    assert disk.file == str(tmp_path / "disk.img")
    disk.config("file", "/dev/null")
    assert disk.file == "/dev/null"


def test_one_key_for_several() -> None:
    """Of a general and a special key the later one holds; on another plugin nothing changes."""
    disk = Disk()
    disk.config("both", "7")
    assert (disk.both, disk.level, disk.other) == (7, 7, 7)
    disk.config("level", "3")
    assert (disk.level, disk.other) == (3, 7)
    disk.config("both", "8")
    assert (disk.level, disk.other) == (8, 8)
    assert (Disk().level, Disk().other) == (5, 1)
    assert Disk(both=4).other == 4


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("size", "1Q", "could not parse size: unknown suffix 'Q'"),
        ("level", "10", "level: '10' is out of range (0 to 9)"),
        ("level", "x", "level: could not parse number: 'x'"),
        ("slow", "maybe", "slow: could not decipher boolean 'maybe'"),
        ("kind", "fat", "unknown kind 'fat' (one of: thick, thin)"),
        ("file", "", "file: the path is empty"),
        ("rate", "2", "rate: probability out of range: '2'"),
        ("wait", "soon", "wait: could not parse delay 'soon'"),
        ("secret", "+/nowhere", "secret: password file '/nowhere': No such file or directory"),
        ("colour", "red", f"unknown parameter 'colour' (disk has: {', '.join(KEYS)})"),
    ],
)
def test_mistakes_are_named(key: str, text: str, words: str) -> None:
    """One line that names the parameter and what would be right; the value stays."""
    disk = Disk()
    with pytest.raises(ConfigError) as caught:
        disk.config(key, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (disk.level, disk.kind) == (5, "thin")


def test_required() -> None:
    disk = Disk()
    with pytest.raises(ConfigError, match=r"^you must specify size=<SIZE> on the command line$"):
        disk.check_parameters()
    disk.config("size", "0")
    disk.check_parameters()


def test_required_and_multiple() -> None:
    """Looking at the list is not giving it."""

    class Many(Plugin):
        url = parameters.text("Where", required=True, multiple=True, metavar="URL")

    many = Many()
    assert many.url == []
    with pytest.raises(ConfigError, match="you must specify url=<URL>"):
        many.check_parameters()
    many.config("url", "a")
    many.check_parameters()


def test_magic() -> None:
    assert Disk().magic_config_key() == "size"
    assert Plugin().magic_config_key() == ""


def test_a_filter_leaves_the_keys_of_others() -> None:
    class Slow(Filter):
        wait = parameters.delay("How long", default=0.0)

    slow = Slow()
    assert slow.config("size", "1M") is False
    assert slow.config("wait", "1") is True
    assert slow.wait == 1.0


def test_in_a_program() -> None:
    """Values as they are, texts as on the command line."""
    disk = Disk(size=4096, level="3", header=["a"], read_only=True, label="x")
    assert (disk.size, disk.level, disk.header, disk.read_only) == (4096, 3, ["a"], True)
    assert Disk(header="one").header == ["one"]
    disk.check_parameters()
    disk.level = 9
    assert disk.level == 9
    with pytest.raises(ConfigError, match=r"^Disk: unknown parameter 'colour' \(has: both, file"):
        Disk(colour="red")
    with pytest.raises(ConfigError, match="could not parse size"):
        Disk(size="large")


def test_a_subclass_inherits_and_changes() -> None:
    class Thick(Disk):
        kind = parameters.enum("Which", ("thick",), default="thick")
        more = parameters.integer("More")

    assert list(Thick._declared) == [*KEYS, "more"]
    assert Thick().kind == "thick"
    assert "more" not in Disk._declared
    with pytest.raises(ConfigError):
        Thick().config("kind", "thin")


def test_on_the_class_it_is_the_parameter() -> None:
    declared: Any = Disk.size
    assert isinstance(declared, Parameter)
    assert (declared.key, declared.name, declared.kind) == ("size", "size", "size")
    assert Configurable._declared == {}


def test_help() -> None:
    class Small(Plugin):
        size = parameters.size("How large", required=True, magic=True)
        slow = parameters.boolean("Whether to dawdle", default=False)
        kind = parameters.enum("Which", ("thick", "thin"))
        header = parameters.text("More", multiple=True, default=["x"], metavar="LINE")

    assert Small().config_help().splitlines() == [
        "size=<SIZE>              How large (required, may be given without its key)",
        "slow=<true|false>        Whether to dawdle (default false)",
        "kind=<thick|thin>        Which",
        "header=<LINE>            More",
    ]
    assert Plugin().config_help() == ""


def test_a_password_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("xyz\n")
    disk = Disk()
    disk.config("secret", f"+{os.fspath(file)}")
    assert disk.secret == "xyz"
