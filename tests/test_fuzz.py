"""A moment of `make fuzz`: every seed, and what chance makes of them in a second.

The seeds (tests/seeds) are inputs that reach deep, and each one on which a target has ever failed
(their names begin with "found"). That the targets see what breaks was tried: the mutants at the end
are copies of the package with one promise broken each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

import support

sys.path.insert(0, str(support.ROOT / "campaigns"))

import fuzz
import fuzz_mutants
from fuzz_base import Finding, Target, attempt, try_at_random

INPUTS = {"connection": 200, "workers": 100, "requests": 400, "tls": 40}
"""Inputs by chance; of the other targets, which are quicker, 500."""
_loaded: dict[str, Target] = {}


def target(name: str) -> Target:
    """A target; one that needs certificates makes them once."""
    if name == "tls":
        support.program("certtool")
    if name not in _loaded:
        _loaded[name] = fuzz.load(name)
    return _loaded[name]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_seeds(name: str) -> None:
    seeds = target(name).seeds()
    assert seeds
    for title, data in seeds.items():
        try:
            attempt(target(name), data)
        except Finding as finding:
            raise AssertionError(f"{title}: {finding}") from finding


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_chance(name: str) -> None:
    try_at_random(target(name), INPUTS.get(name, 500), 1)


@pytest.mark.parametrize(
    "name",
    ["exports are listed before TLS, which is required", "a write's payload may lack a byte"],
)
def test_a_broken_server_is_found(name: str, tmp_path: Path) -> None:
    assert fuzz.notices(name, tmp_path, seed=1)


def test_nothing_is_found_in_what_is_not_broken() -> None:
    assert fuzz.found_in(fuzz_mutants.SOURCE, "handshake", 1, 1000) == ""


def test_mutants_are_of_this_source(tmp_path: Path) -> None:
    for mutant in fuzz_mutants.MUTANTS.values():
        assert mutant.old in (fuzz_mutants.SOURCE / "pynbdkit" / mutant.file).read_text()
        assert mutant.target in fuzz.TARGETS


def test_the_same_seed_gives_the_same_inputs() -> None:
    def inputs(seed: int) -> list[bytes]:
        seen: list[bytes] = []
        subject = target("uri")

        class Seen(Target):
            def one(self, data: bytes) -> None:
                seen.append(data)

            def mutate(self, data: bytes, random: Random) -> bytes:
                return subject.mutate(data, random)

            def seeds(self) -> dict[str, bytes]:
                return subject.seeds()

        try_at_random(Seen(), 50, seed)
        return seen

    assert inputs(1) == inputs(1)
    assert inputs(1) != inputs(2)


def test_a_finding_has_its_input(capsys: pytest.CaptureFixture[str]) -> None:
    class Breaks(Target):
        name = "breaks"

        def one(self, data: bytes) -> None:
            raise ZeroDivisionError("no")

        def seeds(self) -> dict[str, bytes]:
            return {"a seed": b"ab"}

    with pytest.raises(Finding, match=r"breaks: ZeroDivisionError\('no'\)\n  input: [0-9a-f]*$"):
        try_at_random(Breaks(), 1, 1)
    assert fuzz.main(["--try", "ff", "uri"]) == 0
    assert capsys.readouterr().err == ""


def test_an_unknown_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fuzz.main(["nothing"])
    assert end.value.code == 2
    assert "unknown target 'nothing'" in capsys.readouterr().err


def test_each_target_says_what_it_has_reached(tmp_path: Path) -> None:
    found = fuzz.reached("words", tmp_path)
    assert found.keys() == {"parse"}
    hit, lines = found["parse"]
    assert 0.6 * lines < hit <= lines
