"""The servers side by side: which command starts each, when it is ready, how it is stopped.

Every server listens on a Unix socket of its own. It is ready when it greets a connection with the
protocol's magic. It is stopped with SIGTERM, and its end is waited for by a pidfd, which
serves nbd-server too: that one goes into the background, and is nobody's child then.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

GREETING = b"NBDMAGICIHAVEOPT"
HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "script_plugin.py"
LIMIT_SOURCE = HERE / "limit.c"
SLOW_THREADS = HERE / "slow_threads.py"
SLOW_ASYNC = HERE / "slow_async.py"

# Per kind of disk, who serves it. A name is a program, or a program and a way to run it
# ("nbdkit-t64"); what each is compared with says `baseline`.
BASELINE = "nbdkit"
SUBJECT = "pynbdkit"
KINDS: dict[str, tuple[str, ...]] = {
    "memory": ("nbdkit", "limit", "limit-poll", "pynbdkit"),
    "file": ("nbdkit", "qemu-nbd", "nbd-server", "pynbdkit"),
    "tls": ("nbdkit", "pynbdkit"),
    "script": ("nbdkit", "pynbdkit"),
    "native": ("nbdkit", "pynbdkit"),
    "filters": ("nbdkit", "pynbdkit"),
    "slow": ("nbdkit", "nbdkit-t64", "pynbdkit", "pynbdkit-t64"),
    "async": ("nbdkit", "nbdkit-t64", "pynbdkit-t64", "pynbdkit"),
    "memory-workers": ("nbdkit", "pynbdkit", "pynbdkit-workers"),
    "file-workers": ("nbdkit", "pynbdkit", "pynbdkit-workers"),
    "idle": ("nbdkit", "pynbdkit"),
    "start": ("nbdkit", "python", "pynbdkit"),
}
# What else a row of pynbdkit's is compared with, a column each.
REFERENCES: dict[str, tuple[str, ...]] = {
    "memory": ("limit", "limit-poll"),
    "async": ("nbdkit-t64",),
    "memory-workers": ("pynbdkit",),
    "file-workers": ("pynbdkit",),
    "start": ("python",),
}
REASON = {"memory-workers": "pynbdkit-workers", "file-workers": "pynbdkit-workers"}
"""The server that a kind is there for: its others are measured elsewhere."""
FILES = ("file", "file-workers")
"""Kinds that serve the file; its content is there before they start."""
NO_CROWDS = ("nbd-server",)
"""Which refuse some of dozens of clients that come at once."""
NOT_FILLED = (*FILES, "slow", "async")
SLOW_CALL = {"slow": 0.001, "async": 0.01}
"""Seconds that each call of the slow plugins takes."""
SLOW_SIZE = "64M"
FILTERS = ("nofilter", "noextents", "nozero")
"""Each leaves reads and writes alone, in both servers; it takes something else away, or nothing."""
WORKERS = ("--workers", "2")
POLL = 60
"""Microseconds that limit-poll asks for more before it sleeps."""
PACKAGES = {"nbdkit": "nbdkit", "qemu-nbd": "qemu-utils", "nbd-server": "nbd-server"}


def program(name: str) -> str:
    """Return the program of a server: "nbdkit" of "nbdkit-t64"."""
    known = ("nbdkit", "pynbdkit", "limit")
    return next((word for word in known if name == word or name.startswith(f"{word}-")), name)


def baseline(kind: str, name: str) -> str:
    """Return what a server is compared with: nbdkit, run in the same way where it can be."""
    same = name.replace(SUBJECT, BASELINE, 1)
    return same if program(same) == BASELINE and same in KINDS[kind] else BASELINE


class ServerError(Exception):
    """A server did not start, or ended by itself; the text says which, and what it said."""


@dataclass(frozen=True)
class Place:
    """Where servers of one run keep their things, and what they serve."""

    sockets: Path  # a folder with a short name: a socket's path has 107 bytes at most
    disk: Path  # the file that the `file` kind serves, all servers the same; certificates beside it
    size: int  # bytes, every kind's
    pynbdkit: Sequence[str] = field(default=(sys.executable, "-m", "pynbdkit"))


def _nbd_server_config(place: Place, sock: Path) -> Path:
    path = place.sockets / "nbd-server.conf"
    path.write_text(
        f"[generic]\nunixsock={sock}\n[disk]\nexportname={place.disk}\nflush=true\nfua=true\n"
    )
    return path


def command(name: str, kind: str, place: Place, sock: Path, pidfile: Path) -> list[str]:
    """Return the command that makes server `name` serve a disk of `kind` on `sock`."""
    if name not in KINDS.get(kind, ()) or kind in ("idle", "start"):
        raise ValueError(f"{name} has no {kind} disk")
    if program(name) == "limit":
        poll = [str(POLL)] if name == "limit-poll" else []
        return [str(limit_program(place.sockets)), str(sock), str(place.size), *poll]
    if name == "qemu-nbd":
        # Writeback is what the others do too: the page cache keeps a write until a flush.
        options = ["-f", "raw", "--cache=writeback", "--aio=threads", "--persistent", "--shared=64"]
        return ["qemu-nbd", *options, "-k", str(sock), str(place.disk)]
    if name == "nbd-server":
        config = _nbd_server_config(place, sock)
        return ["nbd-server", "-C", str(config), "-p", str(pidfile)]
    return _started(name, place, sock, _served(name, kind, place))


def _started(name: str, place: Place, sock: Path, served: Sequence[str]) -> list[str]:
    start = list(place.pynbdkit) if program(name) == SUBJECT else ["nbdkit"]
    return [*start, "-f", "-U", str(sock), *served]


def _served(name: str, kind: str, place: Place) -> list[str]:
    """Return the options and the plugin of a kind, in the words that nbdkit and pynbdkit share."""
    size = str(place.size)
    if kind in ("slow", "async"):
        plugin = ["python", str(SLOW_THREADS)]
        if kind == "async" and name == SUBJECT:
            plugin = [str(SLOW_ASYNC)]
        threads = "64" if name.endswith("-t64") else "16"
        return ["-t", threads, *plugin, f"delay={SLOW_CALL[kind]:g}", f"size={SLOW_SIZE}"]
    workers = [*WORKERS] if name.endswith("-workers") else []
    if kind in FILES:
        return [*workers, "file", str(place.disk)]
    if kind == "tls":
        return ["--tls=require", f"--tls-certificates={place.disk.parent}", "memory", size]
    if kind == "script":
        return ["python", str(SCRIPT), f"size={size}"]
    if kind == "native":
        return [native_plugin(), size]
    if kind == "filters":
        return [*(f"--filter={name}" for name in FILTERS), "memory", size]
    return [*workers, "memory", size]


def limit_program(folder: Path) -> Path:
    """Compile limit.c into a folder, once; raises ServerError with what the compiler said."""
    target = folder / "limit"
    if target.exists():
        return target
    words = ["-std=gnu11", "-O2", "-pthread", "-o", str(target), str(LIMIT_SOURCE)]
    done = subprocess.run(["cc", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise ServerError(f"limit.c does not compile: {said}")
    return target


@functools.cache
def native_plugin() -> str:
    """Return the path of nbdkit's own memory plugin, a shared object, for the `native` kind."""
    done = subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True, check=True)
    config = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return str(Path(config["plugindir"]) / "nbdkit-memory-plugin.so")


