"""Stable storage: what a server may promise about one file, however many connections write to it.

The kernel reports a page that it could not write back *once per open descriptor*, at the next sync
of that descriptor, and then forgets it: the next sync succeeds though the data is lost. So

- a failed sync is remembered here, per file (device and inode), for as long as the server runs:
  every later flush and FUA write fails, on every connection;
- two syncs never run on one descriptor at the same time, or the first to look would take the error
  that belongs to the other. Each borrows a descriptor of its own from a small stock that grows
  with the number that run at once;
- a write that syncs itself (RWF_DSYNC) says only that it failed: a full disk, after which all is
  as before, or a lost page? A second descriptor, the witness, which nothing else ever syncs, is
  asked: its sync fails if and only if the kernel lost something.

Syncs of the whole file (a flush, a group of writes with FUA, a trim or zero with FUA) are shared
by those who want one at the same time (`_sync.py`): one call, on one descriptor, so there is one
report, and all for whom the call was get it. It is noted in `failure` before anybody is told and
before the next sync looks there, so nobody who comes later can slip through in between. All
descriptors of the stock began to listen before anything was written, or while no sync ran and none
had failed: whichever is taken, it tells what was lost since.

Where several processes serve the file, each has descriptors of its own, and what fails in one is
told to all (`_failures.py`).

See fsync(2), "ERRORS" and "NOTES", and pwritev2(2), "RWF_DSYNC".
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from queue import Empty, SimpleQueue

from ._sync import SharedSync

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from ..device import Buffer
    from ._failures import Failures

UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
"""How a kernel or a filesystem says that it does not know RWF_DSYNC."""
MOST_DESCRIPTORS: Final = 8
"""More syncs at a time than this gain nothing (measured on ext4: 8 threads write as much as 16)."""

FEW_DIRTY: Final = 1 << 20
"""Bytes that a sync of the whole file may have to write besides what it is for."""
PAID_EACH: Final = 128 << 10
"""Dirty bytes whose writing costs about what a write costs more by itself than in a group."""

_RWF_DSYNC: Final = getattr(os, "RWF_DSYNC", 0)


def write_all(fd: int, buf: Buffer, offset: int) -> None:
    """Write the whole of `buf` at `offset`, in as many calls as the kernel needs."""
    written = os.pwrite(fd, buf, offset)
    if written == len(buf):
        return
    view = memoryview(buf)
    while written < len(view):
        more = os.pwrite(fd, view[written:], offset + written)
        if more == 0:
            raise OSError(errno.EIO, f"wrote only {written} bytes instead of {len(view)}")
        written += more


def own_descriptor(fd: int, access: int) -> int:
    """A new open file description of the same file, whatever its name is now. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC)


