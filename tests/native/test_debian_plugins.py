"""Every plugin in C that Debian's nbdkit packages bring, served by both: what is the same is shown.

The plugins are those that are found in their folder, none is named in advance: one that nobody has
thought of yet fails here. They come from the system's own packages, and from the newer ones of
`scripts/peers-next`, which pynbdkit runs by the Python that is unpacked with them: nothing else
could load them.

Each plugin is loaded by its file's path, by nbdkit and by pynbdkit, with the same arguments, each
in a folder of its own with the same files in it.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import side_by_side
import support
from pynbdkit import places

LANGUAGES = Path(__file__).parent / "languages"
SYSTEM, NEWER = "debian", "newer"


class Pair(NamedTuple):
    """Two servers for the same plugins, as the beginnings of command lines."""

    ours: list[str]
    peer: list[str]


# -- what is there ---------------------------------------------------------------------------------


def folder_of(release: str) -> Path | None:
    """Where the plugins are; None where nbdkit is not installed."""
    if release == SYSTEM:
        memory = places.find("memory")
        return Path(memory).parent if memory else None
    root = Path(os.environ.get("PYNBDKIT_PEERS") or support.ROOT / ".peers" / "trixie")
    return next(root.glob("usr/lib/*/nbdkit/plugins"), None)


def installed(release: str) -> list[str]:
    """The names of the files' plugins."""
    folder = folder_of(release)
    return sorted(places.plain_name(path.name) for path in folder.iterdir()) if folder else []


def file_of(release: str, name: str) -> Path:
    folder = folder_of(release)
    assert folder is not None
    found = [folder / f"nbdkit-{name}-plugin{ending}" for ending in (".so", "")]
    return next(path for path in found if path.exists())


@pytest.fixture(scope="module")
def own_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pynbdkit where another Python finds it: links to all of it, none to anybody's cache."""
    import pynbdkit
    from pynbdkit.native import library

    source = Path(pynbdkit.__file__).parent
    top = tmp_path_factory.mktemp("own")
    for path in source.rglob("*"):
        if path.suffix in (".py", ".gz", ".h") or path.parent.name == "_data":
            link = top / "pynbdkit" / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    symbols = library.find()
    assert symbols is not None, "the part in C was not built"
    (top / "pynbdkit" / "native" / "_symbols.so").symlink_to(symbols)
    return top


@pytest.fixture(scope="module")
def pairs(own_copy: Path) -> Callable[[str], Pair]:
    def of(release: str) -> Pair:
        if release == SYSTEM:
            return Pair([sys.executable, "-m", "pynbdkit"], [support.program("nbdkit")])
        code = f"import sys; sys.path.insert(0, {str(own_copy)!r})\n"
        code += "from pynbdkit.cli.main import run; run()"
        return Pair([support.next_peer("python3"), "-B", "-c", code], [support.next_peer("nbdkit")])

    return of


# -- the arguments ---------------------------------------------------------------------------------


class Case(NamedTuple):
    """Arguments for a plugin. In them "@" is the folder, which `prepare` has filled."""

    arguments: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    writes: bool = True
    exports: tuple[str, ...] = ("",)
    same_content: bool = True
    tries: int = 1
    """More than once, if the time is in the content: it takes a second that both begin in."""
    fast_zero: bool = True
    """False: nbdkit offers fast zeros that always fail; we offer none."""


def image(folder: Path) -> None:
    """Data and holes."""
    rng = random.Random(4)
    for name, blocks in (("disk", 40), ("disk2", 7), ("disk3", 1)):
        with (folder / name).open("wb") as stream:
            for block in range(blocks):
                stream.seek(block * 65536)
                if block % 3 == 0:
                    stream.write(rng.randbytes(4096 + block % 2 * 61440))
            stream.truncate(blocks * 65536)


def tree(folder: Path) -> None:
    """Some files of fixed times."""
    (folder / "tree" / "sub").mkdir(parents=True)
    for number, name in enumerate(("readme.txt", "sub/long name with spaces.text", "sub/empty")):
        (folder / "tree" / name).write_bytes(random.Random(number).randbytes(7000 * (2 - number)))
    for path in [folder / "tree" / "sub", *folder.glob("tree/**/*")]:
        os.utime(path, (1_600_000_000, 1_600_000_000))
    os.utime(folder / "tree", (1_600_000_000, 1_600_000_000))


