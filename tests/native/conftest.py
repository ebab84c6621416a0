from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import support

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """built("life", "-DNBDKIT_API_VERSION=1", …): a plugin of this folder, compiled once each."""
    folder = tmp_path_factory.mktemp("built")
    found: dict[tuple[str, ...], Path] = {}

    def build(name: str, *options: str) -> Path:
        key = (name, *options)
        if key not in found:
            if shutil.which("cc") is None:
                support.missing("cc")
            if not Path("/usr/include/nbdkit-plugin.h").exists():
                support.missing("nbdkit-plugin.h")
            path = folder / f"{name}-{len(found)}.so"
            support.run(
                "cc", "-shared", "-fPIC", "-O1", "-g", "-Wall", "-Werror", *options,
                "-o", path, HERE / f"{name}.c", "-lpthread",
            )  # fmt: skip
            found[key] = path
        return found[key]

    return build


@pytest.fixture(scope="session")
def peer() -> str:
    """The server that the plugins were written for."""
    return support.program("nbdkit")


def both(peer: str) -> list[list[str]]:
    """Our command and the peer's."""
    import sys

    return [[sys.executable, "-m", "pynbdkit"], [peer]]


def finished(process: subprocess.Popen[str], timeout: float = 30) -> str:
    """What a process has said when it ends."""
    return process.communicate(timeout=timeout)[0]
