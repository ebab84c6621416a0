"""The numbers are checked against a peer's own list: libnbd exports those that a client meets."""

from __future__ import annotations

from types import ModuleType

import pytest

from pynbdkit.protocol import constants

LIBNBDS_NAMES = {
    "FLAG_FIXED_NEWSTYLE": "HANDSHAKE_FLAG_FIXED_NEWSTYLE",
    "FLAG_NO_ZEROES": "HANDSHAKE_FLAG_NO_ZEROES",
    "CMD_FLAG_FUA": "CMD_FLAG_FUA",
    "CMD_FLAG_NO_HOLE": "CMD_FLAG_NO_HOLE",
    "CMD_FLAG_DF": "CMD_FLAG_DF",
    "CMD_FLAG_REQ_ONE": "CMD_FLAG_REQ_ONE",
    "CMD_FLAG_FAST_ZERO": "CMD_FLAG_FAST_ZERO",
    "STATE_HOLE": "STATE_HOLE",
    "STATE_ZERO": "STATE_ZERO",
    "CONTEXT_BASE_ALLOCATION": "CONTEXT_BASE_ALLOCATION",
}


def test_numbers_are_libnbds(nbd: ModuleType) -> None:
    for name, libnbds_name in LIBNBDS_NAMES.items():
        assert getattr(constants, name) == getattr(nbd, libnbds_name), name


def test_magic_numbers_spell_their_names() -> None:
    assert constants.NBDMAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert constants.IHAVEOPT.to_bytes(8, "big") == b"IHAVEOPT"


@pytest.mark.parametrize("family", ["FLAG_", "OPT_", "REP_", "INFO_", "CMD_FLAG_", "REPLY_TYPE_"])
def test_no_number_stands_for_two_things(family: str) -> None:
    names = [name for name in vars(constants) if name.startswith(family)]
    names = [name for name in names if not name.startswith(("FLAG_C_", "REPLY_FLAG"))]
    if family == "FLAG_":  # Handshake flags are another field than transmission flags.
        names = [name for name in names if name not in ("FLAG_FIXED_NEWSTYLE", "FLAG_NO_ZEROES")]
    numbers = [getattr(constants, name) for name in names]
    assert len(names) > 3
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    ("prefix", "number", "name"),
    [
        ("OPT_", 7, "NBD_OPT_GO"),
        ("REP_", 3, "NBD_REP_INFO"),
        ("REP_", 2**31 + 6, "NBD_REP_ERR_UNKNOWN"),
        ("CMD_", 2, "NBD_CMD_DISC"),
        ("REPLY_TYPE_", 2**15 + 2, "NBD_REPLY_TYPE_ERROR_OFFSET"),
        ("NBD_E", 28, "NBD_ENOSPC"),
        ("OPT_", 99, "NBD_OPT 99"),
        ("NBD_E", 99, "NBD_E 99"),
    ],
)
def test_name_of(prefix: str, number: int, name: str) -> None:
    assert constants.name_of(prefix, number) == name
