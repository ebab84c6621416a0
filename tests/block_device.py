"""An export as a block device of this machine: nbdfuse makes it a file, a loop device a disk.

Each step is a context manager that undoes itself, whatever happens within: a test that fails leaves
no mount and no process behind. (A machine's own NBD client would do both steps at once, but few
kernels have it built in, and this way libnbd is in between, which we did not write either.)
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import support

PATIENCE = 30.0
"""Seconds after which something that should have happened is an error."""


def needs(*programs: str) -> None:
    """What these steps and a test's own `programs` need of the machine, or the reason is told."""
    support.need_root("mounting a filesystem")
    for name in (*programs, "nbdfuse", "losetup", "mount", "umount", "fusermount3"):
        support.program(name)
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            support.lacking(f"{device} is not there: a kernel with FUSE and loop devices is needed")


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Return when the condition holds. Raises AssertionError when it does not come to hold."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.002)


@contextmanager
def fuse_file(uri: str, folder: Path) -> Iterator[Path]:
    """The export as a file in a new `folder`, by nbdfuse."""
    folder.mkdir()
    ready = folder.with_name(folder.name + ".pid")
    path = folder / "disk"
    with subprocess.Popen(
        [support.program("nbdfuse"), "-P", ready, path, uri], stdin=subprocess.DEVNULL
    ) as process:
        try:
            wait_for("nbdfuse", lambda: ready.exists() or process.poll() is not None)
            assert process.poll() is None, f"nbdfuse ended with {process.returncode}"
            yield path
            support.run("fusermount3", "-u", folder, timeout=PATIENCE)
            assert process.wait(PATIENCE) == 0
        finally:
            if process.poll() is None:
                support.run("umount", "-l", folder, timeout=PATIENCE, check=False)
                process.kill()
            ready.unlink(missing_ok=True)
    folder.rmdir()


@contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """The file as a block device."""
    made = support.run("losetup", "--find", "--show", path, timeout=PATIENCE)
    device = Path(made.stdout.strip())
    backing = Path("/sys/block", device.name, "loop/backing_file")
    try:
        yield device
    finally:
        support.run("losetup", "--detach", device, timeout=PATIENCE)
    # Where something else still looks at it (udev does), it goes away when that has ended.
    wait_for(f"{device} to let go", lambda: not _is(backing, str(path)))


def _is(file: Path, line: str) -> bool:
    try:
        return file.read_text().rstrip("\n") == line
    except OSError:
        return False


@contextmanager
def attached(uri: str, folder: Path) -> Iterator[Path]:
    """The export as a block device; `folder` is made for it and removed."""
    with fuse_file(uri, folder) as file, loop_device(file) as device:
        yield device


@contextmanager
def mounted(device: Path, folder: Path, options: str = "") -> Iterator[Path]:
    """The filesystem on a device (in an image: options "loop"), mounted on `folder`."""
    folder.mkdir(exist_ok=True)
    words = ["-o", options] if options else []
    support.run("mount", *words, device, folder, timeout=PATIENCE)
    try:
        yield folder
    except BaseException:
        support.run("umount", "-l", folder, timeout=PATIENCE, check=False)
        raise
    support.run("umount", folder, timeout=PATIENCE)
    folder.rmdir()