def fake_mkisofs(folder: Path) -> None:
    """What the iso plugin runs: the files' names and contents stand for an image."""
    tree(folder)
    program = folder / "isoprog"
    program.write_text(
        '#!/bin/sh\nfor last; do :; done\ncd "$last" && find . | sort && cat *.txt\n'
    )
    program.chmod(0o755)


def exports_folder(folder: Path) -> None:
    image(folder)
    (folder / "exports").mkdir()
    for name in ("disk", "disk2"):
        shutil.move(folder / name, folder / "exports" / name)


def ondemand_folder(folder: Path) -> None:
    (folder / "exports").mkdir()
    (folder / "exports" / "before").write_bytes(bytes(65536))


def in_language(suffix: str) -> Case:
    def prepare(folder: Path) -> None:
        shutil.copy(LANGUAGES / f"disk.{suffix}", folder)

    return Case([f"@/disk.{suffix}", "size=262144"], prepare)


EVAL = [
    "get_size=echo 65536",
    'pread=head -c "$3" /dev/zero | tr "\\0" x',
    "can_write=exit 0",
    'pwrite=cat >/dev/null; [ "$4" -lt 8192 ] || { echo "ENOSPC full" >&2; exit 1; }',
    "list_exports=echo INTERLEAVED; echo one; echo a description",
]
FORMATTED = 'command=truncate -s "$size" "$disk"; printf %s "made for $fs" | dd of="$disk" \
conv=notrunc status=none'

CASES: dict[str, list[Case]] = {
    "cc": [in_language("c")],
    "curl": [
        Case(["url=file://@/disk"], image, writes=False),
        Case(["url=http://127.0.0.1:PORT/disk"], image, writes=False),
    ],
    "data": [
        Case(["1 2 3 @32768 4 ( 5 3 )*1000"]),
        Case(["base64=aGVsbG8gd29ybGQ=", "size=100k"]),
        Case(["raw=hello", "size=1M"]),
    ],
    "eval": [Case(EVAL, fast_zero=False)],
    "example1": [Case([], writes=False)],
    "example2": [Case(["file=@/disk"], image, writes=False)],
    "example3": [Case(["size=1M"])],
    "example4": [Case(["size=1048576"])],
    "file": [
        Case(["file=@/disk"], image),
        Case(["@/disk2", "cache=none", "fadvise=sequential"], image),
        Case(["dir=@/exports"], exports_folder, exports=("disk", "disk2", "nosuch", "", "../disk")),
    ],
    "floppy": [
        Case(["dir=@/tree", "label=FIELD"], tree, writes=False, tries=8),
        Case(["@/tree", "size=2M"], tree, writes=False, tries=8),
    ],
    "full": [Case(["size=1M"])],
    "info": [
        Case(["mode=exportname"], exports=("hello", ""), writes=False),
        Case(["mode=base64exportname"], exports=("aGVsbG8gd29ybGQ=",), writes=False),
        Case(["mode=address"], writes=False),
        Case(["mode=time"], writes=False, same_content=False),
        Case(["mode=conntime"], writes=False, same_content=False),
    ],
    "iso": [Case(["dir=@/tree", "prog=@/isoprog", "params=-JrT"], fake_mkisofs, writes=False)],
    "linuxdisk": [Case(["dir=@/tree", "size=4M"], tree, writes=False, same_content=False)],
    "memory": [
        Case(["64M"]),
        Case(["size=1M", "allocator=malloc"]),
    ],
    "nbd": [
        Case(["command=NBDKIT", "arg=-f", "arg=--exit-with-parent", "arg=memory", "arg=1M"]),
        Case(["command=NBDKIT", "arg=-f", "arg=--exit-with-parent", "arg=file",
              "arg=dir=@/exports", "export=disk2"],
             exports_folder),
    ],
    "null": [Case(["size=1M"])],
    "ondemand": [
        Case(["dir=@/exports", "size=1M", FORMATTED, "fs=ext0"], ondemand_folder,
             exports=("before", "new", "")),
    ],
    "ones": [Case(["size=1M"]), Case(["1M", "byte=0x55"])],
    "partitioning": [
        Case(["@/disk", "@/disk2"], image),
        Case(["partition-type=gpt", "@/disk", "type-guid=E3C9E316-0B5C-4DB8-817D-F92DF00215AE",
              "@/disk3"], image, same_content=False),
        Case(["partition-type=mbr", "mbr-id=0x83", "@/disk"], image),
    ],
    "pattern": [Case(["size=1M"])],
    "perl": [in_language("pl")],
    "random": [Case(["size=1M", "seed=4"]), Case(["seed=5", "100k"])],
    "sh": [in_language("sh")._replace(exports=("", "first"))],
    "sparse-random": [Case(["size=16M", "seed=4"]), Case(["size=16M", "seed=5", "percent=80"])],
    # Writing makes the files longer, and then ends nbdkit by a segmentation fault.
    "split": [Case(["@/disk", "@/disk2", "@/disk3"], image, writes=False)],
    "lua": [in_language("lua")],
    "tcl": [in_language("tcl")],
    "tmpdisk": [Case(["size=1M", FORMATTED, "fs=ext0"])],
    "zero": [Case([], writes=False)],
}  # fmt: skip

