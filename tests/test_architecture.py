"""The rules of the house that a machine can check: imports go one way, nothing lacks its page."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support import ROOT

SOURCE = ROOT / "src" / "pynbdkit"
DEVICE_LAYER = "device"
ALLOWED = {
    "protocol": {"protocol"},
    "device": {"device"},
    "plugins": {"plugins", "device", "adapters", "native"},
    "filters": {"filters", "device"},
    "adapters": {"adapters", "device"},
    "native": {"native", "device"},
    "server": {"server", "device", "protocol"},
    "client": {"client", "protocol", "device"},
    "cli": {"cli", "server", "client", "protocol", "device"},
}
"""Which rooms each room may import. `device` is every module directly in the package."""
EXCEPTIONS = {
    ("embed.py", "server"),  # the door for other programs: it runs a server, lazily
    ("__main__.py", "cli"),
    ("loader.py", "adapters"),  # a .py file is handed to the adapter that can run it
    ("loader.py", "native"),  # and a shared object to its own
}


def rooms(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else DEVICE_LAYER


def imported(path: Path) -> set[str]:
    """The rooms that a module imports, also inside functions and for types."""
    here = ("pynbdkit", *path.relative_to(SOURCE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names]
        for name in names:
            if name[0] != "pynbdkit" or len(name) < 2:
                continue
            found.add(name[1] if name[1] in ALLOWED and name[1] != "device" else DEVICE_LAYER)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_go_one_way(path: Path) -> None:
    room = rooms(path)
    for other in imported(path):
        if (path.name, other) in EXCEPTIONS and room == DEVICE_LAYER:
            continue
        assert other in ALLOWED[room], f"{path.relative_to(SOURCE)} imports from {other}"


@pytest.mark.parametrize("kind", ["plugins", "filters"])
def test_each_has_its_page_and_its_test(kind: str) -> None:
    found = [p.stem for p in (SOURCE / kind).glob("*.py") if not p.stem.startswith("_")]
    assert found
    for name in found:
        page = ROOT / "docs" / kind / f"{name.replace('_', '-')}.md"
        assert page.exists(), f"{kind}/{name} has no page {page.relative_to(ROOT)}"
        test = ROOT / "tests" / kind / f"test_{name}.py"
        assert test.exists(), f"{kind}/{name} has no test {test.relative_to(ROOT)}"


def test_pages_say_nothing_of_places_that_are_not_the_readers() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        text = page.read_text()
        for word in ("/work/", "/root/", "pypi.org", "deb.debian.org", "/tmp/w/"):
            assert word not in text, f"{page.relative_to(ROOT)} says {word}"
