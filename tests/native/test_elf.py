"""What a shared object needs: as a compiler has written it, and for files that are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import support
from pynbdkit.native.elf import needed


def test_of_this_python() -> None:
    """Its modules are linked with the C library, as others see it too."""
    import _ctypes

    file = _ctypes.__file__
    assert any(name.startswith("libffi.so") for name in needed(file))
    done = subprocess.run(["ldd", file], capture_output=True, text=True, check=True)
    for name in needed(file):
        assert name in done.stdout
    assert all("libc.so" not in name or name.startswith("libc.so.") for name in needed(file))


@pytest.mark.parametrize("size", [0, 1, 4, 5, 16, 60, 64, 100, 500, 1000, 4000])
def test_files_that_are_cut_off(size: int, tmp_path: Path) -> None:
    """They need nothing that can be known: the loader will say what is wrong."""
    import _ctypes

    path = tmp_path / "cut.so"
    path.write_bytes(Path(_ctypes.__file__).read_bytes()[:size])
    assert needed(str(path)) == []


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "script.so"
    path.write_text("#!/bin/sh\n" * 100)
    assert needed(str(path)) == []
    path.write_bytes(b"\x7fELF" + b"\xff" * 4096)
    assert needed(str(path)) == []
    with pytest.raises(FileNotFoundError):
        needed(str(tmp_path / "missing.so"))


def test_what_is_linked_statically() -> None:
    """Nothing is needed by a library without dependencies, such as the part in C of a plugin."""
    loader = next(Path("/").glob("lib*/ld-linux*.so.*"), None)
    if loader is None:
        support.lacking("no dynamic loader of glibc here")
    assert needed(str(loader)) == []
    assert sys.platform == "linux"
