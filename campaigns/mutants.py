"""Mutants: copies of the source that break one promise each, to see the campaign notice.

A campaign that finds nothing has shown something only if it would have found what it looks for.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src"


@dataclass(frozen=True)
class Mutant:
    """A change of one module, the ways of looking that have to notice it, and under which load."""

    file: str
    old: str
    new: str
    seen_by: tuple[str, ...]
    load: str


MUTANTS = {
    "a write with FUA is answered without a sync": Mutant(
        "plugins/_stable.py",
        "            if self._dsync and self._write_dsync(fd, buf, offset):\n"
        "                return\n"
        "            write_all(fd, buf, offset)\n"
        "        finally:\n"
        "            self._idle.put(fd)\n"
        "        self.sync()\n",
        "            write_all(fd, buf, offset)\n"
        "        finally:\n"
        "            self._idle.put(fd)\n",
        ("order", "power", "raw"),
        "fua, alone",
    ),
    "a group of writes with FUA is answered without a sync": Mutant(
        "plugins/file.py",
        "            write_all(self._fd, buf, offset)\n        self._stable.sync()\n",
        "            write_all(self._fd, buf, offset)\n",
        ("order", "power", "raw"),
        "fua",
    ),
    "a flush does nothing": Mutant(
        "plugins/file.py",
        "        if self._writable:\n            self._stable.sync()\n",
        "        if self._writable:\n            pass\n",
        ("order", "power", "raw"),
        "flush",
    ),
    "a flush is answered by a sync that was already running": Mutant(
        "plugins/_sync.py",
        "                with self._lock:\n"
        "                    self._gathering = None  # who comes from here on wants the next one\n"
        "                self._sync()\n",
        "                self._sync()\n"
        "                with self._lock:\n"
        "                    self._gathering = None\n",
        ("order", "power", "raw"),
        "flushes",
    ),
    "zero and trim with FUA are answered without a sync": Mutant(
        "plugins/file.py",
        "        if flags & Flag.FUA:\n            self._stable.sync()\n",
        "",
        ("order", "power", "raw"),
        "zero",
    ),
    "a write is answered one write before it is done": Mutant(
        "plugins/file.py",
        "            write_all(self._fd, buf, offset)\n\n    def pwrite_group",
        "            late = self.__dict__.pop('late', None)\n"
        "            self.late = (bytes(buf), offset)\n"
        "            if late:\n"
        "                write_all(self._fd, *late)\n\n    def pwrite_group",
        ("kill", "order"),
        "mixed",
    ),
}


def make(name: str, folder: Path) -> Path:
    """A source tree with this mutant, below `folder`. Raises ValueError where it is out of date."""
    mutant = MUTANTS[name]
    return plant(name, mutant.file, mutant.old, mutant.new, folder)


def plant(name: str, file: str, old: str, new: str, folder: Path) -> Path:
    """A source tree below `folder` in which one module has `new` for `old`; `name` is for errors.

    Raises ValueError where the module does not have it any more.
    """
    tree = folder / "src"
    shutil.copytree(SOURCE, tree, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    path = tree / "pynbdkit" / file
    text = path.read_text()
    if old not in text:
        raise ValueError(f"mutant {name!r}: {file} has changed; adapt it where it is defined")
    path.write_text(text.replace(old, new))
    return tree
