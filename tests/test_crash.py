"""The crash campaign's own logic, and a moment of it for real, so that it can be believed.

A ledger must find what is wrong, and nothing else; each way of looking must notice a server that
breaks a promise (a mutant of the source), and find nothing in one that does not.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import support

sys.path.insert(0, str(support.ROOT / "campaigns"))

import crash
import mutants
import power
from ledger import SECTOR, TRIM, WRITE, ZERO, Ledger, payload

from block_device import needs

OLD = b"o" * SECTOR
SECTORS = 8


@pytest.fixture
def ledger() -> Ledger:
    """A disk of other content; its clock ticks whenever it is looked at."""
    ticks = count(1)
    return Ledger(OLD * SECTORS, lambda: next(ticks))


def disk(**sectors: bytes) -> bytes:
    """The disk, with other content in sectors s0, s1, …"""
    content = bytearray(OLD * SECTORS)
    for name, data in sectors.items():
        place = int(name[1:]) * SECTOR
        content[place : place + SECTOR] = data
    return bytes(content)


def piece(serial: int, sector: int) -> bytes:
    return bytes(payload(serial, sector, sector + 1))


def test_nothing_was_sent(ledger: Ledger) -> None:
    assert ledger.check(disk()) == []
    assert ledger.check(disk(s5=piece(1, 5))) == ["sector 5: write #1 was never sent to this place"]
    assert ledger.check(disk()[:-1]) == ["the disk has 4095 bytes instead of 4096"]


def test_what_is_in_flight_may_be_there_or_not(ledger: Ledger) -> None:
    ledger.send(WRITE, True, 1, 3)
    for power_fails in (True, False):
        assert not ledger.check(disk(), power=power_fails)
        assert not ledger.check(disk(s1=piece(1, 1)), power=power_fails)
        assert not ledger.check(disk(s1=piece(1, 1), s2=piece(1, 2)), power=power_fails)
    half = piece(1, 1)[:64] + OLD[64:]
    assert not ledger.check(disk(s1=half)), "it was torn while it was in flight"
    assert ledger.check(disk(s1=piece(1, 2))), "content of another place"
    assert ledger.check(disk(s3=piece(1, 3))), "a place that was not written"
    assert ledger.check(disk(s1=bytes(SECTOR))), "zeros, of which nobody spoke"


def test_fua_is_promised_when_it_is_answered(ledger: Ledger) -> None:
    ledger.answer(ledger.send(WRITE, True, 1, 2))
    assert not ledger.check(disk(s1=piece(1, 1)))
    assert ledger.check(disk()) == [
        "sector 1: what was there before is back, but #1 write, fua is newer"
    ]
    assert ledger.check(disk(s1=bytes(SECTOR)))
    assert ledger.check(disk(s1=piece(1, 1)[:64] + OLD[64:])), "nothing is in flight: torn"


def test_a_plain_write_is_promised_by_a_later_flush(ledger: Ledger) -> None:
    early = ledger.flush()
    ledger.answer(ledger.send(WRITE, False, 1, 2))
    ledger.flushed(early)
    assert not ledger.check(disk()), "the flush was sent before the answer"
    assert ledger.check(disk(), power=False), "but without a power cut it has to be there"
    ledger.flushed(ledger.flush())
    assert ledger.check(disk())
    assert not ledger.check(disk(s1=piece(1, 1)))


def test_older_and_newer(ledger: Ledger) -> None:
    ledger.answer(ledger.send(WRITE, True, 1, 2))
    ledger.answer(ledger.send(WRITE, False, 1, 2))
    for serial in (1, 2):
        assert not ledger.check(disk(s1=piece(serial, 1)))
    assert ledger.check(disk(s1=piece(1, 1)), power=False) == [
        "sector 1: #1 write, fua is there, but #2 write is newer"
    ]
    ledger.answer(ledger.send(ZERO, True, 0, 3))
    zeros = {"s0": bytes(SECTOR), "s1": bytes(SECTOR), "s2": bytes(SECTOR)}
    assert not ledger.check(disk(**zeros))
    assert ledger.check(disk(**zeros | {"s1": piece(2, 1)}))
    ledger.send(TRIM, False, 4, 5)
    assert not ledger.check(disk(**zeros, s4=bytes(SECTOR)))


def test_two_at_a_time_have_no_order(ledger: Ledger) -> None:
    one, two = (ledger.send(WRITE, True, 1, 2) for _ in range(2))
    ledger.answer(two)
    ledger.answer(one)
    for serial in (1, 2):
        assert not ledger.check(disk(s1=piece(serial, 1)))
    mixed = piece(1, 1)[:256] + piece(2, 1)[256:]
    assert ledger.check(disk(s1=mixed)) == ["sector 1: torn, of writes [1, 2]"]
    ledger.send(WRITE, True, 1, 2)
    assert not ledger.check(disk(s1=piece(1, 1)[:256] + piece(3, 1)[256:]))


def test_a_moment_in_the_past(ledger: Ledger) -> None:
    one = ledger.send(WRITE, True, 1, 2)
    ledger.answer(one)
    two = ledger.send(WRITE, True, 1, 2)
    ledger.answer(two)
    assert ledger.check(disk(s1=piece(1, 1)))
    assert not ledger.check(disk(s1=piece(1, 1)), one.promised)
    assert ledger.check(disk(s1=piece(2, 1)), one.promised), "it was not sent yet"
    assert not ledger.check(disk(s1=piece(2, 1)), two.sent)
    assert not ledger.check(disk(), one.sent)


def test_the_next_round(ledger: Ledger) -> None:
    ledger.answer(ledger.send(WRITE, True, 1, 2))
    ledger.rebase(disk(s1=piece(1, 1)))
    assert not ledger.check(disk(s1=piece(1, 1)))
    assert ledger.check(disk())
    ledger.answer(ledger.send(WRITE, True, 1, 2))
    assert not ledger.check(disk(s1=piece(2, 1)))
    assert ledger.check(disk(s1=piece(1, 1)))


# -- the device with a past ------------------------------------------------------------------------


def test_a_power_cut_keeps_what_was_flushed() -> None:
    device, rng = power.Device(8 * SECTOR), random.Random(1)
    device.pwrite(b"0" * SECTOR, 0, 0)
    device.begin()
    device.pwrite(b"1" * SECTOR, SECTOR, 0)
    device.flush(0)
    flushed = device.flushes[0][1]
    device.pwrite(b"2" * 4 * SECTOR, 2 * SECTOR, 0)
    device.zero(SECTOR, 0, 0)
    end = device.writes[-1].ended
    for loss in power.LOSSES:
        for _ in range(20):
            left = device.after(end, loss, rng)
            assert left[SECTOR : 2 * SECTOR] == b"1" * SECTOR
            assert left[6 * SECTOR :] == bytes(2 * SECTOR)
            assert left[:SECTOR] in (b"0" * SECTOR, bytes(SECTOR))
    everything = bytes(SECTOR) + b"1" * SECTOR + b"2" * 4 * SECTOR + bytes(2 * SECTOR)
    assert device.after(end, "none", rng) == everything
    before = b"0" * SECTOR + b"1" * SECTOR + bytes(6 * SECTOR)
    assert device.after(end, "all", rng) == before
    assert device.after(flushed, "none", rng) == before
    seen = {bytes(device.after(end, "sectors", rng)) for _ in range(200)}
    assert len(seen) == 2**5, "five sectors, each of which is there or not"


# -- for real --------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    with crash.folder_for(None) as path:
        yield path


@pytest.mark.parametrize("chain", crash.CHAINS)
def test_killed(chain: str, folder: Path) -> None:
    campaign = crash.Campaign(folder, chain)
    result = crash.Result()
    for _ in range(3):
        result.add(campaign.run("kill"))
    assert not result.problems
    assert result.answered > 50


@pytest.mark.parametrize("chain", ["file", "threads"])
def test_the_order_of_system_calls(chain: str, folder: Path) -> None:
    assert not crash.Campaign(folder, chain).order(300).problems


@pytest.mark.parametrize("chain", ["file", "threads", "fua by flush"])
def test_power_cuts(chain: str, folder: Path) -> None:
    needs("mkfs.ext4")
    result = crash.Campaign(folder, chain, load="mixed").power(cuts=8, seconds=0.5)
    assert not result.problems
    assert result.cuts == 8


@pytest.mark.parametrize("load", ["mixed", "flushes"])
def test_power_cuts_of_a_block_device(load: str, folder: Path) -> None:
    needs()
    result = crash.Campaign(folder, "file", load=load).raw(cuts=30, seconds=0.5)
    assert not result.problems
    assert result.cuts == 30


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_a_broken_promise_is_noticed(name: str) -> None:
    """By the quickest way of looking that can; `crash.py --mutants` tries all."""
    way = "kill" if "kill" in mutants.MUTANTS[name].seen_by else "order"
    assert crash.notices(name, way)


def test_a_power_cut_notices_a_missing_sync() -> None:
    needs()
    problems = crash.notices("a flush does nothing", "raw")
    assert problems
    assert problems[0].startswith("power cut, ")
