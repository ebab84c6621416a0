"""What a client gets for an errno: the table of the contract, and every other number."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit.errors import ConfigError, LoadError, OpenError, PynbdkitError, nbd_errno

TABLE = {
    errno.EPERM: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EOVERFLOW: 75,
    errno.ENOTSUP: 95,
    errno.EOPNOTSUPP: 95,
    errno.ESHUTDOWN: 108,
    errno.EROFS: 1,
    errno.EFBIG: 28,
    errno.EDQUOT: 28,
}
"""plugin-contract.md, "Errors"; the values are those of the NBD protocol, "Error values"."""


def test_table() -> None:
    assert {number: nbd_errno(number) for number in TABLE} == TABLE


@pytest.mark.parametrize("number", sorted(set(errno.errorcode) - set(TABLE)))
def test_all_others_are_eio(number: int) -> None:
    assert nbd_errno(number) == 5


@given(st.none() | st.integers())
def test_no_number_means_success(number: int | None) -> None:
    """0, None or nonsense in an OSError is still an error."""
    assert nbd_errno(number) in set(TABLE.values())


def test_mistakes_are_told_from_bugs() -> None:
    """One base class for what is said in one line, and it is no OSError."""
    for kind in (ConfigError, LoadError, OpenError):
        assert issubclass(kind, PynbdkitError)
        assert str(kind("the whole message")) == "the whole message"
    assert not issubclass(PynbdkitError, OSError)
