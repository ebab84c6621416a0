"""The zero plugin: a read-only disk of no bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit.plugins.zero import ZeroPlugin


def test_has_no_bytes(nbd: ModuleType, connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(ZeroPlugin()) as server:
        client = connect(server, strict=False)
        assert client.get_size() == 0
        assert client.is_read_only()
        with pytest.raises(nbd.Error) as caught:
            client.pread(1, 0)
        assert caught.value.errno == "EINVAL"
        with pytest.raises(nbd.Error) as caught:
            client.pwrite(b"x", 0)
        assert caught.value.errno == "EPERM"


def test_takes_no_parameters() -> None:
    for parameter in ("1M", "size=1M"):
        done = support.pynbdkit("zero", parameter)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "does not need command line configuration" in done.stderr


def test_same_flags_as_peer(serve: Callable[..., support.ServerProcess]) -> None:
    ours = support.run("nbdinfo", "--json", serve("zero").uri)
    theirs = support.run("nbdkit", "-U", "-", "zero", "--run", 'nbdinfo --json "$uri"')

    def flags(text: str) -> dict[str, object]:
        export = json.loads(text)["exports"][0]
        return {key: value for key, value in export.items() if key != "uri"}

    assert flags(ours.stdout) == flags(theirs.stdout)
