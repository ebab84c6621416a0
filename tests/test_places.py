"""Where a plugin's file is found by its name, and what a script's first line asks for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pynbdkit import places


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No nbdkit, wherever the tests run."""
    monkeypatch.delenv(places.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(places, "folders", lambda: [str(tmp_path / "usual")])


def plugin(folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(b"")
    return str(path)


def nbdkit(tmp_path: Path, says: str) -> Path:
    """An nbdkit on PATH; the file that is returned is there once it has been run."""
    ran, program = tmp_path / "ran", tmp_path / "bin" / "nbdkit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n: >{ran}\n[ "$*" = --dump-config ] || exit 1\n{says}\n')
    program.chmod(0o755)
    return ran


def test_the_users_folders_then_the_usual_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line's, in their order, then the environment's; nbdkit's, and it is not run."""
    ran = nbdkit(tmp_path, f"echo plugindir={tmp_path}/asked")
    a, b, c, usual = (str(tmp_path / name) for name in ("a", "b", "c", "usual"))
    monkeypatch.setenv(places.VARIABLE, f"{c}:")
    found = {}
    for folder in ("asked", "usual", "c", "b", "a"):
        expected = plugin(tmp_path / folder, "nbdkit-x-plugin.so")
        found[folder] = places.find("x", [a, f"{tmp_path}/none:{b}"])
        assert found[folder] == expected, folder
        assert ran.exists(), folder
    ran.unlink()
    assert places.find("x") == f"{c}/nbdkit-x-plugin.so"
    monkeypatch.delenv(places.VARIABLE)
    assert places.find("x") == f"{usual}/nbdkit-x-plugin.so"
    assert not ran.exists()


def test_scripts_too_and_shared_objects_before_them(tmp_path: Path) -> None:
    script = plugin(tmp_path / "a", "nbdkit-S3-plugin")
    assert places.find("S3", [str(tmp_path / "a")]) == script
    shared = plugin(tmp_path / "a", "nbdkit-S3-plugin.so")
    assert places.find("S3", [str(tmp_path / "a")]) == shared


def test_a_folder_is_no_plugin(tmp_path: Path) -> None:
    (tmp_path / "nbdkit-x-plugin.so").mkdir()
    assert places.find("x", [str(tmp_path)]) is None


@pytest.mark.parametrize("name", ["", "nosuch", "../a/x", "x\0", ".", "x.so"])
def test_names_of_nothing(name: str, tmp_path: Path) -> None:
    plugin(tmp_path / "a", "nbdkit-x-plugin.so")
    (tmp_path / "usual" / "nbdkit-").mkdir(parents=True)
    assert places.find(name, [str(tmp_path / "usual"), str(tmp_path / "a")]) is None


@pytest.mark.parametrize("says", ["exit 1", "echo name=nbdkit", "echo plugindir=", "kill -9 $$"])
def test_an_nbdkit_that_does_not_say(says: str, tmp_path: Path) -> None:
    ran = nbdkit(tmp_path, says)
    assert places.find("x") is None
    assert ran.exists()


def test_an_nbdkit_that_cannot_be_run(tmp_path: Path) -> None:
    nbdkit(tmp_path, "").with_name("bin").joinpath("nbdkit").write_bytes(b"\x7fELF")
    assert places.find("x") is None


def test_the_usual_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's have the machine in their name; a local build's come first."""
    monkeypatch.undo()
    found = list(places.folders())
    assert found[0].startswith("/usr/local/lib/")
    machine = os.uname().machine
    assert [f for f in found if f.startswith("/usr/lib/") and f"/{machine}-" in f]
    assert found[-3:][1:] == ["/usr/lib64/nbdkit/plugins", "/usr/lib/nbdkit/plugins"]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/x/nbdkit-S3-plugin", "S3"),
        ("nbdkit-sparse-random-plugin.so", "sparse-random"),
        ("/x/disk.py", "disk"),
        ("disk", "disk"),
        ("nbdkit-plugin", "nbdkit-plugin"),
        ("nbdkit--plugin", "nbdkit--plugin"),
    ],
)
def test_plain_names(file: str, name: str) -> None:
    assert places.plain_name(file) == name


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("#!/usr/sbin/nbdkit perl", ["perl"]),
        ("#! /usr/sbin/nbdkit perl", ["perl"]),
        ("#!/opt/bin/pynbdkit  sh \r", ["sh"]),
        ("#!/usr/bin/env -S nbdkit sh a=b", ["sh", "a=b"]),
        ("#!/usr/bin/env --split-string pynbdkit tcl", ["tcl"]),
        ("#!/usr/bin/env nbdkit", []),
        ("#!/usr/bin/nbdkit", []),
        ("#!/usr/bin/env -S nbdkit -f sh", ["-f", "sh"]),
        ("#!/bin/sh", []),
        ("#!/usr/bin/nbdkitten perl", []),
        ("#!", []),
        ("#!/usr/bin/env", []),
        ("# /usr/bin/nbdkit perl", []),
        ("", []),
        ("\n#!/usr/bin/nbdkit perl", []),
    ],
)
def test_first_lines(line: str, words: list[str]) -> None:
    assert places.wanted_by(line.encode() + b"\nnext line") == words
    assert places.wanted_by(line.encode()) == words


def test_a_first_line_without_an_end() -> None:
    """A disk's image may begin with anything."""
    head = b"#!/usr/bin/nbdkit " + b"\xff" * 4096
    assert len(places.wanted_by(head)[0]) < 256
