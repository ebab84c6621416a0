"""docs/writing-c-plugins.md: its plugin compiles, and its commands do what the page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import support
from command import COMMAND

PAGE = (support.ROOT / "docs" / "writing-c-plugins.md").read_text()
CC_PAGE = (support.ROOT / "docs" / "plugins" / "cc.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(f"^```{language}\n(.*?)^```$", page, re.M | re.S)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with `pynbdkit` on PATH."""
    for needed in ("cc", "pkg-config", "nbdinfo"):
        support.program(needed)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "pynbdkit"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = ["sh", "-eu", "-c", script]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_commands(shell: Path) -> None:
    (source,) = blocks(PAGE, "c")
    (shell / "ram.c").write_text(source)
    done = run("".join(blocks(PAGE, "sh")), shell)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines.count(str(64 << 20)) == 3
    assert "magic_config_key=size" in lines
    script = 'nbdinfo --size "$uri"'
    theirs = support.run("nbdkit", "-U", "-", shell / "nbdkit-ram-plugin.so", "--run", script)
    assert theirs.stdout == f"{1 << 20}\n"


def test_the_plugin_has_no_warnings(shell: Path) -> None:
    (source,) = blocks(PAGE, "c")
    (shell / "ram.c").write_text(source)
    flags = "EXTRA_CFLAGS=-Wall -Wextra -Wno-unused-parameter -Werror"
    done = support.pynbdkit("cc", shell / "ram.c", flags, "--dump-plugin")
    assert done.returncode == 0, done.stderr


def test_the_plugin_in_the_command_line(shell: Path) -> None:
    (script,) = (it for it in blocks(CC_PAGE, "sh") if "<<" in it)
    done = run(script, shell)
    assert "export-size: 1048576" in done.stdout, done.stderr
