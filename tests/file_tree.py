"""A tree of files of all kinds, and what it takes to see that a copy of it is the same."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from pathlib import Path

LARGE = 6 << 20
NAMES = (
    b" leading and trailing ",
    b"-rf",
    b"new\nline",
    b"back\\slash",
    b"\"quotes\" and 'more'",
    b"*?[a-z]",
    b"...",
    b"n" * 255,
    "Grüße 世界 \N{PILE OF POO}".encode(),
    b"not UTF-8: \xff\xfe\x80",
    b"UPPER",
    b"upper",
)


def make(root: Path, seed: int = 1) -> None:
    """Some 40 MiB: many small files, a few large ones, links, holes, and names that hurt."""
    rng = random.Random(seed)
    root.mkdir()
    for number in range(700):
        folder = root / f"small{number % 14}"
        folder.mkdir(exist_ok=True)
        (folder / f"file{number}").write_bytes(rng.randbytes(rng.choice((0, 1, 700, 4096, 9000))))
    many = root / "one folder with many names"
    many.mkdir()
    for number in range(400):
        (many / f"{number:060}").touch()
    (root / "large").mkdir()
    for number in range(4):
        (root / "large" / str(number)).write_bytes(rng.randbytes(LARGE + number))
    with (root / "holes").open("wb") as stream:
        stream.truncate(48 << 20)
        for place in (0, 5 << 20, (17 << 20) + 12345, (48 << 20) - 1):
            stream.seek(place)
            stream.write(rng.randbytes(min(50_000, (48 << 20) - place)))
    (root / "names").mkdir()
    for name in NAMES:
        with open(os.path.join(os.fsencode(root), b"names", name), "wb") as stream:
            stream.write(name)
    deep = root / "deep"
    for level in range(25):
        deep = deep / str(level)
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("here")
    (root / "links").mkdir()
    (root / "links" / "first").write_bytes(rng.randbytes(10_000))
    for number in range(5):
        os.link(root / "links" / "first", root / f"small{number}" / "link")
    (root / "links" / "short").symlink_to("first")
    (root / "links" / "dangling").symlink_to("x" * 1000)
    os.mkfifo(root / "links" / "fifo")
    for number, mode in enumerate((0o000, 0o400, 0o755, 0o1777, 0o6711)):
        (root / "links" / f"mode{number}").touch()
        os.chmod(root / "links" / f"mode{number}", mode)


def look(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that a copy has to keep, by name: kind, mode, time, content, and who is the same file."""
    found: dict[bytes, tuple[object, ...]] = {}
    first_name: dict[int, bytes] = {}
    top = os.fsencode(root)
    for folder, folders, files in os.walk(top):
        folders.sort()
        for name in sorted(folders + files):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, top)
            if relative == b"lost+found":
                continue
            info = os.lstat(path)
            content: object = None
            if stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(info.st_mode):
                with open(path, "rb") as stream:
                    content = (info.st_size, hashlib.file_digest(stream, "sha256").hexdigest())
            same = (
                None if stat.S_ISDIR(info.st_mode) else first_name.setdefault(info.st_ino, relative)
            )
            found[relative] = (oct(info.st_mode), info.st_mtime_ns, content, same)
    return found


def difference(
    expected: dict[bytes, tuple[object, ...]], actual: dict[bytes, tuple[object, ...]]
) -> list[str]:
    """What differs, a line each, for a failure that can be read."""
    return [
        f"{name!r}: expected {expected.get(name)}, found {actual.get(name)}"
        for name in sorted(expected.keys() | actual.keys())
        if expected.get(name) != actual.get(name)
    ]