PRINTED_ONLY = {
    "S3": "a script for the python plugin; needs an account and boto3",
    "blkio": "needs a device of vhost or NVMe",
    "cdi": "needs podman and images of its registries",
    "gcs": "a script for the python plugin; needs an account and google.cloud",
    "guestfs": "needs libguestfs's virtual machine",
    "libvirt": "needs a libvirt server",
    "python": "another Python in this one: refused with a clear line",
    "ruby": "libruby ends the process outside its own thread, nbdkit's too",
    "ssh": "needs an SSH server",
    "torrent": "needs peers on the network",
    "vddk": "needs a library that is not free",
}
"""Nothing is served by these here: they are loaded, and asked what they are."""

FOUND = [(release, name) for release in (SYSTEM, NEWER) for name in installed(release)] or [
    (SYSTEM, "memory"),
    (NEWER, "memory"),
]
IN_PYTHON = ("S3", "gcs", "python")
IN_C = [(release, name) for release, name in FOUND if name not in IN_PYTHON]
ONCE = [(r, n) for r, n in IN_C if r == SYSTEM or (SYSTEM, n) not in IN_C]
"""Each plugin in its first release alone."""
SERVED = [(r, n, number) for r, n in FOUND for number in range(len(CASES.get(n, ())))]


def need(release: str, name: str) -> Path:
    """The plugin's file; CI fails without it."""
    if folder_of(release) is None:
        if release == SYSTEM:
            support.missing("nbdkit")
        support.next_peer("nbdkit")
    return file_of(release, name)


# -- none is forgotten -----------------------------------------------------------------------------

PACKAGED = ("perl", "python", "lua", "tcl", "ruby", "libvirt")
"""Plugins that are packages of their own in Debian, which scripts/peers installs."""


def test_every_plugin_has_its_case() -> None:
    assert not CASES.keys() & PRINTED_ONLY.keys()
    for release, name in FOUND:
        assert name in CASES or name in PRINTED_ONLY, f"{name} ({release}) is compared by nothing"


@pytest.mark.parametrize("release", [SYSTEM, NEWER])
def test_both_releases_are_here(release: str) -> None:
    """What is not here is compared by nothing, and CI has to say so."""
    need(release, "memory")
    assert len(installed(release)) > 25


@pytest.mark.parametrize("name", PACKAGED)
def test_the_languages_are_installed(name: str) -> None:
    if name not in installed(SYSTEM):
        support.missing(f"nbdkit's {name} plugin")


def test_the_table_in_the_docs_names_every_plugin() -> None:
    """And says how each is compared: what is served here is not said to be printed only."""
    text = (support.ROOT / "docs" / "c-plugins.md").read_text()
    rows = dict(re.findall(r"^\| `nbdkit-(.+?)-plugin(?:\.so)?` \| (.*) \|$", text, re.MULTILINE))
    for name in {name for _, name in FOUND}:
        assert name in rows, f"docs/c-plugins.md has no row for {name}"
    for name, row in rows.items():
        assert ("served" in row.split(" | ")[0]) == (name in CASES), f"the row of {name}: {row}"


