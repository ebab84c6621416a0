from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pynbdkit.adapters.script import ScriptPlugin, load_module
from pynbdkit.chain import Chain
from pynbdkit.complete import Layer
from pynbdkit.session import Session


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptPlugin]:
    """load(text, …): the plugin over a script `disk.py` in the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*parts: str) -> ScriptPlugin:
        Path("disk.py").write_text("\n".join(parts))
        return ScriptPlugin("disk.py", load_module("disk.py"))

    return make


@pytest.fixture
def layer(load: Callable[..., ScriptPlugin]) -> Callable[..., Layer]:
    """layer(text, …): a script, opened; `vars(layer.device)["script"]` are its globals."""

    def make(*parts: str) -> Layer:
        plugin = load(*parts)
        opened = Chain(plugin).open(Session())
        vars(opened.device)["script"] = plugin._names
        return opened

    return make
