"""The coroutines in the docs (writing-plugins.md, plugins/python.md) do what they say."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import support

PLUGINS = (support.ROOT / "docs" / "writing-plugins.md").read_text()
SCRIPTS = (support.ROOT / "docs" / "plugins" / "python.md").read_text()


def block(page: str, word: str) -> str:
    """The one block of Python with a word in it."""
    texts = re.findall("^```python\n(.*?)^```$", page, re.M | re.S)
    (found,) = [text for text in texts if word in text]
    return str(found)


@pytest.mark.parametrize(
    ("page", "word", "writes"),
    [(PLUGINS, "class RemoteDisk", True), (SCRIPTS, "async def pread", False)],
    ids=["class", "script"],
)
def test_a_plugin_of_coroutines(
    page: str,
    word: str,
    writes: bool,
    nbd: ModuleType,
    serve: Callable[..., support.ServerProcess],
    connect: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """200 reads of 10 ms at once take no 2 seconds."""
    (tmp_path / "disk.py").write_text(block(page, word))
    server = serve(tmp_path / "disk.py")
    client = connect(server)
    assert client.is_read_only() is not writes
    if writes:
        client.pwrite(b"x" * 512, 512, nbd.CMD_FLAG_FUA)
        assert client.pread(512, 512) == b"x" * 512
    begun = time.monotonic()
    cookies = [client.aio_pread(nbd.Buffer(512), 0) for _ in range(200)]
    for cookie in cookies:
        while not client.aio_command_completed(cookie):
            client.poll(-1)
    assert time.monotonic() - begun < 1.5
    assert server.log() == ""