def make_certificates(folder: Path) -> None:
    """Make a key and a certificate that is its own authority, for the `tls` kind."""
    key, certificate = folder / "server-key.pem", folder / "server-cert.pem"
    template = folder / "server.info"
    template.write_text("cn = localhost\nca\ncert_signing_key\nsigning_key\nencryption_key\n")
    private = ["--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", str(key)]
    signed = ["--load-privkey", str(key), "--template", str(template)]
    for words in (private, ["--generate-self-signed", *signed, "--outfile", str(certificate)]):
        done = subprocess.run(["certtool", *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ServerError(f"certtool failed: {done.stderr.strip()}")
    key.chmod(0o600)
    shutil.copy(certificate, folder / "ca-cert.pem")


def missing(name: str, place: Place) -> str | None:
    """Return a line that says what to install when server `name` cannot be run here."""
    if name == "python":
        return None
    if program(name) == "limit":
        # Its headers may be missing where a compiler is not.
        words = ["cc", "-std=gnu11", "-fsyntax-only", str(LIMIT_SOURCE)]
        if shutil.which("cc") and subprocess.run(words, capture_output=True).returncode == 0:
            return None
        return f"{name} needs a C compiler: apt-get install gcc libc6-dev"
    if program(name) != SUBJECT:
        if shutil.which(program(name)):
            return None
        return f"{name} is not installed: apt-get install {PACKAGES[program(name)]}"
    option = WORKERS[0] if name.endswith("-workers") else ""
    asked = "--help" if option else "--version"
    try:
        done = subprocess.run(
            [*place.pynbdkit, asked], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(place.pynbdkit)} {asked} does not run: {error}"
    if done.returncode == 0:
        if option in done.stdout:
            return None
        return f"{name}: this pynbdkit has no {option}"
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"{' '.join(place.pynbdkit)} {asked} failed: {said}"


def greets(sock: Path) -> bool:
    """Connect, read the greeting, say goodbye; answer whether a newstyle server was there."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(str(sock))
            greeting = client.recv(18, socket.MSG_WAITALL)
        except OSError:
            return False
        # Client flag FIXED_NEWSTYLE, then NBD_OPT_ABORT: an end that no server complains of. Some
        # answer it, some only hang up.
        with contextlib.suppress(OSError):
            client.sendall(struct.pack(">I8sII", 1, b"IHAVEOPT", 2, 0))
            client.recv(20, socket.MSG_WAITALL)
    return greeting.startswith(GREETING)


class Server:
    """One running server.

    `uri` is for any client, `pid` for the CPU clock. Use it in a `with`, or call `stop`. `served`:
    the options and the plugin, where they are not those of the kind (for nbdkit and pynbdkit).
    """

    def __init__(
        self,
        name: str,
        kind: str,
        place: Place,
        patience: float = 20.0,
        served: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self._sock = place.sockets / f"{name}-{kind}.sock"
        self._pidfile = self._sock.with_suffix(".pid")
        self._log = self._sock.with_suffix(".log")
        for path in (self._sock, self._pidfile):
            path.unlink(missing_ok=True)
        export = "disk" if name == "nbd-server" else ""
        self.uri = f"nbd+unix:///{export}?socket={self._sock}"
        if kind == "tls":  # fio cannot be told of certificates: it encrypts, and checks nothing
            self.uri = f"nbds+unix:///?socket={self._sock}&tls-verify-peer=false"
        if served is None:
            argv = command(name, kind, place, self._sock, self._pidfile)
        else:
            argv = _started(name, place, self._sock, served)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self.pid = self._process.pid
        # nbd-server's first process only starts the real one, which says its pid in a file.
        self._pidfd = -1 if name == "nbd-server" else os.pidfd_open(self.pid)
        try:
            self._wait_ready(time.monotonic() + patience)
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self, deadline: float) -> None:
        while not (self._known() and greets(self._sock)):
            ended = self._process.poll() if self._pidfd < 0 else not self.running()
            if ended:
                raise ServerError(f"{self.name} ended at once: {self.said()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} does not answer on its socket: {self.said()}")
            time.sleep(0.002)

    def _known(self) -> bool:
        """Answer whether the process that serves is known; find it out if it can be by now."""
        if self._pidfd < 0:
            with contextlib.suppress(OSError, ValueError):
                self.pid = int(self._pidfile.read_text())
                self._pidfd = os.pidfd_open(self.pid)
        return self._pidfd >= 0

    def said(self) -> str:
        """Return the last line that the server wrote."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def running(self) -> bool:
        return self._pidfd >= 0 and not select.select([self._pidfd], [], [], 0)[0]

    def stop(self) -> None:
        """Ask the server to end, and see that it does."""
        if self._known():
            for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
                if not self.running():
                    break
                signal.pidfd_send_signal(self._pidfd, number)
                select.select([self._pidfd], [], [], patience)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
