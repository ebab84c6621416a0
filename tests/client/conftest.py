from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import ServerProcess, program


@pytest.fixture
def nbdkit(sockdir: Path) -> Iterator[Callable[..., ServerProcess]]:
    """nbdkit("memory", "1M", …): the peer's server as a process, stopped at the end."""
    running: list[ServerProcess] = []

    def start(*arguments: str | Path) -> ServerProcess:
        folder = sockdir / f"peer{len(running)}"
        folder.mkdir()
        running.append(ServerProcess(folder, arguments, [program("nbdkit")]))
        return running[-1]

    yield start
    for server in running:
        server.stop()