class StableFile:
    """One file that is being served; shared by its connections, made by `StableFiles`."""

    def __init__(self, key: tuple[int, int] = (0, 0), failures: Failures | None = None) -> None:
        self._key = key
        self._failures = failures
        self.failure = ""
        """What the first failed sync said; "" while all is well."""
        self.unsupported: set[int] = set()
        """The modes of fallocate that this file's filesystem has refused."""
        self.users = 0
        self.dirty = 0
        """About how many bytes a sync of the whole file would have to write (see `group`)."""
        self.sync = SharedSync(self._sync)
        """Returns when all that was written to the file is stable. Raises OSError."""
        self._dsync = bool(_RWF_DSYNC)
        self._idle: SimpleQueue[int] = SimpleQueue()
        self._count = 0
        self._most = MOST_DESCRIPTORS
        self._witness = -1
        self._growing = threading.Lock()
        self._asking = threading.Lock()
        self._reading = threading.Lock()

    # -- for connections -------------------------------------------------------------------------

    def check(self) -> None:
        """Raise OSError(EIO) if a sync of this file has ever failed."""
        if self._failures is not None and not self.failure:
            self.failure = self._failures.find(self._key)
        if self.failure:
            raise OSError(
                errno.EIO,
                f"an earlier sync of this file failed ({self.failure}): written data may be lost;"
                " mend the cause, check the data, then restart the server",
            )

    def sync_reader(self, fd: int) -> None:
        """As `sync`, for a connection that reads only, with its own descriptor."""
        with self._reading:
            self.check()  # now: `fd` may share its reports with another reader's
            self._fdatasync(fd)

    def write_through(self, buf: Buffer, offset: int) -> None:
        """Write the whole of `buf`, and return when it is stable. Raises OSError."""
        fd = self._borrow()
        self.dirty -= PAID_EACH
        try:
            if self._dsync and self._write_dsync(fd, buf, offset):
                return
            write_all(fd, buf, offset)
        finally:
            self._idle.put(fd)
        self.sync()

    def group(self) -> bool:
        """Whether several writes with FUA are cheaper as plain writes and one sync of the file.

        The sync also writes what others left dirty, so not while that is much. But a file that
        stays dirty would then never be grouped again: each write with FUA that is made stable by
        itself counts as if it had paid for a part of it.
        """
        return self.dirty <= FEW_DIRTY or not self._dsync

    # -- how it is done --------------------------------------------------------------------------

    def _sync(self) -> None:
        fd = self._borrow()
        self.dirty = 0
        try:
            self._fdatasync(fd)
        finally:
            self._idle.put(fd)

    def _fdatasync(self, fd: int) -> None:
        try:
            os.fdatasync(fd)
        except OSError as error:
            self._fail(error)
            raise
        if self._failures is not None:
            self.check()  # our descriptor may be younger than what another process was just told

    def _write_dsync(self, fd: int, buf: Buffer, offset: int) -> bool:
        """Write with RWF_DSYNC; False where the filesystem does not have it (remembered)."""
        written = 0
        try:
            written = os.pwritev(fd, (buf,), offset, _RWF_DSYNC)
            if written < len(buf):
                view = memoryview(buf)
                while written < len(view):
                    more = os.pwritev(fd, (view[written:],), offset + written, _RWF_DSYNC)
                    if more == 0:
                        raise OSError(errno.EIO, f"wrote only {written} of {len(view)} bytes")
                    written += more
        except OSError as error:
            if error.errno in UNSUPPORTED and not written:
                self._dsync = False
                return False
            self._ask_witness(error)
            raise
        return True

    def _ask_witness(self, error: OSError) -> None:
        """Find out whether `error`, of a write that syncs itself, was of its sync."""
        with self._asking:
            if self.failure:
                return
            if self._witness < 0:
                self._fail(error)
                return
            try:
                os.fdatasync(self._witness)
            except OSError as lost:
                self._fail(lost)

    def _fail(self, error: OSError) -> None:
        if not self.failure:
            self.failure = error.strerror or str(error)
            if self._failures is not None:
                self._failures.add(self._key, self.failure)

    def _borrow(self) -> int:
        """A descriptor that no other sync uses; to be put back into `_idle`, after `_fail`."""
        self.check()
        try:
            fd = self._idle.get_nowait()
        except Empty:
            if self._count < self._most:
                self._grow()
            fd = self._idle.get()
        if self.failure:
            # It came while we waited, perhaps of this very descriptor, which will not tell twice.
            self._idle.put(fd)
            self.check()
        return fd

    def _grow(self) -> None:
        """Double the stock.

        A new descriptor does not report what another one has reported already. So all of them are
        collected first: then no sync runs, and each that has failed has said so.
        """
        with self._growing:
            if self._count >= self._most or not self._idle.empty():
                return
            held = [self._idle.get() for _ in range(self._count)]
            try:
                for _ in range(min(self._count, self._most - self._count)):
                    held.append(own_descriptor(held[0], os.O_RDWR))
            except OSError:
                self._most = len(held)  # no more to be had; the others wait their turn
            finally:
                self._count = len(held)
                for fd in held:
                    self._idle.put(fd)

    # -- for StableFiles -------------------------------------------------------------------------

    def equip(self, fd: int) -> None:
        """Open the first descriptor and the witness, before anything is written through `fd`."""
        if self._count:
            return
        self._most = MOST_DESCRIPTORS
        try:
            first = own_descriptor(fd, os.O_RDWR)
        except OSError:
            # No /proc, or no permission any more: one that shares its reports with `fd`, which is
            # right as long as it is the only one, and every sync goes through it.
            first = os.dup(fd)
            self._most = 1
        else:
            try:
                self._witness = own_descriptor(fd, os.O_RDONLY)
            except OSError:
                pass
        self._idle.put(first)
        self._count = 1

    def strip(self) -> None:
        """Close the descriptors: nobody uses the file any more."""
        fds = [self._idle.get() for _ in range(self._count)]
        if self._witness >= 0:
            fds.append(self._witness)
        self._count, self._witness = 0, -1
        for fd in fds:
            self.close(fd)

    def close(self, fd: int) -> None:
        """close(2), which some network filesystems use to report a failed write."""
        try:
            os.close(fd)
        except OSError as error:
            self._fail(error)


class StableFiles:
    """All files of one plugin, by what they are rather than by their names."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[tuple[int, int], StableFile] = {}
        self._failures: Failures | None = None

    def share(self) -> None:
        """Have all processes that are forked from now on know of failures. Raises OSError."""
        from ._failures import Failures

        self._failures = Failures()

    @staticmethod
    def _key(info: os.stat_result) -> tuple[int, int]:
        # All nodes of one block device share its page cache.
        return (-1, info.st_rdev) if stat.S_ISBLK(info.st_mode) else (info.st_dev, info.st_ino)

    def acquire(self, fd: int, info: os.stat_result, writable: bool) -> StableFile:
        """The file that `fd` is open on; to be given back by `release`."""
        with self._lock:
            key = self._key(info)
            file = self._files.setdefault(key, StableFile(key, self._failures))
            if writable:
                file.equip(fd)
            file.users += 1
            return file

    def release(self, file: StableFile, info: os.stat_result) -> None:
        """A connection has ended. A failure is kept: nothing that comes later undoes it."""
        with self._lock:
            file.users -= 1
            if file.users == 0:
                file.strip()
                if not file.failure:
                    self._files.pop(self._key(info), None)