# -- what they say of themselves -------------------------------------------------------------------


Said = subprocess.CompletedProcess[str]


def printed(command: list[str], *words: str | Path) -> Said:
    return subprocess.run(
        [*command, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def both(pair: Pair, path: Path, *words: str) -> tuple[Said, Said]:
    """What both say about a plugin. A script is run by nbdkit by its name only."""
    named = path if path.suffix == ".so" else places.plain_name(str(path))
    return printed(pair.ours, path, *words), printed(pair.peer, named, *words)


def dumped(text: str) -> list[str]:
    """The lines, in an order of their own.

    Without the path; and the callbacks of version 1, which nbdkit calls "_pread_v1", as pynbdkit
    calls those of all versions, by what they do.
    """
    lines = [line for line in text.splitlines() if not line.startswith("path=")]
    return sorted(re.sub(r"^has__(\w+)_v1=", r"has_\1=", line) for line in lines)


@pytest.mark.parametrize(("release", "name"), IN_C)
def test_dump_plugin(release: str, name: str, pairs: Callable[[str], Pair]) -> None:
    """The same lines: versions, callbacks, the structure's size, thread models, its own words."""
    path = need(release, name)
    pair = pairs(release)
    ours, peer = (
        printed(pair.ours, path, "--dump-plugin"),
        printed(pair.peer, path, "--dump-plugin"),
    )
    if name == "example4":  # a script: nbdkit runs it by its name only
        peer = printed(pair.peer, name, "--dump-plugin")
    assert (ours.returncode, ours.stderr) == (0, "")
    assert dumped(ours.stdout) == dumped(peer.stdout)


@pytest.mark.parametrize(("release", "name"), ONCE)
def test_help(release: str, name: str, pairs: Callable[[str], Pair]) -> None:
    """Every line that the plugin has about its parameters."""
    path = need(release, name)
    pair = pairs(release)
    ours, peer = both(pair, path, "--help")
    assert ours.returncode == 0, ours.stderr
    lines = peer.stdout[peer.stdout.index("\nplugin: ") :].splitlines()
    assert "The Plugin over" not in ours.stdout, "that is about our class, not about the plugin"
    own = [line for line in lines[2:] if line and not line.startswith("(/")]
    for line in own:
        assert line in ours.stdout, f"{line!r} is not in {ours.stdout}"


def _own_words(line: str) -> str:
    """An error's text, without names that are made up for each run."""
    return re.sub(r"/nbdkit\w{6}/", "/nbdkitXXXXXX/", line.split("error: ", 1)[-1])


@pytest.mark.parametrize(("release", "name"), ONCE)
def test_wrong_parameters(release: str, name: str, pairs: Callable[[str], Pair]) -> None:
    """One more line than the plugin's own, and status 1."""
    path = need(release, name)
    pair = pairs(release)
    ours, peer = both(pair, path, "no-such-parameter=1", "-U", "-", "--run", "true")
    assert (ours.returncode != 0) == (peer.returncode != 0)
    assert "Traceback" not in ours.stderr
    said = [_own_words(line) for line in ours.stderr.splitlines()]
    for line in peer.stderr.splitlines():
        text = _own_words(line)
        known = ("Did you forget", "does not need command", "requires config", "Use '", "help")
        if "error: " in line and not any(word in line for word in known):
            assert text in said, ours.stderr


@pytest.mark.parametrize(("release", "name"), [pair for pair in FOUND if pair[1] in IN_PYTHON])
def test_what_is_for_python(release: str, name: str, pairs: Callable[[str], Pair]) -> None:
    """nbdkit's Python is refused, its scripts run by ours, and miss what is not installed."""
    path = need(release, name)
    done = printed(pairs(release).ours, path, "--dump-plugin")
    if name == "python":
        expected = f"pynbdkit: error: {path}: the python plugin is built in: pynbdkit python FILE\n"
        assert (done.returncode, done.stderr) == (1, expected)
    elif done.returncode == 0:
        assert f"\nname={name}\n" in done.stdout
    else:
        assert re.fullmatch(r"pynbdkit: error: \S+: ModuleNotFoundError: .*\n", done.stderr)


# -- what their clients see ------------------------------------------------------------------------


class _Files(BaseHTTPRequestHandler):
    """A web server that can send a part of a file, which Python's own cannot."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        data = (self.folder / self.path.strip("/")).read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(match[1]) : int(match[2]) + 1] if match else data
        self.send_response(206 if match else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if match:
            self.send_header("Content-Range", f"bytes {match[1]}-{match[2]}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[int]:
    """A web server's port."""
    handler = type("Files", (_Files,), {"folder": tmp_path / "files"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


class Seen(NamedTuple):
    """All that is compared, of one server."""

    exports: Any
    facts: dict[str, Any]
    changes: dict[str, Any]


def see(
    nbd: ModuleType, server: support.ServerProcess, case: Case, like: Seen | None = None
) -> Seen:
    """Ask a server, and change what it serves.

    `like`: what the other one has said. Fast zeros are sent where it offers them; elsewhere they
    would end nbdkit 1.32.
    """
    try:
        found = Seen(side_by_side.exports(nbd, server.uri), {}, {})
    except nbd.Error as error:
        found = Seen(f"error {error.errno}", {}, {})
    same = case.same_content
    for number, export in enumerate(case.exports):
        try:
            handle = side_by_side.connect(nbd, server.export_uri(export))
        except nbd.Error:
            found.facts[export] = "refused"
            continue
        found.facts[export] = side_by_side.facts(nbd, handle, same_content=same)
        if case.writes:
            fast = (like or found).facts[export]["can_fast_zero"]
            found.changes[export] = side_by_side.changes(
                nbd, handle, number, same_content=same, fast=fast
            )
        side_by_side.end(nbd, handle)
    return found


@pytest.mark.parametrize(("release", "name", "number"), SERVED)
def test_served(
    release: str,
    name: str,
    number: int,
    pairs: Callable[[str], Pair],
    nbd: ModuleType,
    web: int,
    tmp_path: Path,
    sockdir: Path,
) -> None:
    """Size, flags, block sizes, exports, extents and content; a series of changes; the same again.

    In the changes are requests that fail, of the plugin's and of the server's making.
    """
    case = CASES[name][number]
    path = need(release, name)
    pair = pairs(release)
    dump = printed(pair.ours, path, "--dump-plugin").stdout
    has_fast_zero = case.fast_zero and "has_can_fast_zero=1" in dump
    for _ in range(case.tries):
        ours, peer = served_by_both(name, case, path, pair, nbd, web, tmp_path, sockdir)
        for facts in peer.facts.values():
            if isinstance(facts, dict) and not has_fast_zero:
                facts["can_fast_zero"] = 0  # we do not promise what the plugin does not
        if ours == peer:
            return
    assert ours.exports == peer.exports
    for export, expected in peer.facts.items():
        assert ours.facts[export] == expected, export
    for export, outcomes in peer.changes.items():
        assert ours.changes[export] == outcomes, export


def served_by_both(
    name: str,
    case: Case,
    path: Path,
    pair: Pair,
    nbd: ModuleType,
    web: int,
    tmp_path: Path,
    sockdir: Path,
) -> list[Seen]:
    results: list[Seen] = []
    for side, command in (("ours", pair.ours), ("peer", pair.peer)):
        files = tmp_path / "files"  # the same path for both: some plugins show it
        files.mkdir()
        case.prepare(files)
        meant = {"@/": f"{files}/", "PORT": str(web), "NBDKIT": pair.peer[0]}
        words = [name if side == "peer" and path.suffix != ".so" else str(path), *case.arguments]
        for short, long in meant.items():
            words = [word.replace(short, long) for word in words]
        folder = Path(tempfile.mkdtemp(dir=sockdir))
        with support.ServerProcess(folder, words, command) as server:
            results.append(see(nbd, server, case, *results))
            assert server.process.poll() is None, f"{side}: {server.log()}"
        assert server.process.returncode == 0, f"{side}: {server.log()}"
        assert "Traceback" not in server.log(), server.log()
        shutil.rmtree(files)
    return results
