from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import support


@pytest.fixture
def nbd() -> ModuleType:
    """libnbd's Python binding: the client that we did not write."""
    return support.libnbd()


@pytest.fixture
def sockdir() -> Iterator[Path]:
    """A short folder for sockets (a Unix socket's path has at most 107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="pnk") as name:
        yield Path(name)


@pytest.fixture
def serve(sockdir: Path) -> Iterator[Callable[..., support.ServerProcess]]:
    """serve("memory", "1M", …): our command line, in a process; its exit 0 is checked."""
    running: list[support.ServerProcess] = []

    def start(*arguments: str | Path) -> support.ServerProcess:
        folder = sockdir / str(len(running))
        os.mkdir(folder)
        running.append(support.ServerProcess(folder, arguments))
        return running[-1]

    yield start
    for server in running:
        already = server.process.poll()
        status = server.stop()
        assert already is not None or status == 0, server.log()
        assert "Traceback" not in server.log() or already is not None, server.log()


@pytest.fixture
def connect(nbd: ModuleType) -> Iterator[Callable[..., Any]]:
    """connect(server_or_uri, contexts=[…], …): a connected libnbd handle, closed at the end."""
    handles: list[Any] = []

    def open_handle(
        server: Any, *, contexts: tuple[str, ...] = ("base:allocation",), strict: bool = True
    ) -> Any:
        handle = nbd.NBD()
        handles.append(handle)
        for context in contexts:
            handle.add_meta_context(context)
        if not strict:
            handle.set_strict_mode(0)
        uri = server if isinstance(server, str) else server.uri
        handle.connect_uri(uri)
        return handle

    yield open_handle
    for handle in handles:
        try:
            handle.shutdown()
        except nbd.Error:
            pass
    handles.clear()  # libnbd closes a handle when it is dropped
