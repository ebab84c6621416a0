"""Each fault of campaigns/faults.py, once: it does no more harm than it has to."""

from __future__ import annotations

import sys

import pytest

import support

sys.path.insert(0, str(support.ROOT / "campaigns"))

import faults


@pytest.mark.parametrize("name", faults.FAULTS)
def test_fault(name: str) -> None:
    faults.run(name)
