"""docs/protocol.md is whole: every number has its row, and every test that it names exists."""

from __future__ import annotations

import re

import pytest

from pynbdkit.protocol import constants
from support import ROOT

PAGE = (ROOT / "docs" / "protocol.md").read_text()
FAMILIES = ("FLAG_", "OPT_", "REP_", "INFO_", "STATE_", "CMD_", "REPLY_", "NBD_E")
BITS_OF_OTHERS = {"REP_FLAG_ERROR", "REPLY_TYPE_FLAG_ERROR"}
NAMED = sorted({tuple(name.split("::")) for name in re.findall(r"`(\w+::\w+)`", PAGE)})


def test_every_number_has_a_row() -> None:
    names = {name for name in vars(constants) if name.startswith(FAMILIES)} - BITS_OF_OTHERS
    assert len(names) > 70
    words = set(re.findall(r"\w+", PAGE))
    assert sorted(names - words) == []


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_exists(file: str) -> None:
    sources = [path.read_text() for path in ROOT.glob(f"tests/**/test_{file}.py")]
    for named, test in NAMED:
        if named == file:
            assert any(f"def {test}(" in source for source in sources), f"no {file}::{test}"


def test_the_limits_are_those_of_the_code() -> None:
    from pynbdkit.protocol import handshake_client, handshake_server

    assert f"{handshake_server.MAX_OPTION_DATA:,} bytes" in PAGE
    assert f"| {handshake_server.MAX_OPTIONS} |" in PAGE
    assert f"{handshake_server.MAX_REPLY_BATCH // 1024} KiB and" in PAGE
    assert f"| {handshake_client.MAX_REPLIES:,} |" in PAGE
